"""The section `arms` of a sweep file: short forms by kind, and arms given phase by phase."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from megaphase.config.fields import (
    Few,
    FractionAbove0,
    FractionOf1,
    LearningRate,
    PhaseName,
    Positive,
    PositiveOrZero,
    ProperFraction,
    Section,
    Steps,
    Temperature,
    number_or_mapping,
)
from megaphase.model.config import PhaseModelConfig
from megaphase.optim.average_config import AverageConfig
from megaphase.plan.batch_config import PhaseBatchConfig
from megaphase.plan.mixture import MixtureConfig
from megaphase.plan.rate_curves import RateCurve
from megaphase.utils.validation_errors import MAPPING, NUMBER

ShortKind = Literal["static", "two-phase", "restart", "keep", "low-only", "regularized"]
Kind = Literal["static", "two-phase", "restart", "keep", "low-only", "regularized", "phases"]
KINDS: tuple[ShortKind, ...] = (
    "static", "two-phase", "restart", "keep", "low-only", "regularized"
)  # fmt: skip
# Kinds with two stages, of which the first gets a share of the budget.
STAGED = ("two-phase", "restart", "keep", "low-only")
# An arm that is given phase by phase.
PHASES: Kind = "phases"
# The name of first stages on the high-resource tasks, which arms share.
PRETRAIN = "pretrain"

ScheduleName = Literal["cosine", "linear", "inverse_sqrt", "constant", "wsd"]
# The learning rate of a phase that continues the schedule of the phase before.
CONTINUE: Literal["continue"] = "continue"


class LearningRateGrid(Section):
    """One schedule for all arms, and the peak learning rates that every arm tries.

    final: as a fraction of the peak. warmup, decay: as fractions of the schedule's steps; wsd
    needs decay, its linear end, and no other schedule has it.
    """

    schedule: ScheduleName = "cosine"
    peaks: list[LearningRate] = Field(min_length=1)
    final: FractionOf1 = 0.1
    warmup: FractionOf1 = 0.03
    decay: FractionAbove0 | None = None

    @field_validator("peaks")
    @classmethod
    def _each_once(cls, peaks: list[float]) -> list[float]:
        return each_once("this list", peaks)

    @model_validator(mode="after")
    def _decays_with_wsd(self) -> Self:
        _check_decay(self.schedule, self.warmup, self.decay)
        return self


class PhaseSchedule(Section):
    """The learning rate of a phase; what is left out is as in the sweep file's `learning_rate`."""

    schedule: ScheduleName | None = None
    peak: LearningRate | None = None
    final: FractionOf1 | None = None
    warmup: FractionOf1 | None = None
    decay: FractionAbove0 | None = None
    scale_with_batch: Literal["none", "sqrt"] | None = None

    def over(self, grid: LearningRateGrid) -> LearningRateGrid:
        """Return the grid with what this gives in its place.

        Raises:
            ValueError: decay is missing, or is not for this schedule.
        """
        own = self.model_dump(exclude_none=True, exclude={"peak", "scale_with_batch"})
        if self.schedule not in (None, "wsd") and self.decay is None:
            own["decay"] = None
        found = grid.model_copy(update=own)
        _check_decay(found.schedule, found.warmup, found.decay)
        return found


def _check_decay(schedule: str, warmup: float, decay: float | None) -> None:
    if schedule == "wsd" and decay is None:
        raise ValueError("schedule wsd needs decay, the fraction of its steps; add decay: 0.2")
    if schedule != "wsd" and decay is not None:
        raise ValueError(f"decay is for schedule wsd and not for {schedule}; leave it out")
    if decay is not None and warmup + decay > 1:
        raise ValueError(f"warmup {warmup:g} and decay {decay:g} are more than 1; lower one")


RateOrCurve = Annotated[
    Annotated[FractionOf1, Tag(NUMBER)] | Annotated[RateCurve, Tag(MAPPING)],
    Discriminator(number_or_mapping),
]
ScheduleOrContinue = Annotated[
    Annotated[Literal["continue"], Tag(NUMBER)] | Annotated[PhaseSchedule, Tag(MAPPING)],
    Discriminator(number_or_mapping),
]


