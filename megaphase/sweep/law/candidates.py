"""The recipes among which a recommendation is searched for: those of the sweep, with values within
the range that it has tried."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, NamedTuple

import numpy as np

from megaphase.sweep.law.big_run import BigRun
from megaphase.sweep.law.rows import LawPhase, LawRow, LawRows

Kind = Literal["static", "two-phase", "restart"]
RATE_DECIMALS = 6
SHARES, RATES, PEAKS, FIRST_PEAKS = 7, 15, 5, 4


class Range(NamedTuple):
    """The lowest and the highest value that the sweep has tried."""

    low: float
    high: float

    def values(self, count: int, *, log: bool = True) -> list[float]:
        """Return values from end to end; one if the ends are equal."""
        if self.high <= self.low * (1 + 1e-9):
            return [self.low]
        space = np.geomspace if log and self.low > 0 else np.linspace
        return [float(value) for value in space(self.low, self.high, count)]

    def around(self, value: float, count: int, *, log: bool = True) -> Range:
        """Return the part of the range between the neighbours of a value among `count` ones."""
        if self.high <= self.low * (1 + 1e-9):
            return self
        if log and self.low > 0:
            step = (self.high / self.low) ** (1 / (count - 1))
            low, high = value / step, value * step
        else:
            step = (self.high - self.low) / (count - 1)
            low, high = value - step, value + step
        return Range(max(self.low, low), min(self.high, high))


@dataclass(frozen=True)
class Recipe:
    """The recipes of one form that the sweep has tried.

    Attributes:
        template: a row with it.
        share: of the steps before the last phase; (0, 0) with one phase.
        rate: of the low-resource tasks together in the last phase.
        one_peak: whether both phases have the same peak, as with a schedule that spans them.
    """

    kind: Kind
    template: LawRow
    share: Range
    rate: Range
    first_peak: Range
    last_peak: Range
    one_peak: bool

    @property
    def name(self) -> str:
        """The form in words."""
        last = self.template.phases[-1]
        kept = "" if last.reset or self.kind == "static" else ", optimizer state kept"
        return f"{self.kind}{kept}, {last.schedule}"

    def grid(self) -> Iterator[Candidate]:
        """Yield candidates over the whole range."""
        shares = self.share.values(SHARES, log=False)
        last_peaks, first_peaks = self.last_peak.values(PEAKS), self.first_peak.values(FIRST_PEAKS)
        if self.one_peak:
            first_peaks = [0.0]
        for share, rate, last, first in product(
            shares, self.rate.values(RATES), last_peaks, first_peaks
        ):
            yield Candidate(self, share, rate, first or last, last)

    def around(self, candidate: Candidate) -> Iterator[Candidate]:
        """Yield candidates between the neighbours of one of the grid."""
        between = replace(
            self,
            share=self.share.around(candidate.share, SHARES, log=False),
            rate=self.rate.around(candidate.rate, RATES),
            first_peak=self.first_peak.around(candidate.first_peak, FIRST_PEAKS),
            last_peak=self.last_peak.around(candidate.last_peak, PEAKS),
        )
        for each in between.grid():
            yield replace(each, recipe=self)


@dataclass(frozen=True)
class Candidate:
    """One recipe with all of its values."""

    recipe: Recipe
    share: float
    rate: float
    first_peak: float
    last_peak: float

    def steps(self, total: int) -> list[int]:
        """Return the steps of every phase."""
        if self.recipe.kind == "static":
            return [total]
        first = min(max(round(self.share * total), 1), total - 1)
        return [first, total - first]

    @property
    def peaks(self) -> list[float]:
        """The peak of every phase."""
        if self.recipe.kind == "static":
            return [self.last_peak]
        return [self.first_peak, self.last_peak]

    def rates(self, rows: LawRows, unique: Mapping[str, int]) -> list[dict[str, float]]:
        """Return the sampling rates of every phase."""
        last = group_rates(rows, unique, self.rate)
        if self.recipe.kind == "static":
            return [last]
        first = last if self.recipe.kind == "restart" else group_rates(rows, unique, 0.0)
        return [first, last]

    def row(
        self,
        rows: LawRows,
        model: Mapping[str, Any],
        total: int,
        step_tokens: int,
        unique: Mapping[str, int],
    ) -> LawRow:
        """Return the row of a run with this recipe, not trained yet."""
        phases = [
            LawPhase(
                steps=steps,
                tokens={task: rate * steps * step_tokens for task, rate in rates.items()},
                peak=peak,
                schedule=like.schedule,
                end=like.end,
                reset=like.reset,
                learning_rate=like.learning_rate,
            )
            for steps, rates, peak, like in zip(
                self.steps(total),
                self.rates(rows, unique),
                self.peaks,
                self.recipe.template.phases,
                strict=True,
            )
        ]
        return LawRow("", self.recipe.name, None, 0, model, phases, unique, {})

    def big_row(self, rows: LawRows, big: BigRun) -> LawRow:
        """Return the row of the run for which phases are recommended."""
        return self.row(rows, big.model, big.steps, big.step_tokens, big.unique)


def group_rates(rows: LawRows, unique: Mapping[str, int], low_rate: float) -> dict[str, float]:
    """Return the rates of all tasks that are sampled, which sum to 1 in six decimals.

    Within a group they are divided as in the sweep: in proportion to tokens^(1/T).
    """
    found: dict[str, float] = {}
    for group, temperature, total in (
        (rows.high, rows.within[0], 1 - low_rate),
        (rows.low, rows.within[1], low_rate),
    ):
        weights = {task: unique[task] ** (1 / temperature) for task in group}
        whole = sum(weights.values())
        found |= {
            task: round(total * weight / whole, RATE_DECIMALS) for task, weight in weights.items()
        }
    found = {task: rate for task, rate in found.items() if rate > 0}
    largest = max(found, key=lambda task: found[task])
    others = math.fsum(rate for task, rate in found.items() if task != largest)
    found[largest] = round(1 - others, RATE_DECIMALS)
    return found


def recipes_of(rows: LawRows) -> list[Recipe]:
    """Return the forms that the sweep has tried in one or two phases, each with its ranges."""
    groups: dict[object, tuple[Kind, list[LawRow]]] = {}
    for row in rows.rows:
        kind = _kind(row, rows.low)
        if kind is not None:
            key = (kind, *((phase.schedule, phase.reset, round(phase.end, 2))
                           for phase in row.phases))  # fmt: skip
            groups.setdefault(key, (kind, []))[1].append(row)
    return [_recipe(kind, group, rows.low) for kind, group in groups.values()]


def _kind(row: LawRow, low: Sequence[str]) -> Kind | None:
    """Return the form of a run's recipe; None if it is none of those that are recommended."""
    rates = [phase.rate(low) for phase in row.phases]
    if not 0 < rates[-1] < 1 or any(phase.changes for phase in row.phases):
        return None
    if len(rates) == 1:
        return "static"
    if len(rates) == 2 and rates[0] == 0:
        return "two-phase"
    if len(rates) == 2 and abs(rates[0] - rates[1]) < 1e-3 and row.phases[1].reset:
        return "restart"
    return None


def _recipe(kind: Kind, rows: Sequence[LawRow], low: Sequence[str]) -> Recipe:
    def over(values: Sequence[float]) -> Range:
        return Range(min(values), max(values))

    several = len(rows[0].phases) > 1
    return Recipe(
        kind,
        rows[0],
        over([row.phases[0].steps / row.steps if several else 0.0 for row in rows]),
        over([row.phases[-1].rate(low) for row in rows]),
        over([row.phases[0].peak for row in rows]),
        over([row.phases[-1].peak for row in rows]),
        several and rows[0].phases[-1].spans,
    )
