"""The outcome of a run in a sweep: the losses by which runs are compared, or why there are none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from pydantic import BaseModel, ConfigDict

from megaphase.report.measured import Measured
from megaphase.report.runs import Event, HeldOutRow, RunRecord
from megaphase.utils.errors import RunError


class Translated(BaseModel):
    """sacrebleu's scores of a task, 0 to 100."""

    model_config = ConfigDict(frozen=True)

    bleu: float
    chrf: float


class Outcome(BaseModel):
    """Losses by task at the step whose weights count, or the reason of a failure.

    diverged: how a run ended because it diverged; its losses are then NaN.
    pruned: after which step a run was stopped, because other settings of its arm were better.
    losses, bits_per_byte: on the validation split, nats per token; settings are chosen by these.
    test, test_bits_per_byte: on the test split; empty where the sweep has none.
    training: on a fixed sample of the training documents; empty where the sweep measures none.
    seconds: of all optimizer steps. translation: scores by task.
    """

    model_config = ConfigDict(frozen=True)

    failed: str | None = None
    diverged: str | None = None
    pruned: str | None = None
    step: int = 0
    losses: dict[str, Measured] = {}
    bits_per_byte: dict[str, Measured] = {}
    test: dict[str, Measured] = {}
    test_bits_per_byte: dict[str, Measured] = {}
    training: dict[str, Measured] = {}
    seconds: float = 0.0
    translation: dict[str, Translated] = {}

    @property
    def can_be_branched(self) -> bool:
        """Whether the run has reached its end, from which others can start."""
        return self.failed is None and self.diverged is None and self.pruned is None

    def group_loss(self, tasks: Sequence[str]) -> float:
        """Return the mean loss of these tasks; infinite if one is not a number."""
        loss = fmean(self.losses[task] for task in tasks)
        return loss if math.isfinite(loss) else math.inf


def outcome_of(
    run: RunRecord, best_of: Sequence[str] | None, *, of_average: bool = False
) -> Outcome:
    """Return the outcome of an ended run.

    best_of: the tasks whose lowest mean loss determines the weights that count; None: the last.
    of_average: whether the average of the weights counts instead of the weights.

    Raises:
        RunError: the run has never been validated, or its last validation had no average.
    """
    if run.ended_diverged is not None:
        return _of_diverged(run, run.ended_diverged)
    if not run.validation:
        raise RunError(f"{run.directory}: the run has ended without a validation")
    row = run.validation[-1]
    if best_of is not None:
        row = min(run.validation, key=lambda each: _mean(each.validation, best_of))
    rows = row.validation_average if of_average else row.validation
    if not rows:
        raise RunError(
            f"{run.directory}: the run has ended before weights were averaged; lower the phase's "
            "average.from_step"
        )
    return Outcome(
        step=row.step,
        losses={task: measured.loss for task, measured in rows.items()},
        bits_per_byte={task: measured.bits_per_byte for task, measured in rows.items()},
        seconds=_seconds(run),
    )


def _of_diverged(run: RunRecord, end: Event) -> Outcome:
    losses = dict.fromkeys(run.plan.tasks, math.nan)
    sentence = f"ended at step {end.step:,} of {run.planned_steps:,}"
    return Outcome(diverged=sentence, step=end.step, losses=losses, seconds=_seconds(run))


def _seconds(run: RunRecord) -> float:
    return round(float(run.training.step_seconds.sum()), 1)


def _mean(measured: dict[str, HeldOutRow], tasks: Sequence[str]) -> float:
    loss = fmean(measured[task].loss for task in tasks)
    return loss if math.isfinite(loss) else math.inf
