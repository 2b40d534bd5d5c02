"""Any value anywhere in a run, sweep or pipeline file works, or one line says what is wrong."""

from __future__ import annotations

import json
import os
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nasty_values import all_keys, nasty_values, places, replaced
from plan_support import FakeTokenizer, write_corpus

from megaphase import cli
from megaphase.config.load import run_config
from megaphase.config.run import RunConfig
from megaphase.estimate.hardware import hardware_of, planned_card
from megaphase.estimate.memory_table import memory_sentences, memory_summary
from megaphase.estimate.step_time_table import speed_sentences, speed_summary
from megaphase.launch.slurm.pipeline import Pipeline, load_pipeline, scripts
from megaphase.optim.schedules import learning_rate
from megaphase.plan.load_plan import phase_setups
from megaphase.plan.mixture import effective_rates
from megaphase.plan.spec import plan_spec
from megaphase.sweep import sweep as sweep_module
from megaphase.sweep.file import SweepConfig
from megaphase.sweep.trial_checks import check_demands, check_run_files
from megaphase.sweep.trials import all_trials
from megaphase.utils.errors import InputError

PROGRAM = typer.main.get_command(cli.app)
LONGEST_LINE = 4100
FEW = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))

SWEEP: dict[str, Any] = {
    "run": {
        "tokenizer": "tok",
        "tasks": {name: {"corpus": name} for name in ("en", "hi")},
        "model": {"layers": 1, "hidden": 32, "heads": 4, "seq_len": 8},
        "batch": {"samples": 4},
        "validation": {"fraction": 0.2},
    },
    "output": "sweep",
    "settings": {"model.dropout": 0.1},
    "high": ["en"],
    "low": ["hi"],
    "within": {"high": 1.0, "low": 3.0},
    "steps": 40,
    "learning_rate": {"peaks": [1e-3, 2e-3], "schedule": "cosine", "final": 0.1, "warmup": 0.03},
    "seeds": [1, 2],
    "models": {"small": {}, "wide": {"hidden": 64}},
    "arms": {
        "static": {"rates": [0.1], "temperatures": [2.0]},
        "two-phase": {"pretrain": [0.7], "rates": [0.1]},
        "mine": {
            "kind": "regularized", "rates": [0.2], "settings": {"optimizer.weight_decay": 0.3},
            "early_stopping": 3,
        },
    },
    "keep_checkpoints": "all",
    "slurm": {
        "nodes": 1, "gpus_per_node": 0, "tasks_per_node": 2, "cores": 1, "restarts": 1,
        "exclude_bad_nodes": False, "sbatch": "--time=10", "next_sbatch": ["--time=5"],
        "at_a_time": 2,
    },
}  # fmt: skip
PIPELINE: dict[str, Any] = {
    "logs": "logs",
    "sbatch": ["--partition=cpu"],
    "steps": {
        "first": {"train": "run.yaml", "nodes": 1, "gpus_per_node": 0, "tasks_per_node": 1,
                  "cores": 1, "restarts": 2, "exclude_bad_nodes": True, "sbatch": "--time=5"},
        "second": {"command": "report run", "after": "first", "after_failures": True, "array": 2,
                   "at_a_time": 1, "sbatch": ["--time=5"]},
    },
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """Make two corpora and a run file; relative paths start here."""
    made = tmp_path_factory.mktemp("nasty")
    for name in ("en", "hi"):
        write_corpus(made / name, [30] * 80)
    (made / "run.yaml").write_text(yaml.safe_dump(all_keys(), sort_keys=False))
    before = Path.cwd()
    os.chdir(made)
    yield made
    os.chdir(before)


@pytest.fixture(autouse=True, scope="module")
def no_tokenizer():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_module.Tokenizer, "load", lambda _: FakeTokenizer())
        yield


