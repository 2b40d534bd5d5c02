"""The numbers a report is about: losses at each phase's ends, and what the switch has changed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megaphase.experiments.runs import RunRecord, ValidationRow

SAME_LOSS_NATS = 0.005  # a difference that two decimals do not show is none
RISING_NATS = 0.01  # above its best by more than this, a loss has risen again


@dataclass(frozen=True)
class PhaseLoss:
    """One task's validation losses (nats per token) within one phase.

    `end` is the newest measurement while the phase still goes on (`complete` is False).
    Bits per byte are of the same two measurements.
    """

    task: str
    low_resource: bool
    phase: str
    complete: bool
    start: float
    end: float
    best: float
    best_step: int
    start_bits_per_byte: float
    end_bits_per_byte: float


@dataclass(frozen=True)
class Verdict:
    """What has become of one task between the first switch and the run's newest measurement.

    `change` is in nats, below 0 when better; NaN while there is nothing to compare.
    """

    task: str
    low_resource: bool
    change: float
    text: str


@dataclass(frozen=True)
class PhaseSpeed:
    """How fast one phase trained: medians over its steps, sums over all of them."""

    phase: str
    steps: int
    tokens: int
    seconds: float
    step_seconds: float
    tokens_per_second: float
    mfu: float | None


def final_losses(run: RunRecord) -> list[PhaseLoss]:
    """Losses of every validated task at the start, the end and the best point of each phase.

    Ordered by phase, then high-resource before low-resource tasks, in the plan's order.
    """
    return [
        row
        for phase in run.plan.phases
        for task in ordered_tasks(run)
        if (row := _phase_loss(run, phase.name, task)) is not None
    ]


def ordered_tasks(run: RunRecord) -> list[str]:
    """The run's tasks, high-resource ones first."""
    return sorted(run.tasks, key=lambda task: task in run.low_resource_tasks)


def _phase_loss(run: RunRecord, phase: str, task: str) -> PhaseLoss | None:
    rows = [row for row in run.validation_in(phase) if task in row.loss]
    if not rows:
        return None
    best = lowest(rows, task)
    return PhaseLoss(
        task=task,
        low_resource=task in run.low_resource_tasks,
        phase=phase,
        complete=run.phase_is_over(phase),
        start=rows[0].loss[task],
        end=rows[-1].loss[task],
        best=best.loss[task],
        best_step=best.step,
        start_bits_per_byte=rows[0].bits_per_byte[task],
        end_bits_per_byte=rows[-1].bits_per_byte[task],
    )


def lowest(rows: Sequence[ValidationRow], task: str) -> ValidationRow:
    """The row with the task's lowest loss; one that is not a number is never the lowest."""
    return min(rows, key=lambda row: (math.isnan(row.loss[task]), row.loss[task]))


def verdicts(run: RunRecord) -> list[str]:
    """The verdict as sentences: one per low-resource task, then one on the high-resource ones.

    A run of a single phase, or one before its switch, is told from its start.
    """
    found = task_verdicts(run)
    sentences = [v.text for v in found if v.low_resource]
    high = [v.text for v in found if not v.low_resource]
    if high:
        sentences.append(high_resource_sentence(run, high))
    return sentences


def high_resource_sentence(run: RunRecord, texts: Sequence[str]) -> str:
    """Join the high-resource tasks' verdicts; without any low-resource task, name no group."""
    joined = "; ".join(texts)
    return f"High-resource: {joined}" if run.low_resource_tasks else joined


def task_verdicts(run: RunRecord) -> list[Verdict]:
    """One verdict per validated task, low-resource tasks first."""
    tasks = sorted(run.tasks, key=lambda task: task not in run.low_resource_tasks)
    return [v for task in tasks if (v := _task_verdict(run, task)) is not None]


def _task_verdict(run: RunRecord, task: str) -> Verdict | None:
    phases = [p.name for p in run.phases_begun]
    losses = [loss for name in phases if (loss := _phase_loss(run, name, task)) is not None]
    if not losses:
        return None
    low = task in run.low_resource_tasks
    first, last = losses[0], losses[-1]
    if len(losses) == 1 and len(run.plan.phases) > 1:
        text = f"{task}: {_nats(last.end)} {_moment(run, last)}; the switch has not been reached"
        return Verdict(task, low, math.nan, text)
    if len(losses) == 1:
        before, bits, when = first.start, first.start_bits_per_byte, "at the start"
    else:
        before, bits = first.end, first.end_bits_per_byte
        when = "at the switch" if len(losses) == 2 else "at the first switch"
    change = last.end - before
    text = (
        f"{task}: {_nats(before)} {when}, {_nats(last.end)} {_moment(run, last)}: "
        f"{describe_change(change)} "
        f"(bits per byte {_nats(bits)} → {_nats(last.end_bits_per_byte)})"
    )
    if last.end - last.best > RISING_NATS:
        text += f"; it had been at {_nats(last.best)} at step {last.best_step:,} and rose again"
    return Verdict(task, low, change, text)


def _moment(run: RunRecord, loss: PhaseLoss) -> str:
    if loss.complete:
        return f"at the end of {loss.phase}"
    return f"at step {run.validation_in(loss.phase)[-1].step:,}, with {loss.phase} still going"


def _nats(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "not a number"


def describe_change(change: float) -> str:
    """A difference of losses in words: `better by 0.51 nats`, `worse by …`, `unchanged`."""
    if not math.isfinite(change):
        return "the run has diverged"
    if abs(change) < SAME_LOSS_NATS:
        return "unchanged"
    return f"{'better' if change < 0 else 'worse'} by {abs(change):.2f} nats"


def phase_speeds(run: RunRecord) -> list[PhaseSpeed]:
    """Throughput of each phase that has training rows."""
    speeds = []
    tokens_before = 0
    for phase in run.plan.phases:
        rows = [row for row in run.training if row.phase == phase.name]
        if not rows:
            continue
        mfu = [row.mfu for row in rows if row.mfu is not None]
        speeds.append(
            PhaseSpeed(
                phase=phase.name,
                steps=len(rows),
                tokens=rows[-1].tokens - tokens_before,
                seconds=sum(row.step_seconds for row in rows),
                step_seconds=statistics.median(row.step_seconds for row in rows),
                tokens_per_second=statistics.median(row.tokens_per_second for row in rows),
                mfu=statistics.median(mfu) if mfu else None,
            )
        )
        tokens_before = rows[-1].tokens
    return speeds
