"""The meaning of values in a run file, and which are rejected: decimals, bounds, names, paths."""

from __future__ import annotations

import json
import os
from decimal import Decimal
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from nasty_values import all_keys, places, replaced

from megaphase.checkpoint.state import NAME
from megaphase.config.load import load_run_file, run_config
from megaphase.config.run import RunConfig
from megaphase.estimate.gathered_parameters import kept_gathered
from megaphase.plan.mixture import MixtureConfig, TaskSupply, effective_rates
from megaphase.plan.split import held_out_hashes, training_hashes
from megaphase.training.run_directory import RunDirectory
from megaphase.utils.decimals import as_written
from megaphase.utils.errors import InputError, one_line
from megaphase.utils.names import check_name, check_phase_name


def load(folder: Path, content: dict[str, Any], *overrides: str) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return load_run_file(path, overrides)


def refusal(folder: Path, content: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(InputError) as error:
        load(folder, content, *overrides)
    return str(error.value).replace(f"{folder}/", "")


def with_value(place: str, value: Any) -> dict[str, Any]:
    keys = [int(key) if key.isdigit() else key for key in place.split(".")]
    return replaced(all_keys(), tuple(keys), value)


# --- decimals ---

DECIMALS = st.integers(1, 99_999).map(lambda n: n / 100)


@given(DECIMALS, st.integers(1, 10**6))
def test_max_epochs_is_the_decimal_number_that_was_written(max_epochs, samples_per_epoch):
    most = floor(Decimal(str(max_epochs)) * samples_per_epoch)
    supply = {"hi": TaskSupply(9, samples_per_epoch, 0)}
    mixture = MixtureConfig(rates={"hi": 1.0}, max_epochs=max_epochs)
    if most > 0:
        assert effective_rates(mixture, supply, most, "here") == {"hi": 1}
    with pytest.raises(InputError, match="leaves only"):
        effective_rates(mixture, supply, most + 1, "here")


def test_a_number_that_has_no_binary_form():
    assert as_written(2.32) * 50 == 116
    assert int(2.32 * 50) == 115
    assert as_written(7) == 7
    assert as_written(1e-5) == Fraction(1, 100_000)


def test_a_held_out_fraction_is_the_decimal_number_that_was_written():
    assert held_out_hashes(0.1).last == 2**64 // 10 - 1
    assert training_hashes(0.1, 0.3).last == 2**64 // 10 + (2**64 - 2**64 // 10) * 3 // 10 - 1


def test_a_share_of_the_weights_is_the_decimal_number_that_was_written():
    sizes = {f"blocks.{i}.weight": 1_000_000 for i in range(100)}
    assert 0.29 * 100 < 29  # which would leave the last block out
    assert len(kept_gathered(sizes, 0.29)) == 29


def test_a_count_is_the_decimal_number_that_was_written(tmp_path):
    assert load(tmp_path, with_value("phases.2.tokens", 1e15)).phases[2].tokens == 10**15
    assert load(tmp_path, all_keys(), "phases.2.tokens=2.5e3").phases[2].tokens == 2500


# --- types ---

OF_ANOTHER_TYPE = {
    bool: [0, 1, 0.0, 1.0, "true", "no"],
    int: [True, False, 1.5, "1"],
    float: [True, False, "0.5"],
    str: [True, 1, 1.5, b"en"],
}


@pytest.mark.parametrize("place", places(all_keys()), ids=lambda p: ".".join(map(str, p)))
def test_no_value_is_taken_for_one_of_another_type(tmp_path, place):
    node: Any = all_keys()
    for key in place:
        node = node[key]
    for value in OF_ANOTHER_TYPE.get(type(node), [True, 1, 1.5, "text"]):
        with pytest.raises(InputError, match=r"run.yaml: "):
            run_config(tmp_path / "run.yaml", replaced(all_keys(), place, value))


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("parallel.zero", True, "parallel.zero: must be 0, 1, 2 or 3; found true"),
        ("parallel.zero", 2.0, "parallel.zero: must be 0, 1, 2 or 3; found 2.0"),
        ("phases.2.mixture.unimax", 1, "phases[2].mixture.unimax: must be true; found 1"),
        ("phases.2.mixture", {"proportional": 1.0},
         "phases[2].mixture.proportional: must be true; found 1.0"),
        ("logging.tensorboard", 1, "logging.tensorboard: must be true or false; found 1"),
        ("optimizer.betas", [True, 0.9], "optimizer.betas[0]: must be a number; found true"),
        ("batch.samples", True, "batch.samples: must be a whole number; found true"),
        ("output", b"run", "output: must be a path; found \"b'run'\""),
        # bounds
        ("optimizer.betas", [0.9, 1.0], "optimizer.betas[1]: must be less than 1; found 1.0"),
        ("model.seq_len", 1e25, "model.seq_len: must be at most 1,000,000,000,000,000; found "),
        ("model.layers", 1e12, "model.layers: must be at most 2,000; found 1000000000000"),
        ("model.hidden", 10**400, "model.hidden: must be at most 1,000,000,000,000,000; found 100"),
        ("phases.0.learning_rate.peak", float("inf"), 'peak: must be a number; found ".inf"'),
        ("faults.silent_seconds", float("nan"), 'silent_seconds: must be a number; found ".nan"'),
        # tasks that occur twice
        ("phases.1.mixture.over", ["hi", "en", "hi"], "mixture.over: 'hi' occurs twice"),
        ("monitor.tasks", ["hi", "hi"], "monitor.tasks: 'hi' occurs twice"),
        ("phases.0.stop.overfit.tasks", ["en", "en"], "overfit.tasks: 'en' occurs twice"),
        # schedules
        ("phases.1.learning_rate", {"peak": 1e-3, "warmup_steps": 5, "steps": 4},
         "learning_rate: warmup_steps (5) do not fit the schedule of 4 steps"),
        ("phases.0.learning_rate.decay_steps", 19,
         "warmup_steps (2) and decay_steps (19) do not fit the schedule of 20 steps"),
    ],
)  # fmt: skip
def test_refused(tmp_path, place, value, said):
    assert said in refusal(tmp_path, with_value(place, value))


