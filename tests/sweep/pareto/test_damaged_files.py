"""Reports on sweeps whose files are damaged: one line that names the file and the remedy."""

import json

import pytest
from sweep_support import LOW, TWO_PHASE, write_sweep

from megaphase.sweep.directory import SweepDirectory
from megaphase.sweep.pareto.report import SweepReport
from megaphase.utils.errors import InputError

ARMS = {"static": {"rates": [0.1]}, "two-phase": TWO_PHASE}


@pytest.fixture
def directory(tmp_path):
    return SweepDirectory(write_sweep(tmp_path / "sweep", ARMS, seeds=[1]))


def refused(directory, tmp_path):
    with pytest.raises(InputError) as caught:
        SweepReport.of(directory.path).write(tmp_path / "report")
    return str(caught.value)


def any_run(directory, arm):
    return next(file.stem for file in directory.outcome_file("x").parent.glob(f"{arm}*"))


@pytest.mark.parametrize("text", ["{}", '{"step": 5, "losses": {"hi": 3.0}}'])
def test_an_outcome_without_a_task(directory, tmp_path, text):
    file = directory.outcome_file(any_run(directory, "static"))
    file.write_text(text)
    message = refused(directory, tmp_path)
    assert message.startswith(f"{file}: losses: has no value of ")
    assert message.endswith("remove the file, and give the sweep command again")


@pytest.mark.parametrize("arm", ["static", "pretrain"])
def test_metrics_that_end_too_early(directory, tmp_path, arm):
    files = [directory.metrics(each.name) for each in directory.run("").glob(f"{arm}*")]
    for file in files:
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[: len(lines) // 2]))
    message = refused(directory, tmp_path)
    assert any(message.startswith(f"{file}: has no validation after step ") for file in files)
    assert "give the sweep command again" in message


def test_a_test_loss_that_is_not_finite_is_that_of_a_diverged_run(directory, tmp_path):
    name = any_run(directory, "static")
    file = directory.outcome_file(name)
    outcome = json.loads(file.read_text())
    for each in directory.outcome_file("x").parent.iterdir():
        content = json.loads(each.read_text())
        content["test"] = content["losses"]
        content["test_bits_per_byte"] = content["bits_per_byte"]
        each.write_text(json.dumps(content))
    outcome["test"] = outcome["losses"] | {LOW[0]: None}
    outcome["test_bits_per_byte"] = outcome["bits_per_byte"]
    file.write_text(json.dumps(outcome))
    page = SweepReport.of(directory.path).write(tmp_path / "report").read_text()
    assert f"the test loss of {LOW[0]} is not finite" in page
