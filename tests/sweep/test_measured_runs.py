"""Losses on the test split and on training documents, measured after the runs of a sweep."""

from __future__ import annotations

import json
import math
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_support import wait_until
from run_support import HIGH, LOW, make_corpora, megaphase
from sweep_run_support import STEPS, open_sweep, run_warm, running, settings, write
from typer.testing import CliRunner
from warm_commands import run_well

from megaphase.cli import app
from megaphase.launch.slurm.job_file import JOB_FILE
from megaphase.plan.held_out_noise import document_error
from megaphase.sweep.directory import SweepDirectory
from megaphase.sweep.measurements import EVALUATION, is_measured, measurements
from megaphase.sweep.outcome import Outcome
from megaphase.sweep.start import refuse_failures
from megaphase.sweep.sweep import load_sweep
from megaphase.sweep.trial_run import has_ended
from megaphase.sweep.trials import all_trials, known_trials
from megaphase.utils.errors import InputError

TEST, TRAINING = {"fraction": 0.25, "samples": 7}, {"samples": 5}
ARMS: dict[str, Any] = {
    "static": {"rates": [0.2]},
    "two-phase": {"pretrain": [0.6], "rates": [0.4]},
    "regularized": {"rates": [0.4], "settings": {"model.dropout": 0.2}, "early_stopping": 1},
    "averaged": {"phases": [{"share": 1.0, "rate": 0.3, "average": {"kind": "uniform"}}]},
}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpora"))


def measured(corpora: Path, **changes: Any) -> dict[str, Any]:
    """Return a sweep file that measures both."""
    keys: dict[str, Any] = {"arms": ARMS, "test": TEST, "training_loss": TRAINING}
    return settings(corpora, **{**keys, **changes})


