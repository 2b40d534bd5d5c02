"""The command `megaphase recommend`; imports are inside functions to keep --help fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megaphase.utils.arguments import MOST, named
from megaphase.utils.errors import InputError
from megaphase.utils.files import real_path
from megaphase.utils.standard_streams import new_console


def recommend_command(
    sweeps: Annotated[
        list[Path],
        typer.Argument(metavar="SWEEP", help="Directories of sweeps over the same tasks."),
    ],
    run: Annotated[
        Path,
        typer.Option(metavar="RUN_FILE", help="The run file (YAML) whose phases are to be chosen."),
    ],
    target: Annotated[
        str,
        typer.Option(
            metavar="TARGET",
            help="Tasks or groups with min, within X or within X of static: "
            "'{hi: min, high: within 0.02}', X in nats.",
        ),
    ],
    out: Annotated[Path, typer.Option(callback=named, help="The new run file; it must not exist.")],
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            callback=named,
            help="Also write a page with the laws of these sweeps: whether they fit, and the "
            "predicted beside the measured losses.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="Budget in steps; by default that of the run file."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, max=10**18, help="Budget in tokens, instead.")
    ] = None,
    epoch_tokens: Annotated[
        list[str] | None,
        typer.Option(
            "--epoch-tokens",
            metavar="NAME=N",
            help="Training tokens of an epoch of a task whose corpus does not exist yet.",
        ),
    ] = None,
) -> None:
    """Choose the phases of a larger run by a law fitted to the runs of sweeps.

    It writes a run file with predicted losses in its comments; where no law fits, it recommends
    nothing and exits with 1.

    Example: megaphase recommend sweep/ --run big.yaml --target '{hi: min, high: within 0.02}' --out
    big-tuned.yaml
    """

    from megaphase.report.report_files import refuse_all_but_report
    from megaphase.sweep.directory import load_sweep_record
    from megaphase.sweep.law.big_run import read_big_run
    from megaphase.sweep.law.recommendation import recommend
    from megaphase.sweep.law.section import write_law_page
    from megaphase.sweep.law.sweep_law import SweepLaw, combined
    from megaphase.sweep.law.target import parse_target
    from megaphase.sweep.law.tuned_run import lines_of, refuse_existing, write_tuned_run

    if steps is not None and tokens is not None:
        raise InputError("--tokens", "--steps is also given", "give one of them")
    refuse_existing(out)
    if report is not None and real_path(report) == real_path(out):
        raise InputError(f"--report {report}", "is also --out", "give another folder")
    if report is not None:
        refuse_all_but_report(report, "--report")
    records = [load_sweep_record(folder) for folder in sweeps]
    rows = combined(sweeps, records)
    wanted = parse_target(target, rows.high, rows.low)
    big = read_big_run(run, rows.tasks, steps=steps, tokens=tokens, epoch_tokens=epoch_tokens or [])
    tokenizer = Path(records[0].sweep.base["tokenizer"]).name
    law = SweepLaw.of_rows(rows)
    console = new_console(highlight=False)
    if report is not None:
        names = [each.sweep.output.name for each in records]
        page = write_law_page(law, names, report)
        console.print(f"Laws: {page}", markup=False, soft_wrap=True)
    found = recommend(law, big, wanted, tokenizer)
    write_tuned_run(found, out)
    for line in [*lines_of(found), "", f"Run file: {out}"]:
        console.print(line, markup=False, soft_wrap=True)
