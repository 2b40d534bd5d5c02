"""The numbers of a report: losses at the ends of each phase, and the change since a switch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from megaphase.report.incidents import divergences
from megaphase.report.runs import PhasePlan, RunRecord

SAME_LOSS_NATS = 0.005  # a difference that two decimals do not show
RISING_NATS = 0.03  # a loss this far above its best has risen again
# A training loss this far above that at the start of the comparison, for this many steps, diverged.
DIVERGED_NATS, DIVERGED_STEPS = 1.0, 10


@dataclass(frozen=True)
class PhaseLoss:
    """One task's validation losses (nats per token) within one phase.

    `end` is the newest measurement, at step `end_step`, if the phase is not over (`complete` is
    False). Bits per byte are those at `start` and `end`; `end_gap` is the difference of `end` to
    the training loss, None if the task was not trained on before it.
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
    """The change of one task since the switch at which it entered the mixture, or since the first
    switch if the first phase trains on it or none does; since the start without a switch.

    `change` is in nats, below 0 if better; None before the first switch. `rose`: whether its
    training loss was far higher in between. `group`: see `RunRecord.group_of`.
    """

    task: str
    low_resource: bool
    change: float | None
    sentence: str
    rose: bool = False
    group: str | None = None

    @property
    def outcome(self) -> Literal["better", "worse", "same"]:
        """The change in one word; worse if the loss is not a number, or only rose and fell back."""
        if self.change is None or abs(self.change) < SAME_LOSS_NATS:
            return "worse" if self.rose else "same"
        return "better" if self.change < 0 else "worse"