def test_a_warm_up_as_long_as_the_schedule_is_allowed(tmp_path):
    rate = {"peak": 1e-3, "warmup_steps": 10}
    config = load(tmp_path, with_value("phases.0.learning_rate", rate))
    assert config.phases[0].learning_rate.warmup_steps == 10


# --- names ---


@pytest.mark.parametrize(
    "name",
    ["en", "zh-Hant", "_x", "wiki.eu", "ελ", "हिन्दी", "ไทย", "中文", "한국어", "٣", "a" * 100],
)
def test_names_of_all_scripts(tmp_path, name):
    assert check_name(name) == name
    content = all_keys()
    content["tasks"][name] = {"corpus": "data/x"}
    assert name in load(tmp_path, content).tasks
    (tmp_path / f"best-{name}.partial").touch()  # a file can have it


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "a name is empty"),
        ("wiki/eu", "contains '/'"),
        (".", "begins with '.'"),
        ("..", "begins with '.'"),
        ("-x", "begins with '-'"),
        ("a b", "contains ' '"),
        ("a\nb", r"contains '\n'"),
        ("a\0", r"contains '\x00'"),
        ("a@b", "contains '@'"),
        ("²", "contains '²'"),
        ("\ud800", r"contains '\ud800'"),
        ("x" * 101, "has 101 bytes"),
        ("ह" * 34, "has 102 bytes"),
        ("x" * 1_000, "has 1,000 bytes"),
    ],
)
def test_names_that_no_file_should_have(tmp_path, name, said):
    with pytest.raises(ValueError, match=r"digits|begin with") as error:
        check_name(name)
    assert said in str(error.value)
    assert len(str(error.value)) < 250
    for content in (
        with_value("phases.1.name", name),
        replaced(all_keys(), ("tasks", name), {"corpus": "x"}),
    ):
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(content))  # which is YAML, too
        with pytest.raises(InputError) as refused:
            load_run_file(path)
        assert said in str(refused.value)


@pytest.mark.parametrize("name", ["latest", "best-hi", "best-mean", "step-00000004", "step-x"])
def test_no_phase_is_called_as_a_checkpoint(tmp_path, name):
    said = refusal(tmp_path, with_value("phases.0.name", name))
    assert said.startswith(f"run.yaml: phases[0].name: {name!r} is a checkpoint's name")


@given(st.sampled_from(["step", "best"]), st.integers(0, 10**12))
def test_every_name_of_a_checkpoint_is_kept_from_phases(kind, step):
    name = f"{kind}-{step:08d}"
    assert NAME.fullmatch(name)
    with pytest.raises(ValueError, match="is a checkpoint's name"):
        check_phase_name(name)


# --- URLs ---


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("s3://", "a URL without a bucket"),
        ("s3:///runs/first", "a URL without a bucket"),
        ("s3:/bucket/runs", "not a URL such as"),
        ("s3://bucket/../x", "a URL with '.' or '..' between slashes"),
        ("s3://bucket/runs@first", "a URL with '@'"),
    ],
)
def test_no_folder_in_a_store(tmp_path, url, problem):
    said = refusal(tmp_path, with_value("checkpoint.upload", url))
    assert said.startswith(f"run.yaml: checkpoint.upload: {problem}")


# --- paths ---

PATHS = ["output", "tokenizer", "tasks.hi.corpus", "parallel.offload_folder"]


def value_of(config: RunConfig, place: str) -> Any:
    node: Any = config
    for key in place.split("."):
        node = node[key] if isinstance(node, dict) else getattr(node, key)
    return node


@pytest.mark.parametrize("place", PATHS)
def test_every_path_is_taken_from_the_run_files_folder(tmp_path, monkeypatch, place):
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", "/home/me")
    for written, meant in (
        ("a/b", tmp_path / "a/b"),
        ("../b", tmp_path / "../b"),
        ("/x/b", Path("/x/b")),
        ("~/b", Path("/home/me/b")),
        ("~root/b", Path(os.path.expanduser("~root/b"))),
        ("a~/b", tmp_path / "a~/b"),
    ):
        assert value_of(load(tmp_path, with_value(place, written)), place) == meant
        assert value_of(load(tmp_path, all_keys(), f"{place}={written}"), place) == meant


