"""The law of a task's loss: the form that predicts settings best that it was not fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.special import stdtrit

from megaphase.sweep.law.fitting import Fit, fit_form, inverse, nested_starts
from megaphase.sweep.law.forms import Form, forms_of, scope_of
from megaphase.sweep.law.rows import LawRow
from megaphase.sweep.law.table import Means, SettingTable, Vector, means_of, setting_groups

FEWEST_SETTINGS = 8
SPARE_SETTINGS = 3  # more than parameters
# Settings are left out one by one; of more than these, in so many groups.
MOST_LEFT_OUT_ALONE, GROUPS = 100, 10
REFITTED = 4  # forms whose errors are computed by fits without each setting
NEAR_NOISE = 2.0
NEGLIGIBLE_NATS = 0.02
MOST_NATS = 0.1
NO_EFFECT_NATS = 1e-4
CONFIDENCE = 0.95
RULE = (
    f"A law fits if the root mean square of its errors, each setting left out in turn with all of "
    f"its seeds (of more than {MOST_LEFT_OUT_ALONE} settings, {GROUPS} groups in turn), is at most "
    f"{NEAR_NOISE:g} times the noise of a setting's mean, or at most {NEGLIGIBLE_NATS:g} nats, "
    f"and in no case more than {MOST_NATS:g}."
)


@dataclass(frozen=True)
class TriedForm:
    """A form and its errors.

    Attributes:
        errors: measured minus predicted, of each setting, from a fit to the others [settings].
        refitted: whether there was such a fit for each; otherwise by the leverages of one fit,
            which for a linear form is the same.
    """

    fit: Fit
    errors: Vector
    refitted: bool

    @property
    def form(self) -> Form:
        return self.fit.form

    @property
    def error(self) -> float:
        """The root mean square of the errors, in nats."""
        return _root_mean_square(self.errors)

    @property
    def error_within(self) -> float:
        """The root mean square of the residuals of the fit to all settings."""
        return _root_mean_square(self.fit.residuals)

    @property
    def parameters(self) -> int:
        return len(self.fit.parameter_names)


@dataclass(frozen=True)
class TaskLaw:
    """The law of one task.

    Attributes:
        tried: all forms, best first.
        near: the forms that are not clearly worse than the best.
        chosen: the simplest of them.
    """

    task: str
    means: Means
    tried: Sequence[TriedForm]
    near: Sequence[TriedForm]
    chosen: TriedForm

    @property
    def tolerance(self) -> float | None:
        """The largest error with which a law fits; None if the noise is not known."""
        noise = self.means.noise_of_mean
        return None if noise is None else min(max(NEAR_NOISE * noise, NEGLIGIBLE_NATS), MOST_NATS)

    @property
    def fits(self) -> bool:
        """Whether the errors are near the noise."""
        return self.tolerance is not None and self.chosen.error <= self.tolerance

    @cached_property
    def depends_on_size(self) -> bool:
        """Whether the loss depends on the number of parameters."""
        table = self.fit.table
        larger = replace(table, parameters=2 * table.parameters)
        change = np.abs(self.fit.predict(larger) - self.fit.predict(table))
        return float(change.max()) > NO_EFFECT_NATS

    @property
    def is_constant(self) -> bool:
        """Whether the loss does not depend on the setting, as far as the sweep shows."""
        return self.chosen.form.core == "constant"

    @property
    def fit(self) -> Fit:
        return self.chosen.fit

    @cached_property
    def variance(self) -> float:
        """The variance of one seed: that of the residuals or of the noise, whichever is more."""
        fit = self.fit
        of_residuals = float(np.sum(fit.counts * fit.residuals**2)) / max(fit.freedom, 1)
        return max(of_residuals, (self.means.noise or 0.0) ** 2, 1e-12)

    @cached_property
    def covariance(self) -> np.ndarray:
        """Of the free parameters, linearized at the fit."""
        covariance: np.ndarray = self.variance * inverse(self.fit.information)
        return covariance

    @property
    def quantile(self) -> float:
        """Of Student's t, for two-sided intervals."""
        return float(stdtrit(max(self.fit.freedom, 1), (1 + CONFIDENCE) / 2))

    def half_widths(self) -> Vector:
        """Return half of each parameter's interval; NaN for one at its bound."""
        widths = np.full(len(self.fit.values), np.nan)
        widths[self.fit.is_free] = self.quantile * np.sqrt(np.diag(self.covariance))
        return widths

    def predict(self, rows: Sequence[LawRow]) -> tuple[Vector, Vector]:
        """Return the losses of settings, and half of their 95 % intervals.

        The interval is that of the parameters and of the errors of left-out settings, and it covers
        what the other forms that are near the best predict. It does not know whether any of them
        still holds outside of the sweep's range.
        """
        table = SettingTable.of(rows, self.task)
        gradient = self.fit.gradient(table)[:, self.fit.is_free]
        of_parameters = np.sum((gradient @ self.covariance) * gradient, axis=1)
        losses = self.fit.predict(table)
        others = [each.fit for each in self.near if self._is_alternative(each)]
        spread = np.zeros(len(losses))
        for fit in others:
            spread = np.maximum(spread, np.abs(fit.predict(table) - losses))
        within = self.quantile**2 * (of_parameters + self.chosen.error**2)
        widths: Vector = np.sqrt(within + spread**2)
        return losses, widths

    def _is_alternative(self, each: TriedForm) -> bool:
        form = self.chosen.form
        return each.refitted and each.form.depends_on_tokens >= form.depends_on_tokens


