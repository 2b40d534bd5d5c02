"""`megaphase report`: one page that shows what one or several runs have learnt."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from html import escape
from pathlib import Path

from rich.table import Table
from rich.text import Text

from megaphase.errors import InputError
from megaphase.experiments import page
from megaphase.experiments.losses import (
    PhaseLoss,
    final_losses,
    ordered_tasks,
    task_verdicts,
    verdicts,
)
from megaphase.experiments.numbers import write_numbers
from megaphase.experiments.plot_style import task_colours
from megaphase.experiments.plots import Colours, final_losses_plot
from megaphase.experiments.run_page import (
    NOTHING,
    run_plots,
    run_sections,
    run_state,
    task_cell,
    verdict_list,
)
from megaphase.experiments.runs import RunRecord, load_run
from megaphase.files import directory_written_aside

__all__ = ["final_losses", "summary_table", "verdicts", "write_report"]

MANIFEST = "report.json"
MANIFEST_KIND = "megaphase report"


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write the report of these runs into the directory `out`; return the path of its page.

    `out` gets `index.html` (self-contained), `plots/` (PNG and SVG) and `numbers/` (CSV), whole
    or not at all. A former report there is replaced.

    Raises:
        InputError: a run directory is incomplete or broken, a run has no validation yet, or `out`
            holds anything that is not a former report.
    """
    runs = _named_apart([load_run(path) for path in _each_once(run_dirs)])
    for run in runs:
        if not run.validation:
            raise InputError(
                run.directory / "metrics.jsonl",
                "has no validation row yet",
                "wait until the run has evaluated for the first time",
            )
    with _replacing_report(out) as folder:
        plots = folder / "plots"
        plots.mkdir()
        colours = task_colours(task for run in runs for task in run.tasks)
        body = _one_run(runs[0], colours, plots) if len(runs) == 1 else _many(runs, colours, plots)
        title = f"{runs[0].name}: a run of megaphase" if len(runs) == 1 else "Runs of megaphase"
        (folder / "index.html").write_text(page.document(title, body), encoding="utf-8")
        write_numbers(runs, folder / "numbers")
        _write_manifest(folder, runs)
    return out / "index.html"


def summary_table(run: RunRecord) -> Table:
    """Validation losses for the terminal: per task at the start and after each phase begun."""
    losses = {(loss.phase, loss.task): loss for loss in final_losses(run)}
    changes = {verdict.task: verdict.change for verdict in task_verdicts(run)}
    begun = run.phases_begun
    table = Table(title=Text(f"{run.name}: validation loss (nats per token)"))
    table.add_column("task")
    table.add_column("start", justify="right")
    for phase in begun:
        when = "after" if run.phase_is_over(phase.name) else "now in"
        table.add_column(Text(f"{when} {phase.name}"), justify="right")
    table.add_column("change since switch" if len(begun) > 1 else "change", justify="right")
    table.add_column("bits/byte", justify="right")
    table.add_column("epochs", justify="right")
    for task in ordered_tasks(run):
        found = [losses.get((phase.name, task)) for phase in begun]
        measured = [loss for loss in found if loss is not None]
        if not measured:
            continue
        change = changes[task]
        table.add_row(
            Text(f"{task} (low)" if task in run.low_resource_tasks else task),
            f"{measured[0].start:.3f}",
            *(NOTHING if loss is None else f"{loss.end:.3f}" for loss in found),
            Text(f"{change:+.3f}", style="green" if change < 0 else "red")
            if math.isfinite(change)
            else NOTHING,
            f"{measured[-1].end_bits_per_byte:.3f}",
            f"{_planned_epochs(run, task):.2f}",
        )
    return table


def _planned_epochs(run: RunRecord, task: str) -> float:
    shares = [phase.tasks[task] for phase in run.plan.phases if task in phase.tasks]
    return max((share.epochs_so_far for share in shares), default=0.0)


def _one_run(run: RunRecord, colours: Colours, plots: Path) -> str:
    figures = {name: page.add_plot(plot, plots) for name, plot in run_plots(run, colours).items()}
    return "\n".join(
        (
            f"<h1>{escape(run.name)}</h1>",
            f'<p class="lead">{escape(run_state(run))}</p>',
            verdict_list(run),
            run_sections(run, colours, figures, level=2),
            _numbers_section(2),
        )
    )


