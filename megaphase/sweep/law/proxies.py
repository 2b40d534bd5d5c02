"""Which further runs would narrow a prediction most.

A further run adds its gradient to the information matrix of the law's parameters. Linearized, its
effect on the variance of the prediction is known before it is trained (a sequential design that is
optimal for one prediction, c-optimality; for all predictions it would be G-optimality).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from megaphase.sweep.law.candidates import Candidate, recipes_of
from megaphase.sweep.law.fitting import inverse
from megaphase.sweep.law.law import TaskLaw
from megaphase.sweep.law.rows import LawRow, LawRows
from megaphase.sweep.law.table import SettingTable

PROXIES = 3
DEAREST = 2.0  # times the costliest run of the sweep, in parameters times tokens
LARGER = (1.0, 2.0)


@dataclass(frozen=True)
class Proxy:
    """A further run.

    Attributes:
        model: the sweep's of this size, if it has a name.
        left: of the variances of the named tasks' predictions, with this run and those before it,
            as a fraction.
    """

    candidate: Candidate
    parameters: int
    model: str | None
    steps: int
    left: float


@dataclass(frozen=True)
class _Option:
    candidate: Candidate
    row: LawRow
    parameters: int

    @property
    def cost(self) -> float:
        return self.parameters * self.row.total_tokens


def best_proxies(laws: Sequence[TaskLaw], rows: LawRows, predicted: LawRow) -> list[Proxy]:
    """Return up to three runs, each the one that narrows the predictions most after those before.

    laws: of the tasks that count, equally. predicted: the run whose losses are predicted.
    """
    options = _options(rows)
    gradients = [_gradients(law, options) for law in laws]
    wanted = [
        law.fit.gradient(SettingTable.of([predicted], law.task))[0, law.fit.is_free] for law in laws
    ]
    information = [law.fit.information.copy() for law in laws]
    before = [_variance(matrix, at) for matrix, at in zip(information, wanted, strict=True)]
    names = {row.parameters: row.setting.model for row in rows.rows if row.setting is not None}
    found: list[Proxy] = []
    taken: list[int] = []
    for _ in range(min(PROXIES, len(options))):
        left = np.zeros(len(options))
        for matrix, rows_of, at, first in zip(information, gradients, wanted, before, strict=True):
            covariance = inverse(matrix)
            direction = covariance @ at
            gain = (rows_of @ direction) ** 2
            noise = 1 + np.sum((rows_of @ covariance) * rows_of, axis=1)
            left += (at @ direction - gain / noise) / max(first, 1e-300) / len(laws)
        left[taken] = np.inf
        # Of equally good ones the cheapest, which come first.
        best = int(np.argmax(left <= left.min() + 0.01))
        taken.append(best)
        chosen = options[best]
        for i, rows_of in enumerate(gradients):
            information[i] = information[i] + np.outer(rows_of[best], rows_of[best])
        found.append(
            Proxy(
                chosen.candidate,
                chosen.parameters,
                names.get(chosen.parameters),
                chosen.row.steps,
                float(left[best]),
            )
        )
    return found


def _variance(information: np.ndarray, at: np.ndarray) -> float:
    return float(at @ inverse(information) @ at)


def _options(rows: LawRows) -> list[_Option]:
    """Return possible runs within the sweep's range, up to twice its largest model or budget."""
    largest = max(rows.rows, key=lambda row: (row.parameters, row.steps))
    models = {row.parameters: row.model for row in rows.rows}
    sizes = [*models, round(max(models) * max(LARGER))]
    dearest = DEAREST * max(row.parameters * row.total_tokens for row in rows.rows)
    step_tokens = round(largest.total_tokens / largest.steps)
    found = []
    for recipe, size, factor in product(recipes_of(rows), sizes, LARGER):
        steps = round(max(row.steps for row in rows.rows) * factor)
        model = models.get(size, largest.model)
        for share, rate, last in product(
            recipe.share.values(3, log=False), recipe.rate.values(4), recipe.last_peak.values(2)
        ):
            first = last if recipe.one_peak else recipe.first_peak.high
            candidate = Candidate(recipe, share, rate, first, last)
            row = candidate.row(rows, model, steps, step_tokens, largest.unique)
            option = _Option(candidate, row, size)
            if option.cost <= dearest * 1.001:
                found.append(option)
    return sorted(found, key=lambda option: option.cost)


def _gradients(law: TaskLaw, options: Sequence[_Option]) -> np.ndarray:
    """Return the derivatives of every option's loss by the free parameters."""
    table = SettingTable.of([option.row for option in options], law.task)
    sizes = np.array([float(option.parameters) for option in options])
    gradients: np.ndarray = law.fit.gradient(replace(table, parameters=sizes))[:, law.fit.is_free]
    return gradients
