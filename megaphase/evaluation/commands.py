"""`megaphase evaluate`; it imports what it needs, so `--help` stays fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megaphase.training.evaluated_split import EvaluatedSplit
from megaphase.utils.arguments import MOST, MOST_PROCESSES, Average, Overrides, named
from megaphase.utils.errors import InputError
from megaphase.utils.remote_files import is_url
from megaphase.utils.standard_streams import new_console, new_table_console

if TYPE_CHECKING:
    from rich.table import Table

    from megaphase.config.run import RunConfig
    from megaphase.training.evaluate import Evaluation

_ROWS = 8  # of full length, that benchmarks compute at a time
_TITLES = {
    EvaluatedSplit.VALIDATION: "Held-out losses",
    EvaluatedSplit.TEST: "Losses of the test split",
    EvaluatedSplit.TRAINING: "Losses of a sample of the training documents",
}


def evaluate_command(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="The run file (YAML), a run directory, or RUN@NAME of one; with --harness also "
            "the path of a checkpoint.",
        ),
    ],
    overrides: Overrides = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A phase (its end), best-TASK, step-…, RUN@NAME or a path; the run's newest if "
            "not given.",
        ),
    ] = None,
    split: Annotated[
        list[EvaluatedSplit] | None,
        typer.Option(
            help="Documents held out for validation (the default), those of the test split, or a "
            "sample of those that are trained on, the same for all seeds; repeatable."
        ),
    ] = None,
    samples: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            max=MOST,
            help="Samples of each task, once for all splits or once for each; by default "
            "test.samples for test, and validation.samples.",
        ),
    ] = None,
    average: Average = False,
    harness: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASKS",
            help="Benchmarks of lm-evaluation-harness instead of losses: names of tasks, groups or "
            "tags, or patterns such as `'belebele_*_Latn'`, separated by commas; repeatable. See "
            "docs/benchmarks.md.",
        ),
    ] = None,
    tasks_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder with more files of such tasks.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Most documents of each benchmark.")
    ] = None,
    fewshot: Annotated[
        int | None,
        typer.Option(min=0, max=1000, help="Examples in the context; as each benchmark says."),
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GROUP=TASKS",
            help="Benchmarks whose mean figures are wanted, such as those of a language: "
            "`en=belebele_eng_Latn,xstorycloze_en` or `fr='*_fra_*'`; repeatable. By default "
            "validation.harness.groups.",
        ),
    ] = None,
    tensor: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_PROCESSES,
            help="With --harness, processes that share the model; parallel.tensor by default.",
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST,
            help="With --harness, texts of full length at a time; affects only speed and memory.",
            show_default="8",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    out: Annotated[
        Path | None, typer.Option(callback=named, metavar="FILE", help="Write the figures as JSON.")
    ] = None,
) -> None:
    """Measure the loss of every task at a checkpoint, by default on held-out documents, or, with
    --harness, its figures on benchmarks.

    Example: megaphase evaluate runs/a@joint --split test --samples 800

    Example: megaphase evaluate runs/a@joint --harness 'xstorycloze_*' --group hi=xstorycloze_hi
    """
    from json import dumps

    from megaphase.distributed.all_ranks import leaving_processes, run_on_all_ranks
    from megaphase.distributed.dist_env import global_rank
    from megaphase.fault_tolerance.stop_signals import MEASURING, StopSignals
    from megaphase.utils.files import atomic_write_json, check_place

    for_harness: dict[str, object] = {"--tasks-path": tasks_path, "--limit": limit}
    for_harness |= {"--fewshot": fewshot, "--group": group, "--tensor": tensor, "--batch": batch}
    for_losses: dict[str, object] = {"--split": split, "--samples": samples}
    if harness is None:
        _refuse_all(for_harness, "is for benchmarks", "give --harness, too")
    else:
        _refuse_all(for_losses, "is for losses, not for benchmarks", "leave out it or --harness")
    if is_url(run):
        problem = "is in a store, where no run file is"
        raise InputError(
            run, problem, f"give the run file or the run directory, and --checkpoint {run}"
        )
    with StopSignals(MEASURING) as signals, leaving_processes():
        if out is not None:
            run_on_all_ranks(partial(check_place, out))
        if harness is not None:
            from megaphase.evaluation.benchmarks import (
                MeasuredModel,
                evaluate_benchmarks,
                find_model,
                parse_groups,
                split_names,
            )
            from megaphase.harness.benchmarks import BenchmarkChoice
            from megaphase.harness.results import results_table

            model: MeasuredModel = run_on_all_ranks(
                lambda: find_model(run, overrides or (), checkpoint, tensor)
            )
            choice = BenchmarkChoice(
                split_names(harness),
                "--harness",
                tasks_path,
                limit,
                fewshot,
                parse_groups(group) if group else model.groups,
                all_groups_needed=bool(group),
            )
            rows = _ROWS if batch is None else batch
            found = evaluate_benchmarks(model, choice, rows, signals, average=average)
            if found is None:
                return
            figures = {"step": model.step, "checkpoint": str(model.checkpoint), **found.as_json()}
            title = f"Benchmarks at step {model.step:,}"
            tables = [results_table(found, title)]
        else:
            splits = _samples_of_splits(split or [EvaluatedSplit.VALIDATION], samples)
            config, name = run_on_all_ranks(lambda: _find_run(Path(run), overrides, checkpoint))

            from megaphase.training.evaluate import evaluate

            console = new_console(stderr=True)
            losses = evaluate(config, name, splits, console, signals, average=average)
            figures = _figures(losses) | ({"samples": losses.samples} if split else {})
            tables = [_losses_table(losses, each, average=average) for each in losses.losses]
    if global_rank() != 0:
        return
    if out is not None:
        atomic_write_json(out, figures)
    if json:
        print(dumps(figures, indent=2))
        return
    printed = new_console(highlight=False) if harness is None else new_table_console()
    for table in tables:
        printed.print(table)


def _refuse_all(options: Mapping[str, object], problem: str, remedy: str) -> None:
    """Refuse the options that are given."""
    for name, value in options.items():
        if value is not None:
            raise InputError(name, problem, remedy)


def _samples_of_splits(
    splits: Sequence[EvaluatedSplit], samples: Sequence[int] | None
) -> dict[EvaluatedSplit, int | None]:
    """Return the number of samples of each split; None: as in the run file."""
    if len(set(splits)) < len(splits):
        raise InputError("--split", "names a split twice", "leave it out once")
    if not samples:
        return dict.fromkeys(splits)
    if len(samples) == 1:
        return dict.fromkeys(splits, samples[0])
    if len(samples) != len(splits):
        raise InputError(
            "--samples",
            f"is given {len(samples)} times for {len(splits)} split{'s' * (len(splits) > 1)}",
            "give it once, or once for each --split",
        )
    return dict(zip(splits, samples, strict=True))


def _find_run(
    run: Path, overrides: Sequence[str] | None, checkpoint: str | None
) -> tuple[RunConfig, str | None]:
    """Return the run file, and the name of the checkpoint, which may be a part of `run`."""
    from megaphase.config.load import load_run

    if "@" not in str(run) or run.exists():
        return load_run(run, tuple(overrides or ())), checkpoint
    folder, _, name = str(run).rpartition("@")
    if not Path(folder).is_dir():
        raise InputError(run, f"there is no run directory {folder}", "give a run file, or RUN@NAME")
    if checkpoint is not None:
        raise InputError("--checkpoint", f"{run} names one, too", "leave out one of them")
    return load_run(Path(folder), tuple(overrides or ())), name


def _figures(found: Evaluation) -> dict[str, Any]:
    """Return what is written as JSON: for every split the losses by task."""
    from dataclasses import asdict

    return {
        "step": found.step,
        **{
            str(split): {task: asdict(loss) for task, loss in losses.items()}
            for split, losses in found.losses.items()
        },
    }


def _losses_table(found: Evaluation, split: EvaluatedSplit, *, average: bool) -> Table:
    from rich.table import Table

    measured = "of the average at step" if average else "at step"
    title = f"{_TITLES[split]} {measured} {found.step:,}"
    table = Table(title=title, title_justify="left")
    table.add_column("task")
    for figure in ("nats a token", "bits a byte", "samples"):
        table.add_column(figure, justify="right")
    for task, loss in found.losses[split].items():
        samples = found.samples[split][task]
        table.add_row(task, f"{loss.loss:.4f}", f"{loss.bits_per_byte:.4f}", f"{samples:,}")
    return table
