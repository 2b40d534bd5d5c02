"""A validated sweep: its file, the run file on which it is based, the size of its corpora.

It is stored in one JSON file in the sweep's directory, from which a report reads it without corpora
or tokenizer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from megaphase.config.load import run_config, set_value, with_absolute_paths
from megaphase.config.run import RunConfig
from megaphase.plan.spec import plan_spec, verified_corpora
from megaphase.sweep.arms.config import KINDS, PHASES, PRETRAIN, STAGED, Arm, Kind
from megaphase.sweep.file import PrimaryContrast, SweepConfig
from megaphase.sweep.test_documents import check_test_split
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError
from megaphase.utils.files import real_path
from megaphase.utils.names import shown
from megaphase.utils.validation_errors import as_input_error, hint
from megaphase.utils.yaml_file import read_yaml

# Keys of the run file that differ between the runs of the sweep.
OWN_KEYS = ("seed", "output", "phases")
END_AFTER = "would end runs before they have spent the budget"
GROUP_LOSSES = ("mean", "high", "low")  # besides the tasks, what a primary contrast may be about


class Sweep(BaseModel):
    """What determines the runs.

    Attributes:
        file: the sweep file.
        config: its content.
        base: the run file's content, without the keys that differ between runs; paths are absolute.
        output: the sweep's directory.
        high, low: the tasks of the two groups.
        tokens: training tokens of an epoch by task.
        inputs: fingerprints of the tokenizer and the corpora, by what they are; empty in the
            records of earlier versions.
        steps: optimizer steps of every run, over all of its phases.
        test_samples: of every task in the test split; None if there is none.
        warnings: sentences for the user, also in reports.
    """

    model_config = ConfigDict(frozen=True)

    file: Path
    config: SweepConfig
    base: dict[str, Any]
    output: Path
    high: list[str]
    low: list[str]
    tokens: dict[str, int]
    inputs: dict[str, str] = {}
    steps: int
    test_samples: int | None = None
    warnings: list[str] = []

    def where(self, key: str) -> str:
        """Return `FILE: KEY`, for messages."""
        return f"{self.file}: {key}"

    def kind(self, arm: str) -> Kind:
        """Return the kind of an arm.

        A static arm that has settings or early stopping of its own, beside one that has neither, is
        a regularized one: it is no baseline.
        """
        arms = self.config.arms
        kind = _kind(self.file, arm, arms[arm])
        if kind == "static" and not arms[arm].is_plain:
            plain = (name for name, each in arms.items() if each.is_plain)
            if any(_kind(self.file, name, arms[name]) == "static" for name in plain):
                return "regularized"
        return kind


def load_sweep(path: Path) -> Sweep:
    """Read a sweep file and check it against its run file, tokenizer and corpora.

    Raises:
        InputError: names the file, the key's path and the remedy.
    """
    try:
        config = SweepConfig.model_validate(read_yaml(path), context=real_path(path.parent))
    except ValidationError as error:
        raise as_input_error(path, error) from None
    for name, arm in config.arms.items():
        _check_arm(path, name, arm)
    run_file, base = _base(path, config)
    try:
        probe = run_config(run_file, base | _probe(config))
    except InputError as error:
        key = error.where.removeprefix(f"{run_file}: ")
        wrong = blamed_setting(config.settings, key, error.problem)
        if wrong is None:
            raise
        raise InputError(f"{path}: settings.{wrong}", error.problem, error.remedy) from None
    for key, value, problem in (
        (
            "batch.ramp",
            probe.batch.ramp,
            "a ramp would begin again in every stage of an arm, so that arms would train on "
            "different numbers of tokens",
        ),
        ("checkpoint.end_after", probe.checkpoint.end_after, END_AFTER),
    ):
        if value is not None:
            section = key.split(".")[0]
            of_sweep = [each for each in config.settings if each.split(".")[0] == section]
            raise InputError(
                f"{path}: settings.{of_sweep[0]}" if of_sweep else f"{run_file}: {key}",
                problem,
                f"leave {key} out",
            )
    high = _group(f"{path}: high", probe, config.high)
    low = _group(f"{path}: low", probe, config.low)
    if both := [task for task in high if task in low]:
        raise InputError(f"{path}: low", f"{both[0]} is also in high", "remove it from one")
    if config.primary is not None:
        _check_primary(f"{path}: primary", config, config.primary, [*high, *low])
    # Paths become absolute; tasks of neither group are left out.
    for task in (*high, *low):
        probe.corpus(task)  # raises InputError for a number of tokens in place of text
    base = with_absolute_paths(base, probe)
    base["tasks"] = {name: each for name, each in base["tasks"].items() if name in (*high, *low)}
    probe = run_config(run_file, base | _probe(config))
    if config.translation and not any(task.kind == "translation" for task in probe.tasks.values()):
        raise InputError(
            f"{path}: translation", "there is no translation task", "leave it out, or add one"
        )
    corpora = verified_corpora(probe)
    tokenizer = Tokenizer.load(probe.tokenizer)
    spec = plan_spec(probe, tokenizer, corpora=corpora)
    inputs = {f"the corpus of {t}": corpora[probe.corpus(t)].fingerprint for t in probe.tasks}
    test_samples = probe.test.samples if probe.tested_tasks() else None
    batch, samples = probe.phase_batch(0), -(-(config.tokens or 0) // probe.model.seq_len)
    steps = config.steps or batch.schedule(0).steps_for(samples)
    return Sweep(
        file=path,
        config=config,
        base=base,
        output=config.output,
        high=high,
        low=low,
        tokens={task: stream.tokens for task, stream in spec.streams.items()},
        inputs={"the tokenizer": tokenizer.fingerprint, **inputs},
        steps=steps,
        test_samples=test_samples,
        warnings=check_test_split(path, probe, spec.test, low),
    )


def _base(path: Path, config: SweepConfig) -> tuple[Path, dict[str, Any]]:
    """Return the run file and its content, without the keys that differ between runs."""
    if isinstance(config.run, dict):
        run_file, data = path, config.run
    else:
        run_file = config.run
        data = read_yaml(run_file)
    base = {key: copy.deepcopy(value) for key, value in data.items() if key not in OWN_KEYS}
    set_all(path, "settings", run_file, base, config.settings)
    if config.test is not None:
        base["test"] = config.test.model_dump()
    return run_file, base


def blamed_setting(names: Iterable[str], key: str, problem: str) -> str | None:
    """Return which of these settings, named by key path, is the wrong key of a run file, or None.

    problem: of the error, which names an unknown key.
    """
    for name in names:
        parent, _, last = name.rpartition(".")
        if key == name or key.startswith((f"{name}.", f"{name}[")):
            return name
        if key == parent and shown(last) in problem:
            return name
    return None


def set_all(
    path: Path, key: str, run_file: Path, run: dict[str, Any], settings: Mapping[str, Any]
) -> None:
    """Set values in the content of a run file; `key` is their key in the sweep file."""
    for name, value in settings.items():
        where = f"{path}: {key}.{name}"
        if name.split(".")[0].split("[")[0] in OWN_KEYS:
            raise InputError(where, "the sweep sets this", "leave it out")
        set_value(run_file, run, name, copy.deepcopy(value), where)


def _probe(config: SweepConfig) -> dict[str, Any]:
    """Make a phase, so that the rest of the run file can be checked and its corpora opened."""
    phase = {
        "name": "any",
        "steps": 1,
        "mixture": {"proportional": True},
        "learning_rate": {"peak": config.learning_rate.peaks[0]},
    }
    return {"seed": config.seeds[0], "output": str(config.output), "phases": [phase]}


def _kind(path: Path, name: str, arm: Arm) -> Kind:
    if arm.phases:
        return PHASES
    kind = arm.kind or name
    if kind not in KINDS:
        raise InputError(
            f"{path}: arms.{name}",
            f"{name!r} is not a kind of arm",
            f"add kind: {', '.join(KINDS)}; or phases",
        )
    return kind


def _check_arm(path: Path, name: str, arm: Arm) -> None:
    """Reject keys that do not apply to the arm's kind, and require those that it needs."""
    where, kind = f"{path}: arms.{name}", _kind(path, name, arm)
    if name == PRETRAIN:
        raise InputError(where, "is the name of first stages that arms share", "give it another")
    if kind == PHASES:
        return
    if kind == "low-only" and (arm.rates or arm.temperatures):
        raise InputError(where, "low-only has no rates nor temperatures", "leave them out")
    if kind != "low-only" and not (arm.rates or arm.temperatures):
        raise InputError(where, f"{kind} needs rates or temperatures", "add some")
    if (kind in STAGED) != bool(arm.pretrain):
        problem = "has no first stage" if arm.pretrain else "needs shares of the budget for it"
        raise InputError(
            f"{where}.pretrain", f"{kind} {problem}", "leave it out" if arm.pretrain else "add some"
        )
    if kind == "regularized" and arm.is_plain:
        raise InputError(
            where,
            "regularized is like static without settings or early_stopping",
            "add, for example, settings: {model.dropout: 0.1}",
        )


