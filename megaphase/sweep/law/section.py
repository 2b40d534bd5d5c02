"""The section on laws in the page of a sweep, and a page of its own for the laws of several."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from markupsafe import Markup

from megaphase.report.numbers import Row, write_table
from megaphase.report.page import Cell, PageTable, Plot, draw_plot, render
from megaphase.report.report_files import NUMBERS_FOLDER, PLOTS_FOLDER, PageContent, write_page
from megaphase.report.run_page import NOTHING
from megaphase.sweep.law.figure import predictions_plot
from megaphase.sweep.law.law import RULE, TaskLaw
from megaphase.sweep.law.sweep_law import SweepLaw

SHOWN_FORMS = 6
CAPTION = (
    "Every point is a setting, by its arm: filled, predicted by the law fitted to all settings; "
    "hollow, by one fitted to the others. On the line they agree. Bars: one standard error of the "
    "measured mean, from the noise pooled over the settings."
)


def law_section(law: SweepLaw, out: Path) -> Markup:
    """Return the section; its plot is written into the report's folder `out`."""
    drawn = None
    if law.laws:
        plot = Plot("law", "Predicted and measured losses", CAPTION,
                    partial(predictions_plot, law.laws, law.rows.arms))  # fmt: skip
        drawn = draw_plot(plot, out, PLOTS_FOLDER)
    return render(
        "law.html",
        reason=law.reason,
        verdicts=[(each.fits, verdict_sentence(each)) for each in law.laws],
        notes=law.left_out_terms if law.laws else [],
        rule=RULE,
        forms=_forms_table(law),
        parameters=_parameters_table(law),
        figure=drawn,
    )


def write_law_page(law: SweepLaw, sweeps: Sequence[str], out: Path) -> Path:
    """Write a report on the laws of sweeps alone, as `write_page` does; return its page.

    Raises:
        InputError: `out` contains anything other than an earlier report.
    """
    rows = law.rows.rows
    sizes, steps = law.sizes, sorted({row.steps for row in rows})
    lead = f"{law.settings} settings, {len(rows)} runs"
    if rows:
        lead += (
            f"; {_range(sizes)} parameters without embeddings and output projection, "
            f"{_range(steps)} steps"
        )

    def content(folder: Path) -> PageContent:
        section = law_section(law, folder)
        article = render("laws.html", name=", ".join(sweeps), lead=f"{lead}.", law=section)
        (folder / NUMBERS_FOLDER).mkdir()
        return PageContent([article], write_law_numbers(law, folder / NUMBERS_FOLDER))

    return write_page(out, "Laws", content)


def _range(values: Sequence[int]) -> str:
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


def verdict_sentence(law: TaskLaw) -> str:
    """Return whether the law of a task fits, with its error and the noise."""
    error, noise, of_run = law.chosen.error, law.means.noise_of_mean, law.means.noise
    if noise is None or of_run is None:
        return f"{law.task}: not judged, the noise between seeds is not known"
    numbers = (
        f"left-out settings are predicted with an error of {error:.3f} nats; the noise of a "
        f"setting’s mean is {noise:.3f}, of a run {of_run:.3f}"
    )
    if not law.fits:
        assert law.tolerance is not None
        return (
            f"{law.task}: no law fits; {numbers}, and at most {law.tolerance:.3f} would do. The "
            f"best form is “{law.chosen.form.name}”"
        )
    if law.is_constant:
        return f"{law.task}: no setting changes the loss by more than the noise; {numbers}"
    return f"{law.task}: the form “{law.chosen.form.name}” fits; {numbers}"


def _forms_table(law: SweepLaw) -> PageTable | None:
    if not law.laws:
        return None
    rows: list[list[str | Cell]] = []
    for each in law.laws:
        shown = [*each.tried[:SHOWN_FORMS]]
        shown += [
            tried
            for tried in each.tried[SHOWN_FORMS:]
            if tried is each.chosen or tried.form.core == "constant"
        ]
        for tried in shown:
            is_chosen = tried is each.chosen
            rows.append(
                [
                    each.task,
                    Cell(tried.form.name, bold=is_chosen),
                    f"{tried.parameters}",
                    Cell(f"{tried.error:.3f}", bold=is_chosen),
                    f"{tried.error_within:.3f}",
                    _nats(each.means.noise_of_mean),
                ]
            )
    note = (
        "Errors: root mean squares over the settings, in nats. Left out: each setting predicted "
        "from the others, all of its seeds left out. Bold, of the forms whose errors are not "
        "clearly above the lowest: the constant, or else the one of the tokens D with the fewest "
        "parameters. The forms are in docs/recommend.md; all are in law_forms.csv."
    )
    columns: list[str | Cell] = [
        "task", "form", "parameters", "error, left out", "error, fitted", "noise of a mean",
    ]  # fmt: skip
    return PageTable(columns, rows, note)


