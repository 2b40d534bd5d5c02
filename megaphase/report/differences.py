"""The settings in which several runs differ: their origins, phases, and other keys of the run file.

Phases are compared in their order: the first ones side by side, then the second ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megaphase.report.runs import PhasePlan, RunRecord

NONE = "–"
FIRST_WEIGHTS = "its own first weights"
NAMELESS = ("output",)  # keys in which any two runs differ
SHOWN_OTHERWISE = ("name", "steps", "tokens", "epochs", "mixture")  # of a phase
SCHEDULE = ("schedule", "peak", "final", "warmup_steps")  # the keys of a schedule's summary


@dataclass(frozen=True)
class Difference:
    """A setting in which runs differ; `values` has one text for each run."""

    setting: str
    values: Sequence[str]


def differences(runs: Sequence[RunRecord]) -> list[Difference]:
    """Return what differs between runs: where they start, then phase by phase, then the rest."""
    rows = [("starts from", [run.origin.source or FIRST_WEIGHTS for run in runs])]
    for number in range(max(len(run.plan.phases) for run in runs)):
        phases = [
            run.plan.phases[number] if number < len(run.plan.phases) else None for run in runs
        ]
        rows += _phase_rows(f"phase {number + 1}", runs, phases)
    rows += _key_rows("", [_without(run.settings, ("phases", *NAMELESS)) for run in runs])
    return [Difference(setting, values) for setting, values in rows if len(set(values)) > 1]


def tokenizers_differ(runs: Sequence[RunRecord]) -> bool:
    """Return whether runs have different tokenizers, so that only bits per byte can be compared.

    Copies of a tokenizer in several folders are the same if every corpus that runs share has as
    many tokens with each of them.
    """
    paths = {str(run.settings.get("tokenizer")) for run in runs}
    sizes: dict[str, set[tuple[int, int]]] = {}
    for run in runs:
        for task, corpus in run.plan.tasks.items():
            sizes.setdefault(task, set()).add((corpus.tokens, corpus.text_bytes))
    return len(paths) > 1 and any(len(found) > 1 for found in sizes.values())


def _phase_rows(
    title: str, runs: Sequence[RunRecord], phases: Sequence[PhasePlan | None]
) -> Iterator[tuple[str, list[str]]]:
    sections = [_section(run, phase) for run, phase in zip(runs, phases, strict=True)]
    rates = [section.get("learning_rate") or {} for section in sections]
    yield title, [NONE if p is None else f"{p.name}: {p.steps:,} steps" for p in phases]
    yield f"{title}, tokens", [NONE if p is None else f"{p.tokens:,}" for p in phases]
    yield f"{title}, rates", [NONE if p is None else _rates(p) for p in phases]
    yield f"{title}, learning rate", [_schedule(rate) for rate in rates]
    # A phase that a run lacks differs in every key: the rows above say that once.
    there = [section for section, phase in zip(sections, phases, strict=True) if phase is not None]
    others = [
        _without(section, SHOWN_OTHERWISE)
        | {"learning_rate": _without(section.get("learning_rate") or {}, SCHEDULE)}
        for section in there
    ]
    for key, values in _key_rows("", others):
        found = iter(values)
        texts = [NONE if phase is None else next(found) for phase in phases]
        if len(set(values)) > 1:
            yield f"{title}, {key}", texts


def _section(run: RunRecord, phase: PhasePlan | None) -> Mapping[str, Any]:
    """Return a phase's section of the run file; empty if it is not known."""
    phases = run.settings.get("phases")
    for section in phases if isinstance(phases, list) else []:
        if phase is not None and isinstance(section, dict) and section.get("name") == phase.name:
            return section
    return {}


def _rates(phase: PhasePlan) -> str:
    """Return the effective rates, those of the whole phase if they change, largest first."""
    shares = sorted(phase.tasks.items(), key=lambda each: -each[1].rate)
    text = ", ".join(f"{task}\u00a0{share.rate:.1%}" for task, share in shares if share.rate)
    return text if phase.rates_over_steps is None else f"{text} (means of rates that change)"


def _schedule(rate: Mapping[str, Any]) -> str:
    """Return `cosine, peak 0.003, final 0.0003, warmup_steps 20`."""
    parts = [
        str(rate[key]) if key == "schedule" else f"{key} {_text(rate[key])}"
        for key in SCHEDULE
        if rate.get(key) is not None
    ]
    return ", ".join(parts) or NONE


def _key_rows(
    prefix: str, sections: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, list[str]]]:
    """Yield the keys of nested mappings, and the text of each one's value."""
    flat = [dict(_leaves(prefix, section)) for section in sections]
    for key in dict.fromkeys(key for each in flat for key in each):
        yield key, [_text(each[key]) if key in each else NONE for each in flat]


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _leaves(f"{path}.{key}" if path else str(key), each)
    elif value is not None:
        yield path, value


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return str(value)


def _without(section: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in keys}
