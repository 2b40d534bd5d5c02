"""Compute a phase's effective sampling rates from its mixture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Discriminator, Tag, field_validator, model_validator

from megaphase.config.fields import (
    Epochs,
    FractionOf1,
    RoleOrTaskNames,
    Section,
    Temperature,
    number_or_mapping,
)
from megaphase.plan.rate_curves import (
    OnlyCappedTasksError,
    RateCurve,
    RatePieces,
    RatesAt,
    TemperatureCurve,
    along,
    averages,
    capped,
    integer_pieces,
    log_shares,
    mean_rates,
    normalised,
    piece_bounds,
    progress,
    temperature_rates,
)
from megaphase.plan.rate_sums import check_sums, constant_rates, ends
from megaphase.utils.decimals import as_written
from megaphase.utils.errors import InputError
from megaphase.utils.validation_errors import MAPPING, NUMBER

METHODS = ("rates", "temperature", "proportional", "unimax")

RateOrCurve = Annotated[
    Annotated[FractionOf1, Tag(NUMBER)] | Annotated[RateCurve, Tag(MAPPING)],
    Discriminator(number_or_mapping),
]
TemperatureOrCurve = Annotated[
    Annotated[Temperature, Tag(NUMBER)] | Annotated[TemperatureCurve, Tag(MAPPING)],
    Discriminator(number_or_mapping),
]


class MixtureConfig(Section):
    """The sampling rates of a phase. Give exactly one of `rates`, `temperature`, `proportional` and
    `unimax`.

    Rates may change within the phase, as functions of the fraction of its samples
    ([plan.md](plan.md#rates-that-change)):

    ```yaml
    mixture: {temperature: {from: 5, to: 1}}
    mixture: {rates: {en: {from: 0.88, to: 0.8}, hi: {from: 0.02, to: 0.1}, fr: 0.1}}
    ```
    """

    rates: dict[str, RateOrCurve] | None = None
    """Sampling rates by task, which sum to 1, both at the phase's start and at its end. A sum that
    differs from 1 by at most 1e-6 is taken for rounding, and the rates are divided by it; so are
    those at any point in between, if curves of several shapes sum to something else there. Any
    other sum is refused with the rates in the same proportions, ready to be pasted: weights such as
    `{en: 3, hi: 1}` are never divided silently."""
    temperature: TemperatureOrCurve | None = None
    """Rates in proportion to tokens^(1/T), with the tokens of one epoch of each task."""
    proportional: Literal[True] | None = None
    """Rates in proportion to tokens, which is `temperature: 1`."""
    unimax: Literal[True] | None = None
    """Equal rates, capped by `max_epochs`, which it needs (Chung et al. 2023)."""
    over: RoleOrTaskNames | None = None
    """The tasks that take part; all if left out. Not with `rates`."""
    max_epochs: Epochs | None = None
    """Most epochs of a task over the whole run; samples above this cap go to the other tasks."""

    @field_validator("rates", mode="before")
    @classmethod
    def _weights_are_no_rates(cls, rates: Any) -> Any:
        """Answer weights such as `{en: 3, hi: 1}` with the rates that they mean."""
        if (constant := constant_rates(rates)) is not None:
            check_sums(constant)
        return rates

    @field_validator("rates")
    @classmethod
    def _rates_sum_to_one(
        cls, rates: dict[str, float | RateCurve] | None
    ) -> dict[str, float | RateCurve] | None:
        if rates is not None:
            check_sums(rates)
        return rates

    @property
    def changes(self) -> bool:
        """Whether the rates change within the phase."""
        return isinstance(self.temperature, TemperatureCurve) or any(
            isinstance(rate, RateCurve) for rate in (self.rates or {}).values()
        )

    @model_validator(mode="before")
    @classmethod
    def _exclude_each_other(cls, data: Any) -> Any:
        """Before the keys are checked one by one: beside `temperature`, what is wrong with `rates`
        is not their sum."""
        given = [name for name in METHODS if isinstance(data, dict) and data.get(name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} exclude each other; give exactly one of "
                f"{', '.join(METHODS)}"
            )
        return data

    @model_validator(mode="after")
    def _one_method(self) -> Self:
        if all(getattr(self, name) is None for name in METHODS):
            raise ValueError(f"give exactly one of {', '.join(METHODS)}; found none of them")
        if self.rates is not None and self.over is not None:
            raise ValueError("over goes with temperature, proportional and unimax, not with rates")
        if self.unimax and self.max_epochs is None:
            raise ValueError("unimax needs max_epochs")
        return self


@dataclass(frozen=True)
class TaskSupply:
    """A task's training tokens and samples in one epoch, and the samples that are already used.

    Attributes:
        samples_until: returns the samples between those that are used and so many epochs since the
            start of the run; needed if the used ones have another length.
    """

    tokens: int
    samples_per_epoch: int
    samples_used: int
    samples_until: Callable[[Fraction], int] | None = None

    def room(self, max_epochs: float) -> int:
        """Return the samples that are left of `max_epochs` epochs."""
        epochs = as_written(max_epochs)
        if self.samples_until is not None:
            return self.samples_until(epochs)
        return max(0, int(epochs * self.samples_per_epoch) - self.samples_used)


Rates = dict[str, Fraction]


def requested_rates(mixture: MixtureConfig, supply: Mapping[str, TaskSupply]) -> Rates:
    """Return the rates that the mixture requests, before any cap; they sum to exactly 1.

    temperature: p ∝ n^(1/T) with n the tokens of an epoch (Arivazhagan et al. 2019); proportional
    is T = 1; unimax starts uniform (Chung et al. 2023). Tasks outside the mixture have rate 0.
    Of rates that change, the means over the phase are returned.
    """
    if mixture.rates is not None and not mixture.changes:
        weights = {task: as_written(rate) for task, rate in _constant(mixture.rates).items()}
    elif mixture.rates is not None and (means := _exact_means(mixture.rates)) is not None:
        weights = means
    elif mixture.changes:
        means_of_all = mean_rates(requested_at(mixture, supply), len(supply)).tolist()
        weights = dict(zip(supply, map(Fraction, means_of_all), strict=True))
    else:
        over = mixture.over or list(supply)
        assert not isinstance(mixture.temperature, TemperatureCurve)
        exponent = 0.0 if mixture.unimax else 1 / (mixture.temperature or 1.0)
        most = max(supply[task].tokens for task in over)
        weights = {task: Fraction((supply[task].tokens / most) ** exponent) for task in over}
    integers = _in_proportion(weights.values())
    found = dict(zip(weights, integers, strict=True))
    total = sum(integers)
    return {task: Fraction(found.get(task, 0), total) for task in supply}


def _in_proportion(values: Iterable[Fraction]) -> list[int]:
    """Return the integers in proportion to the values, over their common denominator: with many
    tasks their sums take a hundredth of the time that those of fractions do."""
    values = list(values)
    common = 1
    for value in values:
        if common % value.denominator:
            common = math.lcm(common, value.denominator)
    return [value.numerator * (common // value.denominator) for value in values]


def _constant(rates: Mapping[str, float | RateCurve]) -> dict[str, float]:
    return {task: rate for task, rate in rates.items() if not isinstance(rate, RateCurve)}


def _exact_means(rates: Mapping[str, float | RateCurve]) -> Rates | None:
    """Return the means of the rates, if they sum to exactly 1 everywhere: of both shapes, the mean
    is that of start and end."""
    curves = [rate for rate in rates.values() if isinstance(rate, RateCurve)]
    start, end = (list(map(as_written, each)) for each in ends(rates.values()))
    if len({curve.shape for curve in curves}) > 1 or not sum(start) == sum(end) == 1:
        return None
    return {task: (a + b) / 2 for task, a, b in zip(rates, start, end, strict=True)}


def requested_at(mixture: MixtureConfig, supply: Mapping[str, TaskSupply]) -> RatesAt:
    """Return the rates that a mixture with curves requests, as a function of the fractions of the
    phase's samples: float64 [points] to float64 [points, tasks]."""
    if isinstance(mixture.temperature, TemperatureCurve):
        curve, over = mixture.temperature, set(mixture.over or supply)
        tokens = [each.tokens if task in over else 0 for task, each in supply.items()]
        logarithms = log_shares(tokens)
        return lambda fractions: temperature_rates(logarithms, along(curve, fractions))
    assert mixture.rates is not None
    rates = [mixture.rates.get(task, 0.0) for task in supply]
    start, end = (np.array(each) for each in ends(rates))
    is_cosine = np.array([isinstance(r, RateCurve) and r.shape == "cosine" for r in rates])

    def rates_at(fractions: np.ndarray) -> np.ndarray:
        linear = fractions[:, np.newaxis]
        at = np.where(is_cosine, progress("cosine", fractions)[:, np.newaxis], linear)
        return normalised(start + (end - start) * at)

    return rates_at


def rate_pieces(
    mixture: MixtureConfig, supply: Mapping[str, TaskSupply], samples: int, where: str
) -> RatePieces:
    """Return the rates of a mixture with curves in a phase of `samples` samples, see `capped`.

    Raises:
        InputError: the tasks have too few samples for the phase under `max_epochs`.
    """
    rates_at = requested_at(mixture, supply)
    bounds = piece_bounds(samples, len(supply))
    rates = averages(rates_at, bounds, len(supply))
    requested = rates_at(np.array([0.0, 1.0]))
    room, limits, ends = np.zeros(len(supply), np.int64), list[int](), requested
    try:
        if mixture.max_epochs is not None:
            left = {task: each.room(mixture.max_epochs) for task, each in supply.items()}
            taking_part = np.flatnonzero(rates.any(axis=0)).tolist()
            names = list(supply)
            _check_demand(mixture, {names[i]: left[names[i]] for i in taking_part}, samples, where)
            # More than the phase has is never reached, nor may it be so by rounding.
            room = np.array([n if n <= samples else 2 * samples for n in left.values()])
            limits = capped(rates, np.diff(bounds)[:, np.newaxis], room)
            ends = rates[[0, -1]] if limits else requested
        weights, unit = integer_pieces(rates, bounds, room, limits)
    except OnlyCappedTasksError as error:
        names = list(supply)
        raise InputError(
            where,
            f"after {error.fraction:.0%} of the phase only tasks that max_epochs "
            f"{mixture.max_epochs:g} caps have a rate ("
            + ", ".join(f"{names[i]} {room[i]:,} samples" for i in error.limits)
            + ")",
            "raise max_epochs, shorten the phase or give another task a rate there",
        ) from None
    return RatePieces(bounds.astype(np.uint64), weights, unit, requested, ends)


def _check_demand(
    mixture: MixtureConfig, room: Mapping[str, int], samples: int, where: str
) -> None:
    """Raise InputError if the tasks with a rate have too few samples for the phase.

    room: the most samples of each of them
    """
    if sum(room.values()) < samples:
        figures = ", ".join(f"{task} {most:,}" for task, most in room.items())
        raise InputError(
            where,
            f"the phase wants {samples:,} samples, but max_epochs {mixture.max_epochs:g} leaves "
            f"only {sum(room.values()):,} ({figures})",
            "raise max_epochs, shorten the phase or add tasks",
        )


def effective_rates(
    mixture: MixtureConfig,
    supply: Mapping[str, TaskSupply],
    samples: int,
    where: str,
    requested: Rates | None = None,
) -> Rates:
    """Return the rates over `samples` samples when `max_epochs` caps repetition over the whole run.

    The samples that capped tasks lose go to the others in proportion to their requested rates,
    until no task exceeds its cap. Of rates that change, the means over the phase are returned.

    requested: the requested rates, if they are known already.

    Raises:
        InputError: every task is capped, and together they have too few samples for the phase.
    """
    if mixture.changes:
        return pieces_means(rate_pieces(mixture, supply, samples, where), list(supply))
    requested = requested or requested_rates(mixture, supply)
    if mixture.max_epochs is None:
        return requested
    weights = dict(zip(requested, _in_proportion(requested.values()), strict=True))
    free = [task for task, weight in weights.items() if weight > 0]
    room = {task: supply[task].room(mixture.max_epochs) for task in free}
    _check_demand(mixture, room, samples, where)
    limited: dict[str, int] = {}
    left, weight = samples, sum(weights.values())
    while over := [task for task in free if weights[task] * left > room[task] * weight]:
        limited |= {task: room[task] for task in over}
        left -= sum(room[task] for task in over)
        weight -= sum(weights[task] for task in over)
        free = [task for task in free if task not in limited]
    final = {task: Fraction(n, samples) for task, n in limited.items()}
    final |= {task: Fraction(weights[task] * left, weight * samples) for task in free}
    return {task: final.get(task, Fraction(0)) for task in supply}


def pieces_means(pieces: RatePieces, tasks: list[str]) -> Rates:
    """Return the means of the rates over the phase."""
    whole = pieces.unit * pieces.samples
    return {
        task: Fraction(total, whole) for task, total in zip(tasks, pieces.totals(), strict=True)
    }


def integer_weights(rates: list[Fraction], samples: int, largest_total: int) -> list[int]:
    """Return integers in proportion to rates that sum to 1, for a phase of `samples` samples.

    The proportion is exact if the rates' common denominator is at most `largest_total`. Otherwise
    the integers sum to a multiple of `samples` near it, so that a rate that represents a whole
    number of samples, such as that of a capped task, stays exact; largest remainders, ties to the
    lower index: the error of a rate is below 1 / sum.
    """
    denominator = _common_denominator(rates, largest_total)
    if denominator is not None:
        return [int(rate * denominator) for rate in rates]
    total = largest_total // samples * samples
    weights, remainders = [], []
    for rate in rates:
        weight, remainder = divmod(rate.numerator * total, rate.denominator)
        weights.append(weight)
        remainders.append(remainder)
    # Two different fractions differ by at least 1 / the product of their denominators, so that this
    # many binary digits order them.
    digits = 2 * max(rate.denominator for rate in rates).bit_length()
    first_digits = [
        (remainder << digits) // rate.denominator
        for remainder, rate in zip(remainders, rates, strict=True)
    ]
    largest_first = sorted(range(len(rates)), key=lambda i: -first_digits[i])
    for i in largest_first[: total - sum(weights)]:
        weights[i] += 1
    return weights


def _common_denominator(rates: list[Fraction], largest: int) -> int | None:
    common = 1
    for rate in rates:
        common = math.lcm(common, rate.denominator)
        if common > largest:
            return None
    return common
