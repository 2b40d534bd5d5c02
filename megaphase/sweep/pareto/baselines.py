"""Which arms are baselines: they train on all tasks and differ from the method in the order alone.

Static mixtures of every kind and restarts of them. An arm with settings, early stopping or a budget
of its own differs in more, and is compared with the baselines instead; but a sweep whose static
arms all have settings has these for baselines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megaphase.sweep.arms.run_files import USUAL_KEYS
from megaphase.sweep.directory import SweepRecord


def is_baseline(record: SweepRecord, name: str) -> bool:
    """Return whether an arm never changes its mixture, which is of all tasks, nor anything else.

    For an arm of `phases`, as far as its last phases are known.
    """
    sweep = record.sweep
    kind, arm = sweep.kind(name), sweep.config.arms[name]
    if kind == "static":
        return True
    if not arm.is_plain:
        return False
    if kind != "phases":
        return kind == "restart"
    if any("settings" in phase for phase in arm.phases):
        return False
    tasks = [*sweep.high, *sweep.low]
    finals = [trial for trial in record.trials if trial.arm == name and trial.is_final]
    return bool(finals) and all(
        _is_one_mixture([phase["mixture"] for phase in trial.phases], tasks)
        and all(phase.keys() <= USUAL_KEYS for phase in trial.phases)
        for trial in finals
    )


def _is_one_mixture(mixtures: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> bool:
    first = mixtures[0]
    if any(mixture != first for mixture in mixtures) or _is_curve(first.get("temperature")):
        return False
    if "rates" not in first:
        return "over" not in first
    rates = first["rates"]
    return all(rates.get(task) and not _is_curve(rates[task]) for task in tasks)


def _is_curve(value: Any) -> bool:
    """Return whether a rate or temperature changes within the phase."""
    return isinstance(value, Mapping)
