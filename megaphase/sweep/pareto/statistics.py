"""Student's t intervals over seeds, and the expected best of several random settings.

An interval is about the seeds alone: initial weights and order of samples. All runs of a sweep are
measured on the same held-out documents, of which other ones could have been drawn.

The expected best of k random settings is that of Dodge et al. 2019 (Show Your Work, arXiv
1909.03004), over all subsets of k different settings: drawn with replacement, the estimate is
biased (Tang et al. 2020, arXiv 2004.13705). It is exact, a sum over the settings with the weights
of `best_of_weights`; so its interval is that of any other linear contrast, from Student's t over
the seeds. The settings are those that were chosen for the sweep, not a sample of others, and seeds
are too few for a bootstrap: resampling three of them gives intervals that are too short.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from statistics import fmean, stdev
from typing import Literal

from scipy.special import stdtr, stdtrit

CONFIDENCE = 0.95
ROUNDING = 1e-9  # differences below it come from the arithmetic
Sign = Literal[-1, 0, 1]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        error: the standard error; None with a single value.
        n: number of values.
    """

    mean: float
    error: float | None
    n: int

    @cached_property
    def half_width(self) -> float | None:
        """Half of the 95 % interval's width, from Student's t; None with a single value."""
        if self.error is None:
            return None
        return float(stdtrit(self.n - 1, (1 + CONFIDENCE) / 2)) * self.error

    @property
    def low(self) -> float | None:
        """The lower end of the interval."""
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        """The upper end of the interval."""
        return None if self.half_width is None else self.mean + self.half_width

    @property
    def t(self) -> float | None:
        """The mean over its standard error; infinite if the values are equal and not 0."""
        if self.error is None:
            return None
        if self.error <= ROUNDING:
            return 0.0 if abs(self.mean) <= ROUNDING else math.copysign(math.inf, self.mean)
        return self.mean / self.error

    @property
    def p(self) -> float | None:
        """The two-sided probability of such a t with a true mean of 0."""
        return None if self.t is None else 2 * float(stdtr(self.n - 1, -abs(self.t)))

    @property
    def sign(self) -> Sign:
        """-1 or 1 if the whole interval is below or above 0, otherwise 0."""
        if self.low is None or self.high is None:
            return 0
        return -1 if self.high < -ROUNDING else 1 if self.low > ROUNDING else 0


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of the values of all seeds, with its standard error."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(fmean(values), error, len(values))


def best_of_weights(n: int, k: int) -> list[float]:
    """Return the probability of each of n settings to be the best of k random ones, best first.

    The k are drawn without replacement. The i-th of the order (from 0) is the best if it is among
    them and the others are from the n - 1 - i behind it.
    """
    return [float(Fraction(math.comb(n - 1 - i, k - 1), math.comb(n, k))) for i in range(n)]


def chance_of_less(
    own: Sequence[float],
    weights: Sequence[float],
    other: Sequence[float],
    other_weights: Sequence[float],
) -> float:
    """Return the probability that a value is less than another, each drawn with these weights.

    Equal values count one half.
    """
    return math.fsum(
        weight * other_weight * (0.5 if value == other_value else float(value < other_value))
        for value, weight in zip(own, weights, strict=True)
        for other_value, other_weight in zip(other, other_weights, strict=True)
    )


def holm(probabilities: Sequence[float]) -> list[float]:
    """Return the probabilities adjusted for their number after Holm (1979), in the same order."""
    order = sorted(range(len(probabilities)), key=lambda i: probabilities[i])
    adjusted, largest = [0.0] * len(probabilities), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * probabilities[i]))
        adjusted[i] = largest
    return adjusted
