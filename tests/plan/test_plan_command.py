"""The output of `megaphase plan`, and rejected inputs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from data_support import rewrite_manifest, wait_until
from plan_support import (
    FakeTokenizer,
    build_plan,
    phase,
    random_lengths,
    spec_of,
    write_corpus,
    write_run,
)
from rich.console import Console
from typer.testing import CliRunner

from megaphase.plan.build import plan_folder
from megaphase.plan.commands import plan_app
from megaphase.plan.preview import plan_table, plan_warnings
from megaphase.plan.spec import plan_spec
from megaphase.training.run_directory import RunDirectory
from megaphase.utils.errors import InputError

PHASES = [
    phase("pretrain", 50, {"rates": {"en": 0.9995, "no": 0.0005}}),
    phase("joint", 30, {"rates": {"en": 0.5, "hi": 0.5}, "max_epochs": 5}),
]


@pytest.fixture
def folder(tmp_path) -> Path:
    for seed, (name, documents) in enumerate([("en", 60), ("hi", 5), ("no", 20)]):
        write_corpus(tmp_path / name, random_lengths(documents, 30, seed), seed=seed)
    return tmp_path


def rendered(summary: dict, width: int = 160) -> list[list[str]]:
    out = io.StringIO()
    Console(file=out, width=width).print(plan_table(summary))
    return [line.split() for line in out.getvalue().splitlines() if line.strip()]


def test_the_table_shows_tokens_rates_and_epochs(folder):
    summary = build_plan(write_run(folder, ["en", "hi", "no"], phases=PHASES)).summary()
    first, second = (phase["tasks"] for phase in summary["phases"])
    rows = rendered(summary)
    header = ["phase", "task", "steps", "tokens", "requested", "effective", "epochs", "so", "far"]
    assert rows[:2] == [["Plan"], header]
    en = first["en"]
    assert rows[3:5] == [
        ["pretrain", "en", "50", "1,600", "0.9995", "0.9995", f"{en['epochs']:.2f}",
         f"{en['epochs_so_far']:.2f}"],
        ["no", "0", "5.0e-04", "5.0e-04", "0.00", "0.00"],
    ]  # fmt: skip
    hi = second["hi"]
    assert hi["rate"] < 0.5
    assert rows[6] == [
        "hi", f"{hi['tokens']:,}", "0.5000", f"{hi['rate']:.4f}", "5.00", "5.00", "!",
    ]  # fmt: skip
    assert len(rows) == 7


def test_the_table_names_a_random_order(folder):
    phases = [PHASES[0] | {"order": "random"}, PHASES[1]]
    rows = rendered(build_plan(write_run(folder, ["en", "hi", "no"], phases=phases)).summary())
    assert [row[:3] for row in rows if "order)" in row] == [["pretrain", "(random", "order)"]]


def test_the_table_loses_no_digit_in_80_columns(folder):
    summary = build_plan(write_run(folder, ["en", "hi", "no"], phases=PHASES)).summary()
    summary["phases"][0]["tasks"]["en"]["tokens"] = 200_000_000_000
    rows = rendered(summary, width=80)
    assert any("200,000,000,000" in row for row in rows)


def test_tasks_that_are_repeated_too_often_are_warned_of(folder):
    summary = build_plan(write_run(folder, ["en", "hi", "no"], phases=PHASES)).summary()
    assert plan_warnings(summary) == [
        "hi is repeated 5.0 times over the run (more than 4); lower its rate or set "
        "mixture.max_epochs"
    ]
    exactly_four = [PHASES[0], phase("joint", 30, PHASES[1]["mixture"] | {"max_epochs": 4})]
    summary = build_plan(write_run(folder, ["en", "hi", "no"], phases=exactly_four)).summary()
    assert summary["phases"][1]["tasks"]["hi"]["epochs_so_far"] == 4
    assert plan_warnings(summary) == []
    assert not any("!" in row for row in rendered(summary))


@pytest.fixture
def command(monkeypatch):
    monkeypatch.setattr("megaphase.tokenizer.Tokenizer.load", lambda directory: FakeTokenizer())
    return lambda *arguments: CliRunner().invoke(plan_app, [str(a) for a in arguments])


def test_the_command_prints_table_warnings_and_folder(folder, command):
    config = write_run(folder, ["en", "hi", "no"], phases=PHASES)
    result = command(config.path)
    assert result.exit_code == 0, result.output
    where = plan_folder(config.output, spec_of(config))
    assert "Warning: hi is repeated 5.0 times" in result.stdout
    assert result.stdout.splitlines()[-1] == f"Index: {where}"
    assert (where / "index.json").is_file()


def test_the_command_says_what_may_end_a_phase(folder, command):
    stop = {"overfit": {"tasks": ["hi", "no"], "patience": 5}}
    any_of = {"overfit": {"tasks": ["hi", "no"], "when": "any"}, "loss": {"en": 2.5, "no": 3}}
    phases = [
        PHASES[0] | {"stop": {"loss": {"en": 2}}},
        PHASES[1] | {"stop": stop},
        phase("last", 3, {"rates": {"en": 1.0}}) | {"stop": any_of},
        phase("plain", 3, {"rates": {"en": 1.0}}),
    ]
    lines = command(write_run(folder, ["en", "hi", "no"], phases=phases).path).stdout.splitlines()
    assert [line for line in lines if "may end" in line] == [
        "pretrain may end earlier: loss of en at 2",
        "joint may end earlier: overfit of hi, no (patience 5)",
        "last may end earlier: overfit of any of hi, no (patience 3), or loss of en at 2.5 and "
        "no at 3",
    ]


def test_the_command_shows_weights_of_losses_and_ramps(folder, command):
    ramp = {"samples": 8, "ramp": {"from": 4, "step": 4, "tokens": 64}}
    phases = [
        phase("first", 6, {"rates": {"en": 0.5, "hi": 0.5, "no": 0}}) | {"loss_weights": {"hi": 4}},
        phase("second", 6, {"rates": {"en": 1.0}}) | {"batch": ramp},
    ]
    said = command(write_run(folder, ["en", "hi", "no"], phases=phases).path).stdout
    assert "Weights of losses in first: en 1, hi 4\n" in said
    assert "Weights of losses in second" not in said
    batch = "4 samples (32 tokens), 8 samples (64 tokens) from step 3 of the phase on"
    assert f"Batch of second: {batch}\n" in said


def test_the_command_prints_json_and_nothing_else(folder, command):
    config = write_run(folder, ["en", "hi", "no"], phases=PHASES)
    result = command(config.path, "--json", "phases.0.steps=40", "batch.samples=2")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert [summary["samples_per_step"], summary["phases"][0]["steps"]] == [2, 40]
    assert result.stderr == ""


def test_the_command_names_a_damaged_index_on_standard_error(folder, command):
    config = write_run(folder, ["en", "hi", "no"], phases=PHASES)
    command(config.path)
    (plan_folder(config.output, spec_of(config)) / "blend-0.tasks").unlink()
    result = command(config.path, "--json")
    assert "blend-0.tasks is missing; building the plan again" in result.stderr
    assert json.loads(result.stdout)


def test_the_command_writes_nothing_into_a_run_with_another_plan(folder, command):
    config = write_run(folder, ["en", "hi", "no"], phases=PHASES)
    RunDirectory(config.output).claim(config, build_plan(config).summary())
    expected = json.loads(command(folder / "run.yaml", "--json").stdout)
    before = {path: path.stat().st_mtime_ns for path in config.output.rglob("*")}
    same = command(folder / "run.yaml")
    assert "another plan" not in same.stderr
    other = command(folder / "run.yaml", "seed=8")
    assert other.exit_code == 0, other.output
    assert f"{config.output} holds a run with another plan, which is not changed" in other.stderr
    assert "Index:" in same.stdout
    assert "Index:" not in other.stdout
    shown = json.loads(command(folder / "run.yaml", "seed=8", "--json").stdout)
    assert shown["phases"][0]["steps"] == expected["phases"][0]["steps"]
    assert shown["fingerprint"] != expected["fingerprint"]
    assert {path: path.stat().st_mtime_ns for path in config.output.rglob("*")} == before


def refused(config) -> str:
    with pytest.raises(InputError) as error:
        build_plan(config)
    message = str(error.value)
    assert "\n" not in message
    assert not config.output.exists()
    return message


def test_a_corpus_of_another_tokenizer(folder):
    config = write_run(folder, ["en"])
    with pytest.raises(InputError) as error:
        plan_spec(config, FakeTokenizer("another"))  # type: ignore[arg-type]
    assert str(error.value) == (
        f"{config.path}: tasks.en.corpus: {folder}/en was tokenized with another tokenizer than "
        f"{folder}/tok; tokenize it again with that one, or name the other one under tokenizer"
    )


def test_a_corpus_that_is_not_there(folder):
    assert refused(write_run(folder, ["en", "fr"])) == (
        f"{folder}/fr.json: no such file; make the corpus with `megaphase data tokenize`"
    )


def test_an_empty_corpus(folder):
    rewrite_manifest(folder / "no", documents=0)
    message = refused(write_run(folder, ["no"]))
    assert message == f"{folder}/no.json: the corpus is empty; tokenize files that hold text"


def test_a_corpus_shorter_than_a_sample(folder):
    write_corpus(folder / "xx", [3, 5])
    config = write_run(folder, ["en", "xx"])
    assert refused(config) == (
        f"{config.path}: tasks.xx.corpus: {folder}/xx has 8 tokens, fewer than one sample of "
        "seq_len + 1 = 9; add text or lower model.seq_len"
    )


def test_no_document_held_out(folder):
    config = write_run(folder, ["en", "no"], validation={"fraction": 1e-6})
    assert refused(config) == (
        f"{config.path}: validation.fraction: 1e-06 holds out none of the 60 documents of "
        f"{folder}/en; raise it"
    )


def test_too_many_documents_held_out(folder):
    config = write_run(folder, ["en", "no"], validation={"fraction": 0.999999})
    assert refused(config) == (
        f"{config.path}: validation.fraction: 0.999999 holds out 60 of the 60 documents of "
        f"{folder}/en, and the 0 tokens that are left are fewer than one sample of seq_len + 1 = "
        "9; lower it, add text or lower model.seq_len"
    )


def test_an_index_whose_lengths_were_altered(folder):
    path = folder / "en.idx"
    data = bytearray(path.read_bytes())
    data[34:38] = np.int32(1000).tobytes()
    path.write_bytes(data)
    tokens = json.loads((folder / "en.json").read_text())["tokens"]
    message = refused(write_run(folder, ["en"]))
    assert message.startswith(f"{path}: its lengths sum to ")
    assert message.endswith(f" tokens, the manifest says {tokens:,}; tokenize again")


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".hash"])
def test_a_truncated_corpus(folder, suffix):
    path = folder / f"en{suffix}"
    path.write_bytes(path.read_bytes()[:-8])
    assert refused(write_run(folder, ["en"])).startswith(f"{path}: is truncated: ")


def test_a_cap_holds_in_the_built_plan(folder):
    facts = build_plan(write_run(folder, ["en", "hi", "no"], phases=PHASES)).summary()
    joint = facts["phases"][1]["tasks"]
    assert joint["hi"]["epochs_so_far"] == 5
    assert joint["en"]["samples"] + joint["hi"]["samples"] == 120


def test_a_token_budget_is_rounded_up_to_whole_steps(folder):
    for tokens, steps in [(1, 1), (32, 1), (33, 2), (320, 10)]:
        budget = {key: value for key, value in PHASES[0].items() if key != "steps"}
        config = write_run(folder, ["en", "no"], phases=[budget | {"tokens": tokens}])
        assert spec_of(config).phases[0].steps == steps


def test_a_cap_that_cannot_be_kept_leaves_no_index(folder):
    mixture = {"rates": {"hi": 1.0}, "max_epochs": 2}
    config = write_run(folder, ["en", "hi"], phases=[phase("joint", 500, mixture)])
    with pytest.raises(InputError, match=r"phases\[0\]\.mixture: the phase wants 2,000 samples"):
        build_plan(config)
    wait_until(lambda: not config.output.exists())
