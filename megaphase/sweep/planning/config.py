"""The section `prune` of a sweep file."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from megaphase.config.fields import ProperFraction, Section, number_or_mapping
from megaphase.utils.validation_errors import MAPPING, NUMBER

Criterion = Literal["fronts", "mean", "high", "low"]


class Halving(Section):
    """Successive halving of the settings of an arm.

    at: fractions of a run's own steps, after which settings are compared and the worse half stops.
    by: validation losses that are compared: those of both groups, by Pareto fronts; their mean; or
        those of one group. First stages are always compared by the tasks that they train on.
    """

    at: list[ProperFraction] = Field(default=[0.25, 0.5], min_length=1)
    by: Criterion = "fronts"

    @field_validator("at")
    @classmethod
    def _ascending(cls, at: list[float]) -> list[float]:
        if any(later <= earlier for earlier, later in pairwise(at)):
            raise ValueError("the fractions do not ascend; put them in order, each once")
        return at


Pruning = Annotated[
    Annotated[Literal["halving"], Tag(NUMBER)] | Annotated[Halving, Tag(MAPPING)],
    Discriminator(number_or_mapping),
]