class PhaseKeys(Section):
    """The keys that a phase of an arm has in common with a phase of the run file."""

    optimizer_state: Literal["reset", "keep"] | None = None
    order: Literal["balanced", "random"] = "balanced"
    cut: Literal["tokens", "documents"] = "tokens"
    begin_from: Literal["weights", "average"] = "weights"
    average: AverageConfig | None = None
    model: PhaseModelConfig | None = None
    batch: PhaseBatchConfig | None = None
    loss_weights: dict[str, PositiveOrZero] | None = Field(default=None, min_length=1)


class ArmPhase(PhaseKeys):
    """One phase of an arm, with one value for every key.

    share: of the sweep's budget; or steps. The last phase may leave both out: the rest.
    rate: of the low-resource tasks together, 0 to 1, or from and to; or mixture, as in a run file.
    learning_rate: keys that differ from the sweep file's; or `continue`, the next part of the
        schedule of the phase before.
    optimizer_state: kept by default where the schedule continues, else reset.
    settings: values of the run file by key path, in this phase.
    """

    name: PhaseName | None = None
    share: Positive | None = None
    steps: Steps | None = None
    rate: RateOrCurve | None = None
    mixture: MixtureConfig | None = None
    learning_rate: ScheduleOrContinue = PhaseSchedule()
    settings: dict[str, Any] = Field(default={})

    @model_validator(mode="after")
    def _one_mixture_and_length(self) -> Self:
        if (self.rate is None) == (self.mixture is None):
            raise ValueError("give exactly one of rate and mixture")
        if self.share is not None and self.steps is not None:
            raise ValueError("give share or steps, not both")
        return self


class Arm(Section):
    """One way to spend the budget, with all of its settings to be tried.

    kind: the arm's name by default; for an arm without phases.
    rates: total rates of the low-resource tasks in the last phase; temperatures: of the mixture of
        all tasks there, instead or in addition.
    pretrain: shares of the budget for the first stage.
    phases: instead of these, the phases of the arm; see ArmPhase. Every value may be several.
    branch_from: each phase with a schedule of its own starts from the best peak of the phase
        before, or from every one.
    budget: the sweep's, or the arm's own, which is the sum of its phases.
    settings: values of the run file by key path, such as `model.dropout: 0.1`; those of phases as
        `phases[1].order: random`, or `phases[*].order`.
    early_stopping: end the last phase after this many validations without an improvement of any
        low-resource task, and use the weights with the lowest mean low-resource loss.
    """

    kind: ShortKind | None = None
    rates: list[ProperFraction] = Field(default=[])
    temperatures: list[Temperature] = Field(default=[])
    pretrain: list[ProperFraction] = Field(default=[])
    phases: list[dict[str, Any]] = Field(default=[])
    branch_from: Literal["best_peak", "every_peak"] = "best_peak"
    budget: Literal["sweep", "own"] = "sweep"
    settings: dict[str, Any] = Field(default={})
    early_stopping: Few | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the arm has no settings, early stopping or budget of its own."""
        return not self.settings and self.early_stopping is None and self.budget == "sweep"

    @field_validator("rates", "temperatures", "pretrain")
    @classmethod
    def _each_once(cls, values: list[float]) -> list[float]:
        return each_once("this list", values)

    @model_validator(mode="after")
    def _short_form_or_phases(self) -> Self:
        if self.phases:
            for key in ("kind", "rates", "temperatures", "pretrain"):
                if getattr(self, key):
                    raise ValueError(f"{key} does not go with phases; leave it out")
        elif self.budget == "own":
            raise ValueError("budget: own needs phases; give them, or leave it out")
        return self


def each_once(what: str, values: list[Any]) -> list[Any]:
    """Return the values.

    Raises:
        ValueError: one occurs twice.
    """
    for number, value in enumerate(values):
        if value in values[:number]:
            raise ValueError(f"{value!r} occurs twice in {what}; leave it out once")
    return values