def _parameters_table(law: SweepLaw) -> PageTable | None:
    rows: list[list[str | Cell]] = [
        [task, name, f"{value:.4g}", NOTHING if math.isnan(half) else f"± {half:.2g}"]
        for task, _, name, value, half in _parameters(law)
    ]
    if not rows:
        return None
    note = (
        "± half of a 95 % interval from the fit’s Jacobian and Student’s t; none for a parameter "
        "at its bound. Units: D and U in 10,000 tokens, N in millions of parameters without "
        "embeddings. From the logarithms in terms of the schedule, where N is in parameters and "
        "tokens are those of the last phase, their means over the settings are subtracted."
    )
    return PageTable(["task", "parameter", "value", "interval"], rows, note)


def _parameters(law: SweepLaw) -> Iterator[tuple[str, str, str, float, float]]:
    for each in law.laws:
        fit = each.fit
        for name, value, half in zip(
            fit.parameter_names, fit.values, each.half_widths(), strict=True
        ):
            yield each.task, each.chosen.form.name, name, float(value), float(half)
        yield from (
            (each.task, each.chosen.form.name, name, value, math.nan)
            for name, value in each.chosen.form.centers
        )


def _nats(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def write_law_numbers(law: SweepLaw, folder: Path) -> list[str]:
    """Write the tables into the folder of numbers; return the names of the files."""
    if not law.laws:
        return []
    tables: dict[str, tuple[list[str], Iterator[Row]]] = {
        "law_forms": (
            ["task", "form", "parameters", "left_out_error", "refitted", "fitted_error",
             "noise_of_mean", "noise_of_run", "chosen", "fits"],
            _form_rows(law),
        ),
        "law_parameters": (
            ["task", "form", "parameter", "value", "half_width"],
            ([*row[:3], rounded(row[3]), None if math.isnan(row[4]) else rounded(row[4])]
             for row in _parameters(law)),
        ),
        "law_predictions": (
            ["task", "sweep", "arm", "model", "setting", "peak", "seeds", "parameters", "steps",
             "tokens", "epochs", "measured", "fitted", "left_out"],
            _prediction_rows(law),
        ),
    }  # fmt: skip
    return [
        write_table(folder / f"{name}.csv", columns, rows)
        for name, (columns, rows) in tables.items()
    ]


def rounded(value: float) -> float:
    """Return a number with six digits: those after them depend on the machine."""
    return float(f"{value:.6g}")


def _form_rows(law: SweepLaw) -> Iterator[Row]:
    for each in law.laws:
        noise = [None if value is None else rounded(value)
                 for value in (each.means.noise_of_mean, each.means.noise)]  # fmt: skip
        for tried in each.tried:
            is_chosen = tried is each.chosen
            yield [
                each.task, tried.form.name, tried.parameters, rounded(tried.error), tried.refitted,
                rounded(tried.error_within), *noise, is_chosen, each.fits if is_chosen else None,
            ]  # fmt: skip


def _prediction_rows(law: SweepLaw) -> Iterator[Row]:
    for each in law.laws:
        fitted = each.fit.predict(each.fit.table)
        for i, row in enumerate(each.means.rows):
            setting = row.setting
            assert setting is not None
            measured = float(each.means.losses[i])
            yield [
                each.task, row.sweep, setting.arm, setting.model, setting.label, setting.peak,
                int(each.means.counts[i]), row.parameters, row.steps, round(row.tokens(each.task)),
                rounded(row.epochs(each.task)), rounded(measured), rounded(float(fitted[i])),
                rounded(measured - float(each.chosen.errors[i])),
            ]  # fmt: skip
