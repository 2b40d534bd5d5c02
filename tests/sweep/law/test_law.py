"""Laws: one that is known is found again, none is found where there is none."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from law_support import EN, HI, MODEL, SMALL, TRUTH, lawful_rows, lawless_rows, row, true_loss

from megaphase.sweep.law.fitting import fit_form
from megaphase.sweep.law.forms import forms_of, scope_of
from megaphase.sweep.law.law import cannot_be_fitted, fit_laws
from megaphase.sweep.law.table import SettingTable, means_of, setting_groups


@cache
def known_law():
    (law,) = fit_laws(lawful_rows(models=(MODEL, SMALL), steps=(500, 1000)), ["hi"])
    return law


def test_a_known_law_is_found_with_its_parameters():
    law = known_law()
    assert law.fits
    assert law.chosen.form.core == "overfitting"
    assert law.chosen.form.order
    widths = dict(zip(law.fit.parameter_names, law.half_widths(), strict=True))
    values = dict(zip(law.fit.parameter_names, law.fit.values, strict=True))
    truth = {"E": HI["E"], "A": HI["A"], "B": HI["B"], "beta": HI["beta"], "P": HI["P"],
             "recency": HI["recency"], "kappa": HI["kappa"], "ln peak": HI["peak"]}  # fmt: skip
    for name, value in truth.items():
        if name == "E":  # the logarithm of the peak is centred differently
            value += HI["peak"] * (law.fit.form.scope.centers.peak - math.log(0.002))
        # 8 intervals of 95 % at once: 1.5 times each
        assert abs(values[name] - value) <= 1.5 * widths[name], name


def test_predictions_of_new_settings_lie_in_their_intervals():
    law = known_law()
    new = [
        row(rate, share, peak, model=MODEL, steps=1000)
        for rate in (0.02, 0.1, 0.3)
        for share in (0.0, 0.78)
        for peak in (0.0015, 0.003)
        if rate < 0.1 or share
    ]
    predicted, widths = law.predict(new)
    true = np.array([true_loss(each, "hi", HI) for each in new])
    assert np.all(np.abs(predicted - true) <= widths)
    assert np.all(widths < 0.05)


def test_noise_and_errors_are_those_of_the_generator():
    law = known_law()
    assert law.means.freedom == 2 * len(law.means.rows)
    assert law.means.noise == pytest.approx(0.02, rel=0.2)
    assert law.means.noise_of_mean == pytest.approx(law.means.noise / math.sqrt(3))
    assert law.chosen.error < law.tolerance
    constant = next(each for each in law.tried if each.form.core == "constant")
    assert constant.error > 10 * law.chosen.error


def test_a_best_peak_that_depends_on_size_and_length_is_found():
    """ln of the best peak falls with ln N and rises with ln of the last phase's tokens."""
    curvature, by_size, by_length = 0.06, -0.5, 0.3
    rows = []
    for each in lawful_rows(models=(MODEL, SMALL), steps=(500, 1000)):
        last = sum(each.phases[-1].tokens.values())
        best = by_size * math.log(each.parameters / 1e6) + by_length * math.log(last / 1e6)
        peak = math.log(each.phases[-1].peak / 0.002)
        extra = curvature * peak * (peak - 2 * best)  # the square without that of the best
        rows.append(replace(each, losses={task: n + extra for task, n in each.losses.items()}))
    (law,) = fit_laws(rows, ["en"])
    assert law.fits
    assert law.chosen.form.schedule == "peaks"
    values = dict(zip(law.fit.parameter_names, law.fit.values, strict=True))
    widths = dict(zip(law.fit.parameter_names, law.half_widths(), strict=True))
    for name, slope in (("ln peak x ln N", by_size), ("ln peak x ln tokens", by_length)):
        assert abs(values[name] + 2 * curvature * slope) <= 1.5 * widths[name], name
    plain = [each for each in law.tried if each.form.schedule == "main"]
    assert min(each.error for each in plain) > 1.5 * law.chosen.error


