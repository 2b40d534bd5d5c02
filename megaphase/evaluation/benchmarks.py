"""Benchmarks of lm-evaluation-harness on a checkpoint, without exporting it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

from megaphase.checkpoint.names import find_checkpoint, find_for_run, find_in_run
from megaphase.checkpoint.state import STATE_FILE
from megaphase.config.load import load_run
from megaphase.config.run import RunConfig
from megaphase.convert.partition import check_tensor_size
from megaphase.convert.source import Source, open_source
from megaphase.convert.source_tokenizer import load_tokenizer
from megaphase.distributed.all_ranks import process_group, run_on_all_ranks
from megaphase.distributed.control_group import ControlGroup
from megaphase.distributed.dist_env import global_rank, world_size
from megaphase.distributed.process_grid import start_process_grid
from megaphase.fault_tolerance.config import FaultsConfig
from megaphase.fault_tolerance.stop_signals import StopSignals
from megaphase.fault_tolerance.watchdog import Watchdog
from megaphase.generation.model import load_model
from megaphase.harness.benchmarks import BenchmarkChoice, Benchmarks, require_harness
from megaphase.harness.rank_model import RankModel
from megaphase.harness.results import BenchmarkResults, Groups
from megaphase.harness.service import ModelService
from megaphase.utils.errors import InputError
from megaphase.utils.progress import ProgressDisplay
from megaphase.utils.standard_streams import new_console


@dataclass(frozen=True)
class MeasuredModel:
    """A checkpoint that is to be measured.

    Attributes:
        tokenizer: the path of its tokenizer; None: the one that belongs to it.
        tensor: number of processes that share the model.
        groups: of benchmarks, from the run file.
        faults: of the run file.
        step: its number of steps; 0 for a model that was imported.
    """

    checkpoint: Path
    tokenizer: Path | None
    tensor: int
    groups: Groups
    faults: FaultsConfig
    step: int


def find_model(
    text: str, overrides: Sequence[str], checkpoint: str | None, tensor: int | None
) -> MeasuredModel:
    """Find the checkpoint of a run file, a run directory, RUN@NAME, or the path of a checkpoint.

    Args:
        checkpoint: as the user gives it beside the run; None: the newest, or the one in `text`.
        tensor: processes that share the model; None: as in the run file, 1 for one process.

    Raises:
        InputError: there is none, or the processes cannot share the model so.
    """
    config: RunConfig | None = None
    path = Path(text)
    if (path / STATE_FILE).is_file():
        if checkpoint is not None or overrides:
            given = "--checkpoint" if checkpoint is not None else overrides[0]
            raise InputError(given, f"{text} is a checkpoint, not a run", "leave it out")
        folder = find_checkpoint(text)
    elif "@" in text and not path.exists():
        if checkpoint is not None:
            raise InputError("--checkpoint", f"{text} names one, too", "leave out one of them")
        folder = find_checkpoint(text)
        config = load_run(Path(text.rpartition("@")[0]), tuple(overrides))
    else:
        config = load_run(path, tuple(overrides))
        name = checkpoint
        folder = (
            find_in_run(config.output, "latest")
            if name is None
            else find_for_run(config.output, name)
        )
    shared = tensor
    if shared is None:
        shared = 1 if config is None or world_size() == 1 else config.parallel.tensor
    if world_size() % shared:
        raise InputError(
            "--tensor",
            f"{shared} does not divide the {world_size()} processes",
            f"start a multiple of {shared} processes, or give another --tensor",
        )
    source = open_source(str(folder))
    check_tensor_size(source.shape, shared)
    harness = None if config is None else config.validation.harness
    return MeasuredModel(
        folder,
        None if config is None else config.tokenizer,
        shared,
        {} if harness is None else harness.groups,
        FaultsConfig() if config is None else config.faults,
        int(source.state.get("step", 0)),
    )


def split_names(given: Sequence[str]) -> list[str]:
    """Return the names in lists that are separated by commas."""
    names = [name.strip() for text in given for name in text.split(",") if name.strip()]
    if not names:
        raise InputError("--harness", "names no task", "give some, separated by commas")
    return names


def parse_groups(given: Sequence[str]) -> dict[str, list[str]]:
    """Return the groups of `GROUP=TASK,TASK`; one that is given twice has the tasks of both."""
    groups: dict[str, list[str]] = {}
    for text in given:
        group, separator, tasks = text.partition("=")
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        if not separator or not group.strip() or not names:
            problem = f"{text!r} is not GROUP=TASKS"
            raise InputError("--group", problem, "give, for example, en=belebele_eng_Latn")
        groups.setdefault(group.strip(), []).extend(names)
    return groups


def evaluate_benchmarks(
    model: MeasuredModel,
    choice: BenchmarkChoice,
    batch: int,
    signals: StopSignals,
    *,
    average: bool = False,
) -> BenchmarkResults | None:
    """Run the benchmarks on a checkpoint; called by all processes; the results on rank 0 alone.

    Args:
        batch: see ModelService.
        average: measure the average of the weights that it holds.

    Raises:
        InputError: see Benchmarks and load_model.
    """
    faults = model.faults
    with (
        process_group(),
        Watchdog(faults.silent_seconds, faults.stalled_seconds) as watchdog,
        watchdog.patient("measuring benchmarks"),
    ):
        signals.ends_with(watchdog.stop)
        is_first = global_rank() == 0
        run_on_all_ranks(lambda: require_harness(choice.where))
        benchmarks = run_on_all_ranks(lambda: Benchmarks(choice) if is_first else None)

        def prepare() -> tuple[Source, RankModel]:
            source = open_source(str(model.checkpoint), average=average)
            gpt = load_model(source, None, verify=is_first, grid=grid)
            return source, RankModel(gpt, grid)

        grid = start_process_grid(model.tensor, faults.stalled_seconds)
        group = ControlGroup(faults.stalled_seconds)
        source, served = run_on_all_ranks(prepare)
        tokenizer = run_on_all_ranks(partial(load_tokenizer, source, model.tokenizer))
        with _progress() as advance:
            service = ModelService(served, tokenizer, group, batch=batch, advance=advance)
            return service.serve(lambda: _run(benchmarks, service))


def _run(benchmarks: Benchmarks | None, service: ModelService) -> BenchmarkResults:
    assert benchmarks is not None, "only rank 0 runs them"
    return benchmarks.run(service)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], object]]:
    """Show how far rank 0 is with the requests of each kind."""
    console = new_console(stderr=True)
    console.file = sys.stderr  # this one, also while the output of libraries is discarded
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=True)
    with ProgressDisplay(console, *columns) as display:
        bar = display.add_bar("benchmarks", None)

        def advance(what: str, done: int, total: int) -> None:
            bar.update(completed=done, total=total, description=what)
            display.line_when_due(lambda: f"{what}: {done:,} of {total:,}")

        yield advance