def works_or_is_refused(action, *arguments: Any) -> bool:
    """Return whether it works; an InputError must be one line, and nothing else may be raised."""
    try:
        action(*arguments)
    except InputError as error:
        line = str(error)
        assert line.isprintable(), repr(line)
        assert len(line) < LONGEST_LINE, line
        return False
    return True


def plan_and_estimate(content: dict[str, Any]) -> None:
    """Compute everything that `megaphase plan` does for a run file, except the index."""
    check_run(run_config(Path("run.yaml"), content))


def check_run(config: RunConfig) -> None:
    setups = phase_setups(config, FakeTokenizer(), config.parallel.tensor)
    memory = memory_summary(setups, planned_card(config, None).memory_gb)
    spec = plan_spec(config, FakeTokenizer(), {})
    hardware = hardware_of(config, None)
    phases = [
        (name, [(setup, phase.steps)])
        for (name, setup), phase in zip(setups, spec.phases, strict=True)
    ]
    speed = speed_summary(setups[0].setup, hardware, phases) if hardware else None
    assert memory_sentences(memory)
    assert speed_sentences(memory, speed)
    json.dumps([memory, speed], allow_nan=False)
    supply = spec.supply(0, spec.starts)
    for phase, settings_of in zip(spec.phases, config.phases, strict=True):
        samples = phase.samples
        rates = effective_rates(phase.mixture, supply, samples, phase.where)
        assert sum(rates.values()) == 1
        for step in (0, phase.steps // 2, phase.steps - 1):
            assert learning_rate(settings_of.learning_rate, step, phase.steps) >= 0


def check_sweep(content: dict[str, Any]) -> None:
    path = Path("sweep.yaml")
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    found = sweep_module.load_sweep(path)
    trials = all_trials(found)
    check_run_files(found, trials)
    check_demands(found, trials)
    names = [trial.name for trial in trials]
    assert len(set(names)) == len(names)


def check_pipeline(content: dict[str, Any]) -> None:
    path = Path("pipeline.yaml")
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    assert scripts(load_pipeline(path, PROGRAM))


CASES = {
    "run": (all_keys(), RunConfig, plan_and_estimate),
    "sweep": (SWEEP, SweepConfig, check_sweep),
    "pipeline": (PIPELINE, Pipeline, check_pipeline),
}


@pytest.mark.parametrize("kind", CASES)
def test_the_files_that_values_are_replaced_in_work(kind):
    content, _, check = CASES[kind]
    check(content)


@FEW
@given(st.data())
def test_one_value_of_a_run_file_is_replaced(data):
    one_is_replaced("run", data.draw)


@settings(FEW, max_examples=150)
@given(st.data())
def test_one_value_of_a_sweep_file_is_replaced(data):
    one_is_replaced("sweep", data.draw)


@settings(FEW, max_examples=100)
@given(st.data())
def test_one_value_of_a_pipeline_is_replaced(data):
    one_is_replaced("pipeline", data.draw)


@pytest.mark.parametrize("command", ["", "  ", "data", "--help", "plan"])
def test_a_step_that_only_shows_help_shows_none(command, capsys):
    content = replaced(PIPELINE, ("steps", "second", "command"), command)
    with pytest.raises(InputError, match=r"steps.second.command: "):
        check_pipeline(content)
    assert capsys.readouterr().out == ""


def one_is_replaced(kind, draw):
    content, model, check = CASES[kind]
    place = draw(st.sampled_from(sorted(places(content), key=str)))
    value = draw(st.sampled_from(nasty_values(model)))
    works_or_is_refused(check, replaced(content, place, value))


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_every_value_is_replaced_by_every_other(kind):
    content, model, check = CASES[kind]
    everything = list(product(places(content), nasty_values(model)))
    worked = sum(
        works_or_is_refused(check, replaced(content, place, value)) for place, value in everything
    )
    print(f"{kind}: {len(everything):,} files, of which {worked:,} are valid")
    assert 0 < worked < len(everything)
