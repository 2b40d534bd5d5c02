"""Compute a phase's effective sampling rates from its mixture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Self

from pydantic import field_validator, model_validator

from megaphase.config.fields import Epochs, FractionOf1, RoleOrTaskNames, Section, Temperature
from megaphase.utils.decimals import as_written
from megaphase.utils.errors import InputError

RATE_SUM_TOLERANCE = 1e-6


class MixtureConfig(Section):
    """The sampling rates of a phase. Give exactly one of `rates`, `temperature`, `proportional` and
    `unimax`."""

    rates: dict[str, FractionOf1] | None = None
    """Sampling rates by task, which sum to 1. A sum that differs from 1 by at most 1e-6 is taken
    for rounding, and the rates are divided by it."""
    temperature: Temperature | None = None
    """Rates in proportion to tokens^(1/T), with the tokens of one epoch of each task."""
    proportional: Literal[True] | None = None
    """Rates in proportion to tokens, which is `temperature: 1`."""
    unimax: Literal[True] | None = None
    """Equal rates, capped by `max_epochs`, which it needs (Chung et al. 2023)."""
    over: RoleOrTaskNames | None = None
    """The tasks that take part; all if left out. Not with `rates`."""
    max_epochs: Epochs | None = None
    """Most epochs of a task over the whole run; samples above this cap go to the other tasks."""

    @field_validator("rates")
    @classmethod
    def _rates_sum_to_one(cls, rates: dict[str, float] | None) -> dict[str, float] | None:
        if rates is not None:
            total = math.fsum(rates.values())
            if abs(total - 1) > RATE_SUM_TOLERANCE:
                raise ValueError(f"the rates sum to {total:.9g}; make them sum to 1")
        return rates

    @model_validator(mode="after")
    def _one_method(self) -> Self:
        methods = ("rates", "temperature", "proportional", "unimax")
        given = [name for name in methods if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"give exactly one of {', '.join(methods)}; found {found}")
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
    """
    if mixture.rates is not None:
        weights = {task: as_written(rate) for task, rate in mixture.rates.items()}
    else:
        over = mixture.over or list(supply)
        exponent = 0.0 if mixture.unimax else 1 / (mixture.temperature or 1.0)
        most = max(supply[task].tokens for task in over)
        weights = {task: Fraction((supply[task].tokens / most) ** exponent) for task in over}
    total = sum(weights.values())
    return {task: weights.get(task, Fraction(0)) / total for task in supply}


def effective_rates(
    mixture: MixtureConfig, supply: Mapping[str, TaskSupply], samples: int, where: str
) -> Rates:
    """Return the rates over `samples` samples when `max_epochs` caps repetition over the whole run.

    The samples that capped tasks lose go to the others in proportion to their requested rates,
    until no task exceeds its cap.

    Raises:
        InputError: every task is capped, and together they have too few samples for the phase.
    """
    requested = requested_rates(mixture, supply)
    if mixture.max_epochs is None:
        return requested
    room = {task: each.room(mixture.max_epochs) for task, each in supply.items()}
    shares = {task: rate * samples for task, rate in requested.items() if rate > 0}
    if sum(room[task] for task in shares) < samples:
        figures = ", ".join(f"{task} {room[task]:,}" for task in shares)
        raise InputError(
            where,
            f"the phase wants {samples:,} samples, but max_epochs {mixture.max_epochs:g} leaves "
            f"only {sum(room[task] for task in shares):,} ({figures})",
            "raise max_epochs, shorten the phase or add tasks",
        )
    capped: dict[str, int] = {}
    while over := [task for task in shares if task not in capped and shares[task] > room[task]]:
        capped |= {task: room[task] for task in over}
        free = [task for task in shares if task not in capped]
        left = samples - sum(capped.values())
        weight = sum((requested[task] for task in free), Fraction(0))
        for task in free:
            shares[task] = left * requested[task] / weight
    final = shares | {task: Fraction(n) for task, n in capped.items()}
    return {task: final.get(task, Fraction(0)) / samples for task in supply}


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
    exact = [rate * total for rate in rates]
    weights = [int(value) for value in exact]
    by_remainder = sorted(range(len(rates)), key=lambda i: (weights[i] - exact[i], i))
    for i in by_remainder[: total - sum(weights)]:
        weights[i] += 1
    return weights


def _common_denominator(rates: list[Fraction], largest: int) -> int | None:
    common = 1
    for rate in rates:
        common = math.lcm(common, rate.denominator)
        if common > largest:
            return None
    return common
