"""The numbers a report is about: losses at each phase's ends, and what the switch has changed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megaphase.report.incidents import divergences
from megaphase.report.runs import PhasePlan, RunRecord

SAME_LOSS_NATS = 0.005  # a difference that two decimals do not show is none
RISING_NATS = 0.03  # above its best by more than this, a loss has risen again
# A training loss so far above where the comparison begins, for so many steps, has diverged.
DIVERGED_NATS, DIVERGED_STEPS = 1.0, 10


@dataclass(frozen=True)
class PhaseLoss:
    """One task's validation losses (nats per token) within one phase.

    `end` is the newest measurement while the phase still goes on (`complete` is False); its step
    is `end_step`. Bits per byte are of the measurements at `start` and `end`; `end_gap` is how far
    that at `end` is above the training loss, None where the task was not trained on before it.
    """

    phase: str
    task: str
    low_resource: bool
    complete: bool
    start: float
    end: float
    end_step: int
    best: float
    best_step: int
    start_bits_per_byte: float
    end_bits_per_byte: float
    end_gap: float | None


@dataclass(frozen=True)
class LossChange:
    """What has become of one task since the first switch, or since the start without a switch.

    `change` is in nats, below 0 when better; None while the first switch is still to come. `rose`:
    whether its training loss has been far above in between.
    """

    task: str
    low_resource: bool
    change: float | None
    sentence: str
    rose: bool = False

    @property
    def outcome(self) -> Literal["better", "worse", "same"]:
        """The change in one word; worse where the loss is no number, or only rose and fell back."""
        if self.change is None or abs(self.change) < SAME_LOSS_NATS:
            return "worse" if self.rose else "same"
        return "better" if self.change < 0 else "worse"


def final_losses(run: RunRecord) -> list[PhaseLoss]:
    """Losses of every validated task at the start, the end and the best point of each phase.

    Ordered by phase, then as `run.tasks`.
    """
    return [
        loss
        for phase in run.plan.phases
        for task in run.tasks
        if (loss := _phase_loss(run, phase, task)) is not None
    ]


def _phase_loss(run: RunRecord, phase: PhasePlan, task: str) -> PhaseLoss | None:
    rows = [
        (row.step, row.validation[task])
        for row in run.validation_in(phase.name)
        if task in row.validation
    ]
    if not rows:
        return None
    (_, start), (end_step, end) = rows[0], rows[-1]
    # NaN compares false with everything, so it must be kept from being the lowest.
    best_step, best = min(rows, key=lambda row: (math.isnan(row[1].loss), row[1].loss))
    return PhaseLoss(
        phase=phase.name,
        task=task,
        low_resource=task in run.low_resource_tasks,
        complete=run.phase_is_over(phase),
        start=start.loss,
        end=end.loss,
        end_step=end_step,
        best=best.loss,
        best_step=best_step,
        start_bits_per_byte=start.bits_per_byte,
        end_bits_per_byte=end.bits_per_byte,
        end_gap=end.gap,
    )


def newest_losses(run: RunRecord) -> dict[str, PhaseLoss]:
    """The losses of every validated task in the last phase in which it was measured."""
    return {loss.task: loss for loss in final_losses(run)}


def verdicts(run: RunRecord) -> list[str]:
    """One sentence for every validated task, the low-resource ones first."""
    return [f"{verdict.task}: {verdict.sentence}" for verdict in task_verdicts(run)]


def task_verdicts(run: RunRecord) -> list[LossChange]:
    """One verdict for every validated task, the low-resource ones first."""
    by_task: dict[str, list[PhaseLoss]] = {}
    for loss in final_losses(run):
        by_task.setdefault(loss.task, []).append(loss)
    found = [_verdict(run, losses) for losses in by_task.values()]
    return sorted(found, key=lambda verdict: not verdict.low_resource)


def _verdict(run: RunRecord, losses: list[PhaseLoss]) -> LossChange:
    """`losses` are those of one task, phase by phase."""
    last = losses[-1]
    task, low = last.task, last.low_resource
    now = f"at the end of {last.phase}"
    if not last.complete:
        now = f"at step {last.end_step:,}, before the end of {last.phase}"
    # The switch to the first phase of a branch has come.
    first_phase = None if run.origin.step else run.plan.phases[0].name
    if last.phase == first_phase and len(run.plan.phases) > 1:
        rise = _rise(run, losses[0])
        sentence = f"{last.end:.2f} {now}; the switch is still to come{_rise_sentence(rise)}"
        return LossChange(task, low, None, sentence, rise is not None)
    since = next((loss for loss in losses if loss.phase != first_phase), last)
    before = "at the start" if since.phase == first_phase else f"at the switch to {since.phase}"
    change = last.end - since.start
    rise = _rise(run, since)
    unchanged = abs(change) < SAME_LOSS_NATS
    sentence = (
        f"{since.start:.2f} {before}, {last.end:.2f} {now}: "
        f"{'no better' if rise and unchanged else describe_change(change)} "
        f"(bits per byte {since.start_bits_per_byte:.2f} → {last.end_bits_per_byte:.2f})"
    )
    if min(last.start, last.end) - last.best > RISING_NATS:
        sentence += f"; it had been at {last.best:.2f} at step {last.best_step:,} and rose again"
    return LossChange(task, low, change, sentence + _rise_sentence(rise), rise is not None)


def _rise(run: RunRecord, since: PhaseLoss) -> tuple[float, int] | None:
    """The highest training loss of a task since a phase's start and its step, if it has diverged.

    Where an event says that the run has, fewer steps tell.
    """
    begin = run.phase_start(since.phase) or 0
    rows = [(row.loss_by_task.get(since.task), row.step) for row in run.training]
    seen = [(loss, step) for loss, step in rows if loss is not None and step > begin]
    events = [each for each in divergences(run) if each.kind != "gradient_norm"]
    told = run.ended_diverged is not None or any(event.step > begin for event in events)
    needed = 1 if told else DIVERGED_STEPS
    highest: tuple[float, int] | None = None
    stretch: list[tuple[float, int]] = []
    for loss, step in seen:
        stretch = [*stretch, (loss, step)] if loss > since.start + DIVERGED_NATS else []
        if len(stretch) >= needed:
            highest = max(stretch) if highest is None else max(highest, *stretch)
    return highest


def _rise_sentence(rise: tuple[float, int] | None) -> str:
    return "" if rise is None else f"; its training loss rose to {rise[0]:,.2f} at step {rise[1]:,}"


def describe_change(change: float) -> str:
    """A difference of losses in words: `better by 0.51 nats`, `worse by …`, `unchanged`."""
    if not math.isfinite(change):
        return "the loss is not finite, the run has diverged"
    if abs(change) < SAME_LOSS_NATS:
        return "unchanged"
    return f"{'better' if change < 0 else 'worse'} by {abs(change):.2f} nats"