@pytest.mark.slow
def test_a_penalty_that_grows_with_parameters_for_the_text_is_found():
    truth = TRUTH | {"hi": HI | {"P": 0.04, "kappa": 1.0, "omega": 0.8}}
    (law,) = fit_laws(lawful_rows(models=(MODEL, SMALL), steps=(500, 1000), truth=truth), ["hi"])
    assert law.fits
    assert law.chosen.form.capacity
    values = dict(zip(law.fit.parameter_names, law.fit.values, strict=True))
    widths = dict(zip(law.fit.parameter_names, law.half_widths(), strict=True))
    assert abs(values["omega"] - 0.8) <= 1.5 * widths["omega"]
    plain = [each for each in law.tried if not each.form.capacity]
    assert min(each.error for each in plain) > 1.2 * law.chosen.error


def test_no_law_fits_losses_without_one():
    for law in fit_laws(lawless_rows(), ["en", "hi"]):
        assert not law.fits


def test_losses_that_only_vary_by_seed_are_constant():
    truth = dict.fromkeys(("en", "hi"), HI | {"A": 0.0, "B": 0.0, "P": 0.0, "peak": 0.0})
    (law,) = fit_laws(lawful_rows(truth=truth), ["hi"])
    assert law.fits
    assert law.is_constant


def test_left_out_errors_are_of_fits_to_the_other_settings():
    """Of the log-linear form, whose fit is a linear regression."""
    rows = lawful_rows()
    means = means_of(setting_groups(rows), "en")
    table = SettingTable.of(means.rows, "en")
    scope = scope_of(table)
    form = next(each for each in forms_of(scope) if each.core == "log-linear")
    fit = fit_form(form, table, means.losses, means.counts)
    matrix = np.stack(
        [np.ones(len(means.rows)), np.log(table.tokens), np.log(table.last_peak)], axis=1
    )
    for i in range(len(means.rows)):
        others = [j for j in range(len(means.rows)) if j != i]
        solution = np.linalg.lstsq(matrix[others], means.losses[others], rcond=None)[0]
        expected = means.losses[i] - matrix[i] @ solution
        assert fit.left_out_errors[i] == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_terms_that_a_sweep_cannot_identify_are_left_out():
    rows = lawful_rows()
    scope = scope_of(SettingTable.of([each[0] for each in setting_groups(rows)], "hi"))
    assert scope.sizes == scope.capacities == 1
    assert not any(form.capacity for form in forms_of(scope))
    assert "ln peak squared" not in scope.schedule  # two peaks
    assert "end" not in scope.schedule  # one schedule
    assert all("A" not in _names(form, rows) for form in forms_of(scope))
    both = lawful_rows(models=(MODEL, SMALL))
    scope = scope_of(SettingTable.of([each[0] for each in setting_groups(both)], "hi"))
    powers = [form for form in forms_of(scope) if form.core == "power"]
    assert all("A" in _names(form, both) for form in powers)
    assert all("alpha" not in [each.name for each in form.nonlinear] for form in powers)


def _names(form, rows):
    table = SettingTable.of(rows, "hi")
    at = [each.starts[0] for each in form.nonlinear]
    return [column.name for column in form.columns(table, at)]


def test_tokens_spread_over_the_run_have_weight_one():
    table = SettingTable.of([row(0.1, 0.0, 0.001), row(0.1, 0.8, 0.001)], "hi")
    for recency in (-3.0, 0.5, 4.0):
        static, late = table.order(recency)
        assert static == pytest.approx(1.0)
        points = 0.8 + 0.2 * (np.arange(1000) + 0.5) / 1000
        uniform = (np.arange(1000) + 0.5) / 1000
        expected = np.mean(np.exp(recency * points)) / np.mean(np.exp(recency * uniform))
        assert late == pytest.approx(expected, rel=1e-5)


def test_one_seed_or_few_settings_give_no_law():
    assert "one seed" in cannot_be_fitted(lawful_rows(seeds=1))
    few = [each for each in lawful_rows() if each.phases[0].tokens.get("hi")]
    assert "8 settings or more" in cannot_be_fitted(few)
    assert cannot_be_fitted(lawful_rows(seeds=2)) is None


@pytest.mark.slow
def test_english_has_the_same_law_without_repetition():
    (law,) = fit_laws(lawful_rows(models=(MODEL, SMALL), steps=(500, 1000)), ["en"])
    assert law.fits
    new = [row(0.02, 0.0, 0.002), row(0.2, 0.75, 0.002)]
    predicted, widths = law.predict(new)
    true = np.array([true_loss(each, "en", EN) for each in new])
    assert np.all(np.abs(predicted - true) <= widths)