@pytest.mark.parametrize("place", PATHS)
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("~nosuchuser/x", "no home folder of '~nosuchuser' is known; write ~/ for your own"),
        ("", "must be a path"),
        ("a\0b", "contains a control character"),
        ("a\nb", "contains a control character"),
        ("x" * 300, "is too long"),
        ("a/" * 2000, "is too long"),
        ("\ud800", "is not a valid file path"),
    ],
)
def test_a_path_that_no_file_has(tmp_path, place, path, said):
    (tmp_path / "run.yaml").write_text(json.dumps(with_value(place, path)))
    with pytest.raises(InputError) as error:
        load_run_file(tmp_path / "run.yaml")
    assert str(error.value).startswith(f"{tmp_path}/run.yaml: {place}: ")
    assert said in str(error.value)


# --- overrides ---


@pytest.mark.parametrize(
    "key", ["phases.²", "phases.٣", "phases.-1", "phases.", f"phases.{'9' * 5000}"]
)
def test_an_entry_that_is_no_number(tmp_path, key):
    assert "is a list of 3; name an entry by its number" in refusal(
        tmp_path, all_keys(), f"{key}.steps=5"
    )


def test_a_key_may_hold_points(tmp_path):
    content = all_keys()
    content["tasks"]["zh.wiki"] = {"corpus": "zh"}
    config = load(tmp_path, content, "tasks.zh.wiki.corpus=other", "tasks.hi.corpus=third")
    assert config.tasks["zh.wiki"].corpus == tmp_path / "other"
    assert config.tasks["hi"].corpus == tmp_path / "third"


def test_a_section_with_nothing_below_it_takes_a_value(tmp_path):
    content = all_keys() | {"checkpoint": None}
    assert load(tmp_path, content, "checkpoint.keep=7").checkpoint.keep == 7


def test_what_an_alias_shares_is_changed_at_one_place_alone(tmp_path):
    rate = {"peak": 1e-3}
    content = all_keys()
    content["phases"][1]["learning_rate"] = content["phases"][2]["learning_rate"] = rate
    assert "&id001" in yaml.safe_dump(content)
    config = load(tmp_path, content, "phases.1.learning_rate.peak=0.5")
    assert [phase.learning_rate.peak for phase in config.phases] == [1e-3, 0.5, 1e-3]


# --- YAML ---

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 30)}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a [*a]", "nested more than 50 levels deep"),
        ("a: " + "[" * 30_000, "levels deep"),
        ("a: " + "{a: " * 60 + "1" + "}" * 60, "nested more than 50 levels deep"),
        (BOMB, "more than 1,000,000 values"),
        (MERGES, "keys are merged"),
        ("a: !!bool maybe", "does not fit its tag"),
        ("a: !!timestamp soon", "does not fit its tag"),
        ("a: !!int x", "invalid literal"),
        ("a: !!binary 'a'", "failed to decode"),
        ("a: !!python/object:os.system {}", "could not determine a constructor"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a: " + "1" * 5000, "digits"),
        ("a: \x01", "special characters are not allowed"),
        ("a: <<\n<<: 5", "expected a mapping"),
        ("x" * (5 << 20), "is larger than"),
        ("", "must contain a mapping"),
    ],
)  # fmt: skip
def test_yaml_that_is_none_or_too_much(tmp_path, text, said):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load_run_file(path)
    assert said in str(error.value)
    assert str(error.value).isprintable()


def test_a_message_is_one_line():
    said = str(InputError("a\nb", "c\x1b[2J" + "x" * 10_000, "\u2028d"))
    assert said.isprintable()
    assert len(said) < 2100
    assert said.endswith(r"\u2028d")
    assert one_line("as it is: é, 中文") == "as it is: é, 中文"


# --- runs that an earlier version began ---


def test_a_run_directory_with_a_name_that_is_refused_today(tmp_path):
    """One line distinguishes it from the run of today's file."""
    config = load(tmp_path, all_keys())
    directory = RunDirectory(config.output)
    directory.path.mkdir()
    settings = config.model_dump(mode="json", exclude_none=True)
    settings["tasks"]["wiki/eu"] = settings["tasks"].pop("hi")
    settings["logging"]["tensorboard"] = 1
    directory.run_file.write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"tasks.wiki/eu: is missing, but the run .* began"):
        directory.refuse_other_run(config)


def test_a_plan_with_other_counts_is_not_taken_for_the_runs_own(tmp_path):
    config = load(tmp_path, all_keys())
    directory = RunDirectory(config.output)
    plan = {"fingerprint": "f", "phases": [{"tasks": {"hi": {"samples": 115}}}]}
    directory.claim(config, plan)
    directory.claim(config, plan)
    plan["phases"][0]["tasks"]["hi"]["samples"] = 116
    with pytest.raises(InputError, match=r"plan.json: has other counts of samples"):
        directory.claim(config, plan)
