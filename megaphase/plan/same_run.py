"""Check whether a run directory belongs to a run file, by the records from the run's start."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megaphase.checkpoint.names import newest_state, permanent_ends
from megaphase.config.run import RunConfig
from megaphase.utils.errors import InputError
from megaphase.utils.files import read_hashed_json
from megaphase.utils.run_files import PLAN_FILE, RUN_FILE

# Sections that may change between two starts of one run: its results do not depend on them, apart
# from rounding. The paths of corpora and tokenizer may change, but not their content, which the
# plan's fingerprint verifies, as it does the token that `bos` means.
FREE_SECTIONS = (
    "output",
    "checkpoint",
    "logging",
    "tokenizer",
    "bos",
    "parallel",
    "faults",
    "hardware",
    "parts",
    "deterministic",
)
FREE_KEYS = {
    "batch": ("micro",),
    "model": ("activation_checkpointing",),
    "test": ("samples",),
    "validation": ("harness",),
}
FREE_TASK_KEYS = ("corpus",)
FREE_AVERAGE_KEYS = ("device",)  # of a phase
FREE_BATCH_KEYS = ("micro",)  # of a phase

_LENGTH_OF_PHASE = re.compile(r"phases\[(\d+)\]\.(?:steps|tokens|epochs.*)")


def refuse_other_run(run_dir: Path, config: RunConfig) -> None:
    """Raise InputError, naming the first key, if another run file started this directory, or the
    same one with its tasks in another order."""
    path = run_dir / RUN_FILE
    if not path.exists():
        return
    began = _identity(_with_defaults(_read(path)))
    now = _identity(settings_of(config))
    difference = _first_difference("", began, now)
    if difference is not None:
        key, old, new = difference
        remedy = "put the old value back or choose another output"
        if key == "phases":  # another number of them
            old, new = f"{len(old)} phases", f"{len(new)} phases"
        raise InputError(
            config.where(key),
            f"is {_show(new)}, but the run in {run_dir} began with {_show(old)}",
            _remedy_for_more(run_dir, key, began["phases"]) or remedy,
        )
    order, now_order = list(began["tasks"]), list(now["tasks"])
    if order != now_order:  # on which the blend depends
        raise InputError(
            config.where("tasks"),
            f"are in the order {', '.join(now_order)}, but the run in {run_dir} began with the "
            f"order {', '.join(order)}",
            "put them into that order or choose another output",
        )


def _remedy_for_more(run_dir: Path, key: str, began: list[dict[str, Any]]) -> str | None:
    """Return how to train a run on after a phase that has ended, where its length or the number of
    phases was changed; None if no phase that is meant has ended."""
    match = _LENGTH_OF_PHASE.fullmatch(key)
    number = int(match[1]) if match else -1 if key == "phases" else None
    ends = permanent_ends(run_dir)
    if number is None or (name := began[number]["name"]) not in ends:
        return None
    return (
        f"put the old value back; to train on from the end of {name}, write the phases that "
        "follow, with names of their own, into a run file with another output, and start it with "
        f"--from {run_dir}@{name}"
    )


def refuse_other_plan(run_dir: Path, config: RunConfig, fingerprint: str, bos: int | None) -> None:
    """Raise InputError if the run in this directory has another plan, which means another BOS or
    other corpora, since its run file is the same."""
    known = plan_of_run(run_dir)
    if known not in (None, fingerprint):
        path = run_dir / PLAN_FILE
        began = _read(path).get("bos") if path.exists() else bos
        if began != bos:
            # An earlier version had no BOS, whatever the tokenizer's files say.
            raise InputError(
                config.where("bos"),
                f"documents begin with {bos_in_words(bos)}, but in the run in {run_dir} with "
                f"{bos_in_words(began)}",
                f"write bos: {'false' if began is None else 'true'}",
            )
        raise InputError(
            config.where("tasks"),
            f"the corpora are not those with which the run in {run_dir} began",
            "put the old ones back or choose another output",
        )


def bos_in_words(bos: int | None) -> str:
    """Return the token with which documents begin in words."""
    return "no BOS" if bos is None else f"BOS {bos}"


def refuse_other_counts(run_dir: Path, plan: Mapping[str, Any]) -> None:
    """Raise InputError if the run's plan had other counts of samples than `plan`, its summary.

    An earlier version read max_epochs as a binary number, which may be one sample less; without its
    index, such a plan cannot be built again.
    """
    path = run_dir / PLAN_FILE
    if path.exists() and _counts(_read(path)) != _counts(plan):
        raise InputError(
            path,
            "has other counts of samples than the plan that this version builds",
            f"put back {run_dir / 'plan'}, or choose another output",
        )


def _counts(plan: Mapping[str, Any]) -> list[dict[str, int]]:
    """Return the samples of every phase by task, from `Plan.summary()`."""
    try:
        return [
            {task: figures["samples"] for task, figures in phase["tasks"].items()}
            for phase in plan.get("phases", [])
        ]
    except (KeyError, TypeError, AttributeError):
        return []


def plan_of_run(run_dir: Path) -> str | None:
    """Return the fingerprint of the plan of the run in this directory; None if none has begun."""
    path = run_dir / PLAN_FILE
    if path.exists():
        return str(_read(path).get("fingerprint"))
    return (newest_state(run_dir) or {}).get("plan")


def _read(path: Path) -> dict[str, Any]:
    try:
        value = read_hashed_json(path)
        if not isinstance(value, dict):
            raise ValueError
        return value
    except (OSError, ValueError):
        raise InputError(
            path, "is missing or damaged", "choose another output or restore the file"
        ) from None


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Return the content of `run.json` for a run file."""
    return config.model_dump(mode="json", exclude_none=True)


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Add the defaults of keys that an earlier version did not have."""
    try:
        return settings_of(RunConfig.model_validate(settings))
    except ValidationError:
        return settings


def _identity(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a resolved run file that determines the run's results."""
    kept = {key: value for key, value in settings.items() if key not in FREE_SECTIONS}
    # First, since the other keys depend on it; AdamW's is not in run.json.
    kept["optimizer"] = {"name": "adamw"} | settings.get("optimizer", {})
    for section, free in FREE_KEYS.items():
        kept[section] = _without(free, settings.get(section, {}))
    tasks = settings.get("tasks", {})
    kept["tasks"] = {name: _without(FREE_TASK_KEYS, task) for name, task in tasks.items()}
    kept["phases"] = [_phase_identity(phase) for phase in settings.get("phases", [])]
    return kept


def _phase_identity(phase: dict[str, Any]) -> dict[str, Any]:
    """A phase without its free keys; without its batch, if that has no others."""
    if "average" in phase:
        phase = phase | {"average": _without(FREE_AVERAGE_KEYS, phase["average"])}
    batch = _without(FREE_BATCH_KEYS, phase.get("batch") or {})
    return _without(("batch",), phase) | ({"batch": batch} if batch else {})


def _without(keys: Iterable[str], section: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in keys}


def _first_difference(key: str, old: Any, new: Any) -> tuple[str, Any, Any] | None:
    """Return the path of the first difference between two JSON values, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [
            (f"{key}.{k}" if key else k, old.get(k), new.get(k))
            for k in dict.fromkeys([*old, *new])
        ]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{key}[{i}]", a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        return None if old == new else (key, old, new)
    return next(filter(None, (_first_difference(*pair) for pair in pairs)), None)


def _show(value: Any) -> str:
    if value is None:
        return "missing"
    return str(value) if not isinstance(value, dict | list) else json.dumps(value)