def _check_primary(
    where: str, config: SweepConfig, primary: PrimaryContrast, tasks: list[str]
) -> None:
    """Reject names that the sweep does not have."""
    for key, name, names, what in (
        ("arm", primary.arm, config.arms, "arm"),
        *(("against", arm, config.arms, "arm") for arm in primary.against),
        ("loss", primary.loss, [*GROUP_LOSSES, *tasks], "loss"),
        ("model", primary.model, [None, *config.models], "model"),
    ):
        if name not in names:
            known = [each for each in names if each is not None]
            raise InputError(
                f"{where}.{key}",
                f"no {what} {shown(name)}",
                hint(str(name), known, f"the {what}{'es' if what == 'loss' else 's'} are")
                if known
                else "leave it out",
            )
    if primary.arm in primary.against:
        raise InputError(
            f"{where}.against", f"{primary.arm} is compared with itself", "name another arm"
        )


def _group(where: str, probe: RunConfig, selection: str | list[str]) -> list[str]:
    """Return the tasks of a role or of a list of names."""
    tasks = probe.selected_tasks(selection)
    if not tasks:
        raise InputError(where, f"no task has the role {shown(selection)}", "list the tasks")
    for task in tasks:
        if task not in probe.tasks:
            raise InputError(
                where, f"no task {shown(task)}", hint(task, probe.tasks, "the tasks are")
            )
    return list(tasks)