def _many(runs: Sequence[RunRecord], colours: Colours, plots: Path) -> str:
    comparison = page.Plot(
        "final_losses",
        "Newest held-out loss of each task in each run",
        "Each panel has its own scale; further left is better.",
        lambda size: final_losses_plot(runs, colours, size),
    )
    parts = [
        "<h1>Runs compared</h1>",
        f'<p class="lead">{len(runs)} runs.</p>',
        page.section(
            "Final losses", page.add_plot(comparison, plots) + _comparison_table(runs, colours)
        ),
    ]
    for run in runs:
        prefix = re.sub(r"[^\w.-]+", "-", run.name)
        figures = {
            name: page.add_plot(replace(plot, name=f"{prefix}-{name}"), plots)
            for name, plot in run_plots(run, colours).items()
        }
        parts.append(
            f'<div class="run"><h2>{escape(run.name)}</h2>\n'
            f'<p class="lead">{escape(run_state(run))}</p>\n{verdict_list(run)}\n'
            f"{run_sections(run, colours, figures, level=3)}\n</div>"
        )
    return "\n".join((*parts, _numbers_section(2)))


def _comparison_table(runs: Sequence[RunRecord], colours: Colours) -> str:
    newest: dict[tuple[str, str], PhaseLoss] = {}
    for run in runs:
        newest |= {(run.name, loss.task): loss for loss in final_losses(run)}
    low = {task for run in runs for task in run.low_resource_tasks}
    tasks = [task for task in colours if any((run.name, task) in newest for run in runs)]
    tasks.sort(key=lambda task: task in low)
    head = '<tr><th scope="col">run</th>'
    head += "".join(f'<th scope="col">{task_cell(t, colours, t in low)}</th>' for t in tasks)
    best = {t: min(newest[r.name, t].end for r in runs if (r.name, t) in newest) for t in tasks}
    rows = []
    for run in runs:
        cells = [escape(run.name)]
        for task in tasks:
            loss = newest.get((run.name, task))
            text = NOTHING if loss is None else f"{loss.end:.3f}"
            cells.append(f"<b>{text}</b>" if loss and loss.end == best[task] else text)
        rows.append(cells)
    return page.table(head + "</tr>", rows, "Nats per token; the lowest of each task is bold.")


def _numbers_section(level: int) -> str:
    names = ("final_losses", "validation", "training", "training_by_task", "plan")
    links = " · ".join(f'<a href="numbers/{name}.csv">{name}.csv</a>' for name in names)
    return page.section("Numbers", f'<p class="note">Every number as a table: {links}</p>', level)


def _each_once(paths: Sequence[Path]) -> list[Path]:
    return list({path.resolve(): path for path in paths}.values())


def _named_apart(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Runs that share a directory name get as much of their path as tells them apart."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return list(runs)
    paths = [run.directory.resolve() for run in runs]
    shared = Path(os.path.commonpath([path.parent for path in paths]))
    return [
        replace(run, name=path.relative_to(shared).as_posix())
        for run, path in zip(runs, paths, strict=True)
    ]


def _write_manifest(folder: Path, runs: Sequence[RunRecord]) -> None:
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    manifest = {"kind": MANIFEST_KIND, "runs": [run.name for run in runs], "files": files}
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


@contextmanager
def _replacing_report(out: Path) -> Iterator[Path]:
    """Yield a scratch directory that takes the place of `out` when the block ends without error."""
    _refuse_all_but_report(out)
    former = out.with_name(f".{out.name}.{os.getpid()}.former")
    try:
        with directory_written_aside(out) as folder:
            yield folder
            if out.exists():
                os.rename(out, former)
    except BaseException:
        if former.exists() and not out.exists():
            os.rename(former, out)
        raise
    shutil.rmtree(former, ignore_errors=True)


def _refuse_all_but_report(out: Path) -> None:
    """Replacing removes what is there, so it must be a report and nothing else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    remedy = "give --out a new directory"
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        ours = set(manifest["files"]) if manifest["kind"] == MANIFEST_KIND else None
    except (OSError, ValueError, KeyError, TypeError):
        ours = None
    if ours is None:
        raise InputError(out, "exists and is not a report", remedy)
    for path in out.rglob("*"):
        name = path.relative_to(out).as_posix()
        if path.is_file() and name not in ours and name != MANIFEST:
            raise InputError(out, f"holds {name}, which is no part of the report", remedy)
