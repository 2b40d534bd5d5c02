"""Least squares of one form: nonlinear parameters by scipy, coefficients exactly within it.

For given nonlinear parameters the best coefficients follow from linear least squares, those that
must not be negative included (variable projection, Golub and Pereyra 1973). So only a few
parameters are searched for, from several starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from scipy.optimize import least_squares, nnls

from megaphase.sweep.law.forms import Bounded, Column, Form
from megaphase.sweep.law.table import SettingTable, Vector

MOST_STARTS = 6
SEED = 1
AT_BOUND = 1e-6  # of the interval's width


@dataclass(frozen=True)
class Fit:
    """A fitted form.

    Attributes:
        at: values of the nonlinear parameters.
        names, coefficients: of the linear ones.
        counts: seeds of each setting, its weight.
    """

    form: Form
    at: tuple[float, ...]
    names: tuple[str, ...]
    coefficients: Vector
    table: SettingTable
    losses: Vector
    counts: Vector

    def predict(self, table: SettingTable) -> Vector:
        """Return the losses of settings."""
        return _product(self.form.columns(table, self.at), self.coefficients)

    @cached_property
    def residuals(self) -> Vector:
        """Measured minus fitted losses."""
        residuals: Vector = self.losses - self.predict(self.table)
        return residuals

    @property
    def parameter_names(self) -> list[str]:
        """Names of all parameters: the coefficients, then the nonlinear ones."""
        return [*self.names, *(each.name for each in self.form.nonlinear)]

    @property
    def values(self) -> Vector:
        """Values of all parameters."""
        return np.array([*self.coefficients, *self.at])

    @cached_property
    def is_free(self) -> np.ndarray:
        """Which parameters lie within their bounds, and not at one [parameters]."""
        first = self.form.columns(self.table, self.at)
        linear = [
            column.sign == "free" or value > 1e-9
            for column, value in zip(first, self.coefficients, strict=True)
        ]
        nonlinear = []
        for each, value in zip(self.form.nonlinear, self.at, strict=True):
            low, high, here = (
                _scaled(each, each.low),
                _scaled(each, each.high),
                _scaled(each, value),
            )
            room = AT_BOUND * (high - low)
            nonlinear.append(low + room < here < high - room)
        matters = np.any(np.abs(self.gradient(self.table)) > 1e-12, axis=0)
        free: np.ndarray = np.array([*linear, *nonlinear]) & matters
        return free

    def gradient(self, table: SettingTable) -> np.ndarray:
        """Return the derivatives of losses by all parameters [settings, parameters]."""
        columns = [column.values for column in self.form.columns(table, self.at)]
        for i, each in enumerate(self.form.nonlinear):
            step = 1e-4 * max(abs(self.at[i]), 1e-4)
            ends = []
            for sign in (1, -1):
                value = min(max(self.at[i] + sign * step, each.low), each.high)
                moved = (*self.at[:i], value, *self.at[i + 1 :])
                ends.append((value, _product(self.form.columns(table, moved), self.coefficients)))
            (above, upper), (below, lower) = ends
            columns.append((upper - lower) / (above - below))
        return np.stack(columns, axis=1)

    @cached_property
    def information(self) -> np.ndarray:
        """The information matrix of the free parameters, in units of one seed's variance."""
        gradient = self.gradient(self.table)[:, self.is_free]
        weighted: np.ndarray = gradient.T @ (self.counts[:, None] * gradient)
        return weighted

    @property
    def freedom(self) -> int:
        """Settings minus parameters that are free."""
        return len(self.losses) - int(self.is_free.sum())

    @property
    def leverages(self) -> Vector:
        """The weight of each setting's own loss in its fitted value [settings]."""
        gradient = self.gradient(self.table)[:, self.is_free] * np.sqrt(self.counts)[:, None]
        leverages: Vector = np.sum((gradient @ inverse(self.information)) * gradient, axis=1)
        return leverages

    @property
    def left_out_errors(self) -> Vector:
        """Approximate errors of each setting's prediction from the others, without new fits."""
        errors: Vector = self.residuals / np.maximum(1 - self.leverages, 1e-3)
        return errors