@pytest.fixture(scope="module")
def undisturbed(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepDirectory:
    """Return a finished sweep that keeps all checkpoints."""
    sweep, directory, outcomes = run_warm(
        write(tmp_path_factory.mktemp("sweep"), measured(corpora))
    )
    refuse_failures(sweep, directory, outcomes)
    return directory


@pytest.mark.slow
def test_the_weights_that_count_are_measured_on_test_and_training(
    undisturbed: SweepDirectory,
) -> None:
    outcomes = undisturbed.outcomes()
    assert Counter(bool(outcome.test) for outcome in outcomes.values()) == {True: 4, False: 1}
    for name, outcome in outcomes.items():
        if name.startswith("pretrain"):
            assert outcome.test == outcome.test_bits_per_byte == outcome.training == {}
            continue
        options = {"regularized": "best-mean", "two-phase": "joint"}
        arm = name.rpartition("-")[0]
        checkpoint = next((each for arm_, each in options.items() if arm.startswith(arm_)), None)
        file = undisturbed.run_file(name)
        (phase,) = json.loads((undisturbed.run(name) / "run.json").read_text())["phases"]
        average = ["--average"] if arm.startswith("averaged") else []
        found = json.loads(
            run_well(
                *("evaluate", file, "--checkpoint", checkpoint or phase["name"], *average),
                *("--split", "validation", "--samples", 6, "--split", "test", "--samples", 7),
                *("--split", "training", "--samples", 5, "--json"),
            )
        )
        assert found["step"] == outcome.step
        losses = {
            split: {task: each["loss"] for task, each in found[split].items()}
            for split in ("validation", "test", "training")
        }
        assert losses == {
            "validation": outcome.losses, "test": outcome.test, "training": outcome.training,
        }  # fmt: skip
        bits = {task: each["bits_per_byte"] for task, each in found["test"].items()}
        assert outcome.test_bits_per_byte == bits
        assert list(outcome.test) == [*HIGH, *LOW]


def test_runs_never_train_on_the_test_split(undisturbed: SweepDirectory, corpora: Path) -> None:
    sweep = load_sweep(undisturbed.path.parent / "sweep.yaml")
    for trial in known_trials(sweep, undisturbed.outcomes()):
        assert trial.run["test"] == TEST


def figures(outcomes: dict[str, Outcome]) -> dict[str, dict[str, Any]]:
    return {name: outcome.model_dump(exclude={"seconds"}) for name, outcome in outcomes.items()}


@pytest.mark.slow
def test_killed_while_it_measures_it_ends_with_the_same_outcomes(
    undisturbed: SweepDirectory, corpora: Path, tmp_path: Path
) -> None:
    """SIGKILL in the first evaluation; the checkpoints are then still there, and not after it."""
    path = write(tmp_path, measured(corpora, keep_checkpoints="first-stages"))
    directory = SweepDirectory(tmp_path / "out")
    process = subprocess.Popen(
        megaphase("sweep", path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    sweep = load_sweep(path)
    while not (evaluated := running_evaluations(sweep, directory)):
        assert process.poll() is None
    process.kill()
    process.wait()
    wait_until(lambda: not running_evaluations(sweep, directory))
    (name,) = evaluated
    assert (directory.run(name) / "checkpoints").is_dir()
    assert name not in directory.outcomes()
    metrics = directory.run(name) / "metrics.jsonl"
    trained = metrics.read_bytes()
    _, _, outcomes = run_warm(path)
    assert figures(outcomes) == figures(undisturbed.outcomes())
    assert metrics.read_bytes() == trained
    left = {folder.parent.name for folder in directory.run("").glob("*/checkpoints")}
    assert left == {"pretrain-0.6-p0.01-s11"}


def running_evaluations(sweep: Any, directory: SweepDirectory) -> set[str]:
    """Return the runs that have been trained, to whose logs a process still writes."""
    trials = all_trials(sweep)
    ended = {trial.name for trial in trials if trial.is_final and has_ended(directory, trial)}
    return running(directory) & ended


def test_measurements_that_are_missing_are_made_up_for(undisturbed: SweepDirectory) -> None:
    """If the sweep was killed before or in the middle of them, or they are of other weights."""
    name, path = "static-r0.2-p0.01-s11", undisturbed.path.parent / "sweep.yaml"
    expected, losses = undisturbed.outcomes(), undisturbed.losses_file(name)
    sweep = load_sweep(path)
    (trial,) = (each for each in known_trials(sweep, expected) if each.name == name)
    whole = json.loads(losses.read_text())
    for left in (None, whole | {"step": STEPS - 1}, {"step": STEPS, "test": {}, "samples": {}}):
        undisturbed.outcome_file(name).unlink()
        losses.unlink()
        if left is not None:
            losses.write_text(json.dumps(left))
        assert not is_measured(sweep, undisturbed, trial, EVALUATION)
        run_warm(path)
        assert undisturbed.outcomes()[name] == expected[name]
        assert json.loads(losses.read_text()) == whole


def test_outcomes_of_earlier_versions_have_no_test_losses(tmp_path: Path) -> None:
    directory = SweepDirectory(tmp_path)
    (tmp_path / "outcomes").mkdir()
    text = '{"step": 3, "losses": {"en": 2.0, "hi": null}, "seconds": 1.5}'
    directory.outcome_file("static").write_text(text)
    outcome = directory.outcomes()["static"]
    assert outcome.losses["en"] == 2.0
    assert math.isnan(outcome.losses["hi"])
    assert outcome.test == outcome.test_bits_per_byte == outcome.training == {}


def test_a_sweep_without_them_is_as_before(corpora: Path, tmp_path: Path) -> None:
    sweep, _ = open_sweep(write(tmp_path, settings(corpora)))
    for trial in known_trials(sweep, {}):
        assert measurements(sweep, trial) == []
        assert "test" not in trial.run
    assert sweep.test_samples is None
    assert not sweep.warnings


def test_the_run_file_may_have_the_test_split_itself(corpora: Path, tmp_path: Path) -> None:
    content = settings(corpora, training_loss=TRAINING)
    content["run"]["test"] = TEST
    sweep, _ = open_sweep(write(tmp_path, content))
    trial = next(each for each in known_trials(sweep, {}) if each.is_final)
    (measurement,) = measurements(sweep, trial)
    command = measurement.arguments(sweep, trial, Path("run.yaml"), Path("losses.json"))
    assert command == [
        *(
            "evaluate",
            "run.yaml",
            "parallel.tensor=1",
            "--checkpoint",
            "static",
            "--out",
            "losses.json",
        ),
        *("--split=test", "--samples=7", "--split=training", "--samples=5"),
    ]
    assert measurement.job_file != JOB_FILE


def test_translations_are_of_the_test_split(tmp_path: Path) -> None:
    from sweep_support import sweep_of

    from megaphase.sweep.file import TranslationScores
    from megaphase.sweep.trials import all_trials

    sweep = sweep_of(tmp_path / "sweep", {"static": {"rates": [0.1]}})
    config = sweep.config.model_copy(update={"translation": TranslationScores()})
    for samples, splits in ((None, []), (800, ["--split=test"])):
        found = sweep.model_copy(update={"config": config, "test_samples": samples})
        trial = all_trials(found)[0]
        command = measurements(found, trial)[-1].arguments(found, trial, Path("r"), Path("s"))
        assert command[0] == "translate"
        assert [word for word in command if word.startswith("--split")] == splits


def test_the_scripts_of_a_round_evaluate_after_training(corpora: Path, tmp_path: Path) -> None:
    jobs = {"gpus_per_node": 0, "tasks_per_node": 1, "cores": 1}
    path = write(tmp_path, measured(corpora, slurm=jobs))
    done = CliRunner().invoke(app, ["sweep", str(path), "--slurm", "--dry-run"])
    assert done.exit_code == 0, done.exception
    heads = [line for line in done.stdout.splitlines() if line.startswith("# single-stage")]
    assert "# single-stage-evaluate, after single-stage" in heads
    assert "# single-stage-best-evaluate, after single-stage-best" in heads
    assert "# first-stage-evaluate" not in done.stdout


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"step": 10, "test"', '{"step": 1, "test": {"alda": 3}}']
)
def test_damaged_results_are_named(text: str, corpora: Path, tmp_path: Path) -> None:
    sweep, directory = open_sweep(write(tmp_path, measured(corpora)))
    trial = next(each for each in known_trials(sweep, {}) if each.is_final)
    file = directory.losses_file(trial.name)
    file.write_text(text)
    with pytest.raises(
        InputError, match=f"{file}: .*; remove the file, and give the sweep command"
    ):
        is_measured(sweep, directory, trial, EVALUATION)


# Too few documents


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"test": {"fraction": 0.25, "samples": 25}},
            r": test\.samples: is 25, but the \d+ test documents of cimri are \d\d samples of "
            r"seq_len 32; raise test\.fraction to about 0\.\d+, or lower it to \d\d, or add text$",
        ),
        ({"test": {"fraction": 0.25, "samples": 10**6}}, r"; lower it to [\d,]+, or add text$"),
        ({"test": {"samples": 3}}, r": test: needs the key 'fraction'|: test\.fraction: "),
        (
            {"arms": {"static": {"rates": [0.1], "settings": {"test.fraction": 0.1}},
                      "keep": {"rates": [0.1], "pretrain": [0.5]}}},
            r": arms\.\w+: changes the held-out documents or the test split of alda, which must",
        ),
        (
            {"test": None, "settings": {"tasks.cimri.test": 0.2}},
            r": test: alda has no test split, but cimri has one; add test: \{fraction: …\}",
        ),
    ],
)  # fmt: skip
def test_refused(changes: dict[str, Any], message: str, corpora: Path, tmp_path: Path) -> None:
    path = write(tmp_path, measured(corpora, **changes))
    with pytest.raises(InputError, match=message) as caught:
        open_sweep(path)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_warning_says_how_noisy_the_loss_of_few_documents_is(
    corpora: Path, tmp_path: Path
) -> None:
    path = write(tmp_path, measured(corpora))
    (warning,) = load_sweep(path).warnings
    assert warning.startswith("cimri: the 7 test samples are of only ")
    assert "other documents would change the loss by about ±0." in warning
    done = CliRunner().invoke(app, ["sweep", str(path), "--dry-run"])
    assert "cimri: the 7 test samples are of only" in " ".join(done.stdout.split())


def test_the_error_of_a_loss_is_that_of_a_ratio_of_sums() -> None:
    random = np.random.default_rng(3)
    documents = [random.integers(0, 50, length) for length in (30, 7, 90, 41)]
    tokens = [token for document in documents for token in document.tolist()]
    counts = Counter(tokens)
    sums = [
        sum(-math.log(counts[token] / len(tokens)) for token in document.tolist())
        for document in documents
    ]
    mean = sum(sums) / len(tokens)
    squares = sum((s - mean * len(d)) ** 2 for s, d in zip(sums, documents, strict=True))
    assert document_error(documents) == pytest.approx(math.sqrt(4 / 3 * squares) / len(tokens))