def fit_laws(rows: Sequence[LawRow], tasks: Sequence[str]) -> list[TaskLaw]:
    """Fit a law for every task.

    rows: measured ones, for which `cannot_be_fitted` finds no reason.
    """
    groups = setting_groups(rows)
    return [_task_law(groups, task) for task in tasks]


def cannot_be_fitted(rows: Sequence[LawRow]) -> str | None:
    """Return why no law is fitted to these rows, or None."""
    groups = setting_groups(rows)
    if len(groups) < FEWEST_SETTINGS:
        return (
            f"a law needs {FEWEST_SETTINGS} settings or more that have ended, without other values "
            f"of the run file and with the weights of the last step; there are {len(groups)}"
        )
    if all(len(group) < 2 for group in groups):
        return "a law is judged by the noise between seeds, and every setting has one seed"
    return None


def _task_law(groups: Sequence[Sequence[LawRow]], task: str) -> TaskLaw:
    means = means_of(groups, task)
    table = SettingTable.of(means.rows, task)
    forms = forms_of(scope_of(table))
    fits: list[Fit] = []
    for form in forms:
        # From the fit of a form that it contains, which has been made before.
        nested = next((each for each in reversed(fits) if form.contains(each.form)), None)
        starts = [] if nested is None else nested_starts(form, nested)
        fits.append(fit_form(form, table, means.losses, means.counts, starts))
    most = len(means.losses) - SPARE_SETTINGS
    possible = [fit for fit in fits if len(fit.parameter_names) <= most] or fits[:1]
    ranked = sorted(possible, key=lambda fit: _root_mean_square(fit.left_out_errors))
    tried = [
        _refitted(fit) if i < REFITTED else TriedForm(fit, fit.left_out_errors, False)
        for i, fit in enumerate(ranked)
    ]
    tried.sort(key=lambda each: each.error)
    near = _near_best(tried)
    return TaskLaw(task, means, tried, near, _simplest(near))


def _refitted(fit: Fit) -> TriedForm:
    """Return a form with the errors of fits without each setting, from the fit to all."""
    count = len(fit.losses)
    errors = np.empty(count)
    for left_out in _left_out_together(count):
        others = np.setdiff1d(np.arange(count), left_out)
        without = fit_form(
            fit.form,
            fit.table.take(others),
            fit.losses[others],
            fit.counts[others],
            [fit.at],
        )
        predicted = without.predict(fit.table.take(left_out))
        errors[left_out] = fit.losses[left_out] - predicted
    return TriedForm(fit, errors, True)


def _left_out_together(settings: int) -> list[np.ndarray]:
    """Return the indices that are left out in turn: each one, or groups if they are many."""
    order = np.arange(settings)
    if settings > MOST_LEFT_OUT_ALONE:
        # Neighbours are alike, so they are put into different groups.
        return [order[first::GROUPS] for first in range(GROUPS)]
    return list(order[:, None])


def _near_best(tried: Sequence[TriedForm]) -> list[TriedForm]:
    """Return the forms whose squared errors exceed those of the best by at most one standard error
    of the paired differences."""
    best = min((each for each in tried if each.refitted), key=lambda each: each.error)

    def is_near(each: TriedForm) -> bool:
        excess = each.errors**2 - best.errors**2
        return float(np.mean(excess)) <= float(np.std(excess, ddof=1) / np.sqrt(len(excess)))

    return [each for each in tried if each is best or is_near(each)]


def _simplest(near: Sequence[TriedForm]) -> TriedForm:
    """Return the form with the fewest parameters.

    The constant comes first, then the forms that hold for any number of tokens.
    """
    constant = [each for each in near if each.form.core == "constant"]
    of_tokens = [each for each in near if each.form.depends_on_tokens]
    return min(constant or of_tokens or near, key=lambda each: (each.parameters, each.error))


def _root_mean_square(values: Vector) -> float:
    return float(np.sqrt(np.mean(values**2)))