def final_losses(run: RunRecord) -> list[PhaseLoss]:
    """Return every validated task's losses at the start, the end and the best point of each phase.

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
    # NaN is never smaller or greater, so it must be excluded from the minimum.
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
    """Return the losses of every validated task in the last phase in which it was measured."""
    return {loss.task: loss for loss in final_losses(run)}


def verdicts(run: RunRecord) -> list[str]:
    """Return one sentence for every validated task, the low-resource ones first."""
    return [f"{verdict.task}: {verdict.sentence}" for verdict in task_verdicts(run)]


def task_verdicts(run: RunRecord) -> list[LossChange]:
    """Return one verdict for every validated task, the low-resource ones first."""
    by_task: dict[str, list[PhaseLoss]] = {}
    for loss in final_losses(run):
        by_task.setdefault(loss.task, []).append(loss)
    found = [
        replace(_verdict(run, losses), group=run.group_of(task)) for task, losses in by_task.items()
    ]
    return sorted(found, key=lambda verdict: not verdict.low_resource)


def _verdict(run: RunRecord, losses: list[PhaseLoss]) -> LossChange:
    """Return the verdict on one task; `losses`: its losses in each phase."""
    last = losses[-1]
    task, low = last.task, last.low_resource
    now = f"at the end of {last.phase}"
    if not last.complete:
        now = f"at step {last.end_step:,}, before the end of {last.phase}"
    # A branch starts after the switch to its first phase.
    first_phase = None if run.origin.step else run.plan.phases[0].name
    if last.phase == first_phase and len(run.plan.phases) > 1:
        rise = _rise(run, losses[0])
        sentence = f"{last.end:.2f} {now}; the switch is still to come{_rise_sentence(rise)}"
        return LossChange(task, low, None, sentence, rise is not None)
    since = _baseline(run, losses, first_phase)
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
    sentence += _other_model_sentence(run, since, last)
    return LossChange(task, low, change, sentence + _rise_sentence(rise), rise is not None)


def _baseline(run: RunRecord, losses: list[PhaseLoss], first_phase: str | None) -> PhaseLoss:
    """Return the losses in the phase with whose start a task's newest loss is compared.

    first_phase: the name of a phase with whose start nothing is compared after the first switch.
    """
    later = [loss for loss in losses if loss.phase != first_phase]
    if not later:
        return losses[-1]
    task, phases = losses[0].task, {phase.name: phase for phase in run.plan.phases}

    def is_trained_in(name: str) -> bool:
        share = phases[name].tasks.get(task)
        return share is not None and share.samples > 0

    if run.origin.used.get(task) or (first_phase is not None and is_trained_in(first_phase)):
        return later[0]
    return next((loss for loss in later if is_trained_in(loss.phase)), later[0])


def _other_model_sentence(run: RunRecord, since: PhaseLoss, last: PhaseLoss) -> str:
    """Say that two losses are measured with other sequence lengths or positions, and give the loss
    from which the newest one changed with the same model."""
    phases = run.phases_begun
    names = [phase.name for phase in phases]
    models = [run.model_of(phase) for phase in phases]
    newest, end = models[names.index(last.phase)], names.index(last.phase)
    if models[names.index(since.phase)] == newest:
        return ""
    # The validation that begins a phase is measured with the phase's model.
    first = end
    while models[first - 1] == newest:
        first -= 1
    begun = next(
        loss
        for loss in final_losses(run)
        if loss.task == last.task and loss.phase in names[first : end + 1]
    )
    before, now = models[names.index(since.phase)]["seq_len"], newest["seq_len"]
    what = "other positions" if before == now else f"seq_len {before:,}, the second with {now:,}"
    return (
        f"; the first is measured with {what}: with the model of {last.phase} it was "
        f"{begun.start:.2f} at the start of {begun.phase}, since then "
        f"{describe_change(last.end - begun.start)}"
    )


def lengths_note(runs: Sequence[RunRecord]) -> str | None:
    """Return a sentence if the newest losses of runs, or the losses of the phases of a single one,
    are measured with several sequence lengths; else None."""
    if len(runs) == 1:
        by_name = [(phase.name, runs[0].model_of(phase)) for phase in runs[0].phases_begun]
    else:
        by_name = [(run.name, run.model_of(run.phases_begun[-1])) for run in runs]
    lengths: dict[int | None, list[str]] = {}
    for name, model in by_name:
        lengths.setdefault(model["seq_len"], []).append(name)
    if len(lengths) > 1:
        listed = "; ".join(
            f"{length or 0:,} in {', '.join(names)}" for length, names in lengths.items()
        )
        return f"The losses are measured with different sequence lengths: {listed}."
    if len(runs) == 1 and any(model != by_name[0][1] for _, model in by_name):
        return "The losses are measured with different rotary positions in different phases."
    return None


def _rise(run: RunRecord, since: PhaseLoss) -> tuple[float, int] | None:
    """Return a task's highest training loss since a phase's start and its step, if it diverged.

    If an event reports a divergence, fewer steps suffice.
    """
    begin = run.phase_start(since.phase) or 0
    rows, losses = run.training.of_task(since.task)
    steps = run.training.step[rows]
    losses, steps = losses[steps > begin], steps[steps > begin]
    events = [each for each in divergences(run) if each.kind != "gradient_norm"]
    told = run.ended_diverged is not None or any(event.step > begin for event in events)
    needed = 1 if told else DIVERGED_STEPS
    above = losses > since.start + DIVERGED_NATS
    # Stretches of consecutive rows above: the index of the first, and that after the last.
    firsts, stops = np.flatnonzero(np.diff(above, prepend=False, append=False)).reshape(-1, 2).T
    long = stops - firsts >= needed
    if not np.any(long):
        return None
    inside = np.zeros(len(above) + 1, dtype=np.int64)
    inside[firsts[long]] += 1
    inside[stops[long]] -= 1
    chosen = np.cumsum(inside[:-1]) > 0
    return max(zip(losses[chosen].tolist(), steps[chosen].tolist(), strict=True))


def _rise_sentence(rise: tuple[float, int] | None) -> str:
    return "" if rise is None else f"; its training loss rose to {rise[0]:,.2f} at step {rise[1]:,}"


def describe_change(change: float) -> str:
    """Describe a difference of losses: `better by 0.51 nats`, `worse by …`, `unchanged`."""
    if not math.isfinite(change):
        return "the loss is not finite, the run has diverged"
    if abs(change) < SAME_LOSS_NATS:
        return "unchanged"
    return f"{'better' if change < 0 else 'worse'} by {abs(change):.2f} nats"