def inverse(information: np.ndarray) -> np.ndarray:
    """Return the inverse of an information matrix, whose parameters may differ in scale by much.

    Directions without information have a huge, not an infinite variance.
    """
    scale = 1 / np.sqrt(np.maximum(np.diag(information), 1e-300))
    scaled = information * np.outer(scale, scale)
    values, vectors = np.linalg.eigh(scaled)
    values = np.maximum(values, 1e-12)
    inverted: np.ndarray = (vectors / values) @ vectors.T * np.outer(scale, scale)
    return inverted


def fit_form(
    form: Form,
    table: SettingTable,
    losses: Vector,
    counts: Vector,
    starts: Sequence[Sequence[float]] = (),
) -> Fit:
    """Fit a form to the mean losses of settings, each with the weight of its seeds.

    starts: values of the nonlinear parameters; by default several are tried, always the same.
    """
    unknown = form.nonlinear
    weights = np.sqrt(counts / np.mean(counts))

    def solve(x: Sequence[float]) -> tuple[list[Column], Vector, Vector]:
        at = [_unscaled(each, value) for each, value in zip(unknown, x, strict=True)]
        columns = form.columns(table, at)
        return columns, *_coefficients(columns, losses, weights)

    best: tuple[float, ...] = ()
    if unknown:
        low = [_scaled(each, each.low) for each in unknown]
        high = [_scaled(each, each.high) for each in unknown]
        least = np.inf
        for first in starts or _starts(unknown):
            x = [_scaled(each, value) for each, value in zip(unknown, first, strict=True)]
            room = [1e-3 * (b - a) for a, b in zip(low, high, strict=True)]
            x = list(np.clip(x, np.add(low, room), np.subtract(high, room)))
            found = least_squares(
                lambda each: solve(each)[2], x, bounds=(low, high), max_nfev=30,
                ftol=1e-6, xtol=1e-6,
            )  # fmt: skip
            if found.cost < least:
                least, best = found.cost, tuple(float(value) for value in found.x)
    columns, coefficients, _ = solve(best)
    at = tuple(_unscaled(each, value) for each, value in zip(unknown, best, strict=True))
    names = tuple(column.name for column in columns)
    return Fit(form, at, names, coefficients, table, losses, counts)


def nested_starts(form: Form, simpler: Fit) -> list[tuple[float, ...]]:
    """Return starts at a fit of a form with fewer parameters, with all starts of the new ones."""
    known = dict(zip((each.name for each in simpler.form.nonlinear), simpler.at, strict=True))
    return list(
        product(*([known[each.name]] if each.name in known else each.starts
                  for each in form.nonlinear))
    )  # fmt: skip


def _starts(unknown: Sequence[Bounded]) -> list[tuple[float, ...]]:
    every = list(product(*(each.starts for each in unknown)))
    if len(every) <= MOST_STARTS:
        return every
    chosen = np.random.default_rng(SEED).choice(len(every), MOST_STARTS, replace=False)
    return [every[i] for i in sorted(chosen)]


def _coefficients(
    columns: Sequence[Column], losses: Vector, weights: Vector
) -> tuple[Vector, Vector]:
    """Return the best coefficients and the weighted residuals.

    Those that may be negative are a difference of two.
    """
    free = [i for i, column in enumerate(columns) if column.sign == "free"]
    matrix = np.array([column.values for column in columns]) * weights
    scale = np.maximum(np.sqrt(np.einsum("ij,ij->i", matrix, matrix)), 1e-12)
    matrix /= scale[:, None]
    wanted = weights * losses
    try:
        found, _ = nnls(np.concatenate([matrix, -matrix[free]]).T, wanted)
    except RuntimeError:  # too many iterations, on the way to a bad start
        found = np.zeros(len(matrix) + len(free))
    coefficients = found[: len(columns)]
    coefficients[free] -= found[len(columns) :]
    return coefficients / scale, wanted - coefficients @ matrix


def _product(columns: Sequence[Column], coefficients: Vector) -> Vector:
    total: Vector = np.stack([column.values for column in columns], axis=1) @ coefficients
    return total


def _scaled(each: Bounded, value: float) -> float:
    return float(np.log(value)) if each.log else value


def _unscaled(each: Bounded, value: float) -> float:
    return float(np.exp(value)) if each.log else float(value)
