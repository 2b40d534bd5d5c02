"""`megaphase report`: one page, its plots and its numbers, on the results of one or more runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from megaphase.report.differences import differences
from megaphase.report.load_run import load_run
from megaphase.report.losses import (
    final_losses,
    lengths_note,
    newest_losses,
    task_verdicts,
    verdicts,
)
from megaphase.report.numbers import steps_of_a_row, write_numbers
from megaphase.report.report_files import (
    NUMBERS_FOLDER,
    PLOTS_FOLDER,
    PageContent,
    write_page,
)
from megaphase.report.run_page import NOTHING, comparison_article, run_article
from megaphase.report.runs import RunRecord
from megaphase.utils.errors import InputError
from megaphase.utils.files import real_path
from megaphase.utils.plot_style import line_colours
from megaphase.utils.run_files import CHECKPOINTS, METRICS_FILE

__all__ = ["final_losses", "load_run", "summary_table", "verdicts", "write_report"]


def each_with_a_run(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return the paths of runs that have begun, and the others, which a pattern such as `runs/*`
    matches, too.

    Those that do not exist count as runs, and so do all if there is no run among them: reading them
    says what is missing.
    """
    others = [path for path in paths if path.exists() and not _has_begun(path)]
    if len(others) == len(paths):
        return list(paths), []
    return [path for path in paths if path not in others], others


def _has_begun(path: Path) -> bool:
    return any((path / name).exists() for name in (METRICS_FILE, CHECKPOINTS))


def load_runs(run_dirs: Sequence[Path]) -> list[RunRecord]:
    """Read run directories, each of them once, and give the runs different names.

    Raises:
        InputError: a run directory is incomplete or damaged, or a run has no validation yet.
    """
    runs = _named_apart([load_run(path) for path in _each_once(run_dirs)])
    for run in runs:
        if not run.validation:
            raise InputError(
                run.directory / METRICS_FILE,
                *(
                    (f"has no validation row: {run.hole}", "restore it")
                    if run.hole
                    else (
                        "has no validation row yet",
                        "wait until the run has validated for the first time",
                    )
                ),
            )
    return runs


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write the report of the runs in these directories: `write_report_of` them.

    Raises:
        InputError: as `load_runs` and `write_report_of`.
    """
    return write_report_of(load_runs(run_dirs), out)


def write_report_of(runs: Sequence[RunRecord], out: Path) -> Path:
    """Write the report of these runs into the directory `out`; return the path of its page.

    `out` gets `index.html` (self-contained), `plots/` (PNG and SVG) and `numbers/` (CSV),
    atomically. An earlier report there is replaced.

    Raises:
        InputError: `out` contains anything other than an earlier report.
    """
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    return write_page(out, title, lambda folder: _content(runs, folder))


def summary_table(run: RunRecord) -> Table:
    """Return a table of validation losses per task, at the start and after each begun phase."""
    losses = {(loss.phase, loss.task): loss for loss in final_losses(run)}
    newest = newest_losses(run)
    found = {verdict.task: verdict for verdict in task_verdicts(run)}
    colours = {"better": "green", "worse": "red", "same": ""}
    phases = run.phases_begun
    title = Text(f"{run.name}: validation loss, nats per token")
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
        collapse_padding=True,
    )  # fmt: skip
    table.add_column("task", overflow="fold")
    columns = [f"{'after' if run.phase_is_over(p) else 'now in'} {p.name}" for p in phases]
    if note := lengths_note([run]):
        table.caption, table.caption_justify = Text(note), "left"
    change = "since switch" if run.switches else "change"
    epochs = "epochs in all" if run.origin.step else "epochs"
    for column in ("at start", *columns, change, "bits/byte", epochs):
        # Where there is no room, a header is broken between its words, or within a long one.
        table.add_column(Text(column), justify="right", overflow="fold")
    for task in run.tasks:
        if task not in newest:
            continue
        ends = [losses.get((phase.name, task)) for phase in phases]
        start = next(loss.start for loss in ends if loss is not None)
        verdict = found[task]
        group = "low" if verdict.group == "low-resource" else verdict.group
        table.add_row(
            Text(f"{task} ({group})" if group else task),
            f"{start:.3f}",
            *(NOTHING if loss is None else f"{loss.end:.3f}" for loss in ends),
            NOTHING
            if verdict.change is None
            else Text(f"{verdict.change:+.3f}", style=colours[verdict.outcome]),
            f"{newest[task].end_bits_per_byte:.3f}",
            f"{run.planned_epochs(task):.2f}",
        )
    return table


def differences_table(runs: Sequence[RunRecord]) -> Table | None:
    """Return the settings in which several runs differ, a column for each; None if in none."""
    found = differences(runs)
    if not found:
        return None
    title = Text(f"What differs between the {len(runs)} runs")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("differs in", overflow="fold")
    for run in runs:
        table.add_column(Text(run.name), overflow="fold")
    for each in found:
        table.add_row(*map(Text, (each.setting, *each.values)))
    return table


def _content(runs: Sequence[RunRecord], folder: Path) -> PageContent:
    """Write plots and numbers into `folder`; return the page's content."""
    colours = line_colours(task for run in runs for task in run.tasks)
    if len(runs) == 1:
        articles = [run_article(runs[0], colours, folder, PLOTS_FOLDER)]
    else:
        articles = [comparison_article(runs, colours, folder)]
        articles += [run_article(r, colours, folder, f"{PLOTS_FOLDER}/{r.name}") for r in runs]
    tables = write_numbers(runs, folder / NUMBERS_FOLDER)
    longest = max(map(steps_of_a_row, runs))
    note = "" if longest == 1 else (
        f" (rows of training are means of up to {longest:,} steps; "
        f"{METRICS_FILE} of the run has every one)"
    )  # fmt: skip
    return PageContent(articles, tables, note)


def _each_once(paths: Sequence[Path]) -> list[Path]:
    return list({real_path(path): path for path in paths}.values())


def _named_apart(runs: list[RunRecord]) -> list[RunRecord]:
    """Give runs with the same directory name as much of their path as distinguishes them."""
    if len({run.name for run in runs}) == len(runs):
        return runs
    paths = [real_path(run.directory) for run in runs]
    shared = os.path.commonpath([path.parent for path in paths])
    return [
        replace(run, name=path.relative_to(shared).as_posix())
        for run, path in zip(runs, paths, strict=True)
    ]
