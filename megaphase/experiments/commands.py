"""The commands of this room; each imports what it needs, so that `--help` stays fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report_command(
    run_dirs: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR", help="Directories of runs to report on.")
    ],
    out: Annotated[
        Path, typer.Option(help="Directory of the report; a former report there is replaced.")
    ] = Path("report"),
) -> None:
    """Show what runs have learnt: tables, verdicts, and a page with plots."""
    from rich.console import Console

    from megaphase.experiments.report import load_run, summary_table, verdicts, write_report

    index = write_report(run_dirs, out)
    console = Console(highlight=False)
    for run_dir in run_dirs:
        run = load_run(run_dir)
        console.print(summary_table(run))
        for sentence in verdicts(run):
            console.print(sentence, markup=False, soft_wrap=True)
        console.print()
    console.print(f"Report: {index}", markup=False, soft_wrap=True)
