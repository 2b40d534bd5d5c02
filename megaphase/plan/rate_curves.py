"""Sampling rates that change within a phase: curves over the fraction of the phase's samples.

A phase with a curve is divided into equal ranges of samples, its pieces. The rate of a task in a
piece is the average of its curve there, as an integer weight, so that the blend's arithmetic is
exact. Floating-point arithmetic is elementary and in a fixed order, so that processors of all kinds
find the same weights, apart from the last bits of the C library's logarithm and cosine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from megaphase.config.fields import FractionOf1, Section, Temperature

# Pieces of a phase: fewer if it has fewer samples, or more than 8,192 tasks.
MOST_PIECES = 1024
FEWEST_PIECES = 64
MOST_WEIGHTS = 1 << 23
# Weights of a phase sum to at most this, as those of a phase with constant rates.
LARGEST_TOTAL = 1 << 62
# Numbers that are computed at a time.
_AT_A_TIME = 1 << 20

Shape = Literal["linear", "cosine"]


class TemperatureCurve(Section):
    """A temperature that changes within the phase, as a function of the fraction of the phase's
    samples; the rates follow it at every point, see [plan.md](plan.md#rates-that-change)."""

    from_: Temperature = Field(alias="from")
    """Temperature at the phase's start."""
    to: Temperature
    """Temperature at its end."""
    shape: Shape = "linear"
    """`linear`, or `cosine`: half a cosine wave, slow at both ends."""


class RateCurve(Section):
    """A rate that changes within the phase, as a function of the fraction of the phase's samples,
    see [plan.md](plan.md#rates-that-change)."""

    from_: FractionOf1 = Field(alias="from")
    """Rate at the phase's start."""
    to: FractionOf1
    """Rate at its end."""
    shape: Shape = "linear"
    """`linear`, or `cosine`: half a cosine wave, slow at both ends."""


Curve = TemperatureCurve | RateCurve

# Requested rates at fractions of a phase's samples: float64 [points] to float64 [points, tasks].
RatesAt = Callable[[np.ndarray], np.ndarray]


def progress(shape: Shape, fractions: np.ndarray) -> np.ndarray:
    """Return how far from its start to its end, 0 to 1, a curve is at fractions of the samples."""
    if shape == "linear":
        return fractions
    # Not numpy's cosine, whose last bit depends on the processor.
    return np.array([(1 - math.cos(math.pi * each)) / 2 for each in fractions.tolist()])


def along(curve: Curve, fractions: np.ndarray) -> np.ndarray:
    """Return the curve's values, float64 [points], at fractions of the phase's samples."""
    values: np.ndarray = curve.from_ + (curve.to - curve.from_) * progress(curve.shape, fractions)
    return values


def log_shares(tokens: list[int]) -> np.ndarray:
    """Return the logarithms of the tokens as fractions of the largest number, float64 [tasks]; that
    of no tokens is -infinity."""
    most = max(tokens)
    return np.array([math.log(each / most) if each else -np.inf for each in tokens])


def temperature_rates(logarithms: np.ndarray, temperatures: np.ndarray) -> np.ndarray:
    """Return rates in proportion to tokens^(1/T), float64 [points, tasks].

    logarithms:   see `log_shares`
    temperatures: float64 [points]
    """
    return normalised(_exp(logarithms / temperatures[:, np.newaxis]))


def normalised(rates: np.ndarray) -> np.ndarray:
    """Divide rates [points, tasks] by their sums."""
    divided: np.ndarray = rates / rates.sum(axis=1, keepdims=True)
    return divided


# ln 2 in two parts; multiples of the first one up to 2^20 are exact.
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_TERMS = 14


def _exp(values: np.ndarray) -> np.ndarray:
    """Return e^x for x <= 0; numpy's own function depends on the processor in its last bit."""
    values = np.maximum(values, -1000.0)  # e^-1000 is 0
    powers = np.rint(values / math.log(2))
    values = (values - powers * _LN2_HIGH) - powers * _LN2_LOW
    result = np.ones_like(values)
    for term in range(_TERMS, 0, -1):
        result *= values
        result /= term
        result += 1
    return np.ldexp(result, powers.astype(np.int32))


@dataclass(frozen=True)
class RatePieces:
    """The rates of a phase that is divided into pieces.

    bounds:    uint64 [pieces + 1], the samples at which the pieces begin, and the phase's samples
    weights:   uint64 [tasks, pieces]; those of a piece sum to its samples times `unit`
    unit:      the weight that one sample costs
    requested: float64 [2, tasks], the requested rates at the phase's start and end
    ends:      float64 [2, tasks], the effective ones
    """

    bounds: np.ndarray
    weights: np.ndarray
    unit: int
    requested: np.ndarray
    ends: np.ndarray

    @property
    def samples(self) -> int:
        """The phase's samples."""
        return int(self.bounds[-1])

    def totals(self) -> list[int]:
        """Return every task's weight in the whole phase, which is `unit` times its samples."""
        return [int(each) for each in self.weights.sum(axis=1)]

    def counts_before(self, samples: np.ndarray) -> np.ndarray:
        """Return the sums of the rates over the phase's first samples, float64 [points, tasks].

        samples: int64 [points]
        """
        bounds = self.bounds.astype(np.int64)
        pieces = np.clip(np.searchsorted(bounds, samples, side="right") - 1, 0, len(bounds) - 2)
        before = np.zeros((len(bounds), len(self.weights)))
        np.cumsum(self.weights.T / self.unit, axis=0, out=before[1:])
        part = (samples - bounds[pieces]) / np.diff(bounds)[pieces]
        inside: np.ndarray = before[pieces] + part[:, np.newaxis] * (
            before[pieces + 1] - before[pieces]
        )
        return inside


def resolution(tasks: int) -> int:
    """Return the pieces of a phase that has enough samples."""
    return max(FEWEST_PIECES, min(MOST_PIECES, MOST_WEIGHTS // tasks))


def piece_bounds(samples: int, tasks: int) -> np.ndarray:
    """Return where the pieces of a phase begin, and its samples: int64 [pieces + 1]."""
    pieces = min(resolution(tasks), samples)
    return np.arange(pieces + 1) * samples // pieces


def averages(rates_at: RatesAt, bounds: np.ndarray, tasks: int) -> np.ndarray:
    """Return the averages of the curves in every piece, float64 [pieces, tasks], by Simpson's rule
    on at least `resolution(tasks)` intervals of the phase."""
    pieces, samples = len(bounds) - 1, int(bounds[-1])
    intervals = -(-resolution(tasks) // pieces)
    weights = np.ones(2 * intervals + 1)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    weights /= 6 * intervals
    found = np.empty((pieces, tasks))
    inside = np.arange(2 * intervals + 1) / (2 * intervals)
    stride = max(1, _AT_A_TIME // (len(inside) * tasks))
    for first in range(0, pieces, stride):
        begin = bounds[first : first + stride + 1][:, np.newaxis]
        points = (begin[:-1] + (begin[1:] - begin[:-1]) * inside) / samples
        rates = rates_at(points.ravel()).reshape(*points.shape, tasks)
        total = np.zeros((len(points), tasks))
        for number, weight in enumerate(weights.tolist()):
            total += weight * rates[:, number]
        found[first : first + len(points)] = total
    return found


def mean_rates(rates_at: RatesAt, tasks: int) -> np.ndarray:
    """Return the averages of the curves over the whole phase, float64 [tasks]."""
    pieces = resolution(tasks)
    found: np.ndarray = averages(rates_at, np.arange(pieces + 1), tasks).sum(axis=0) / pieces
    return found


class OnlyCappedTasksError(Exception):
    """Nothing but capped tasks has a rate in a piece.

    fraction: of the phase's samples before that piece
    limits:   the capped tasks
    """

    def __init__(self, fraction: float, limits: list[int]) -> None:
        super().__init__(fraction, limits)
        self.fraction = fraction
        self.limits = limits


def capped(rates: np.ndarray, sizes: np.ndarray, room: np.ndarray) -> list[int]:
    """Scale the curves of tasks that exceed their room, in place; return these tasks.

    A curve that exceeds its room is multiplied by one factor, so that its sum over the phase is the
    room; what that frees in a piece goes to the other tasks in proportion to their rates there.
    That is repeated until no task exceeds its room. If all do, up to rounding, the one with the
    most room gets what the others leave.

    rates: float64 [pieces, tasks]
    sizes: float64 [pieces, 1], samples of the pieces
    room:  int64 [tasks], the most samples of a task
    """
    limits: list[int] = []
    is_free = np.ones(rates.shape[1], bool)
    takes_part = rates.any(axis=0)
    while True:
        totals = (rates * sizes).sum(axis=0)
        # Rounding must not let a task exceed its room.
        over = is_free & (totals > room * (1 - 1e-12))
        if not over.any():
            return limits
        if not (is_free & ~over & takes_part).any():
            over[np.argmax(np.where(over, room, -1))] = False
            if not over.any():
                return limits
        found = np.flatnonzero(over)
        rates[:, found] *= room[found] / totals[found]
        limits += found.tolist()
        is_free[found] = False
        left = 1 - rates[:, ~is_free].sum(axis=1)
        free = rates[:, is_free].sum(axis=1)
        if (free <= 0).any():
            raise OnlyCappedTasksError(float(np.argmax(free <= 0)) / len(rates), limits)
        rates[:, is_free] *= (left / free)[:, np.newaxis]


def integer_pieces(
    rates: np.ndarray, bounds: np.ndarray, room: np.ndarray, limits: list[int]
) -> tuple[np.ndarray, int]:
    """Return the rates as the weights, uint64 [tasks, pieces], and the unit of `RatePieces`.

    A task in `limits` gets exactly its room. Every piece's largest task that is not there, and has
    a rate, takes what rounding leaves.

    rates: float64 [pieces, tasks]
    """
    samples = int(bounds[-1])
    unit = LARGEST_TOTAL // samples
    totals = np.diff(bounds) * unit
    weights = np.rint(rates * totals[:, np.newaxis]).astype(np.int64)
    for task in limits:
        most = int(room[task]) * unit
        ends = np.minimum(np.rint(np.cumsum(rates[:, task] * totals)).astype(np.int64), most)
        ends[-1] = most
        weights[:, task] = np.diff(ends, prepend=0)
    free = weights.copy()
    free[:, limits] = -1
    free[:, ~rates.any(axis=0)] = -1
    largest = free.argmax(axis=1)
    each = np.arange(len(weights))
    weights[each, largest] += totals - weights.sum(axis=1)
    if (weights < 0).any():
        piece = int(np.argmax((weights < 0).any(axis=1)))
        raise OnlyCappedTasksError(piece / len(weights), limits)
    return np.ascontiguousarray(weights.T).astype(np.uint64), unit
