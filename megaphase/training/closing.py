"""What a run says when all of its phases are done: its results, and the commands that follow."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from megaphase.callbacks.display import clock_time
from megaphase.checkpoint.state import full_name
from megaphase.config.run import RunConfig
from megaphase.training.evaluator import Losses
from megaphase.utils.run_files import CHECKPOINTS

# Of all tasks, those whose losses are listed; the report has the others.
MOST_TASKS = 24


def closing_lines(
    config: RunConfig,
    *,
    step: int,
    steps: int,
    earlier: int,
    seconds: float,
    losses: Losses,
    average: Losses | None,
    bests: Mapping[str, tuple[int, float]],
) -> Iterator[str]:
    """Yield the lines.

    Args:
        step: of the end, counted over the runs that this one continues, too.
        steps: of this run; earlier: those of them that were trained before this start.
        seconds: of this start's training, with validation and saving.
        losses: of the end by task; average: those of the average of the weights, if there is one.
        bests: step and loss of the best weights that are kept, by task, and of their mean.
    """
    run, name = shown_path(config.output), config.phases[-1].name
    took = f"in {clock_time(seconds)}"
    if earlier:
        took = f"{steps - earlier:,} of them since the last start, {took}"
    yield f"Done: {steps:,} step{'s' * (steps != 1)}, {took}"
    yield "Validation loss at the end, nats a token (bits a byte):"
    width = max(map(len, losses))
    for task, loss in list(losses.items())[:MOST_TASKS]:
        figures = f"{loss.loss:.4f} ({loss.bits_per_byte:.4f})"
        if average is not None:
            figures += f", of the average {average[task].loss:.4f}"
        if task in bests:
            figures += f", best {bests[task][1]:.4f} at step {bests[task][0]:,}: best-{task}"
        yield f"  {task:{width}}  {figures}"
    if len(losses) > MOST_TASKS:
        yield f"  and {len(losses) - MOST_TASKS:,} more tasks; the report has all"
    yield f"Checkpoint: {os.path.join(run, CHECKPOINTS, full_name(step))}, also {run}@{name}"
    yield from next_commands(config)


def next_commands(config: RunConfig) -> Iterator[str]:
    """Yield the commands that are of use once a run is done, to be copied."""
    run, name = shlex.quote(shown_path(config.output)), config.phases[-1].name
    yield "What next:"
    yield f"  megaphase report {run} --out report"
    split = " --split test" if config.tested_tasks() else ""
    yield f"  megaphase evaluate {run}@{name}{split}"
    kinds = {task.kind for task in config.tasks.values()}
    if "lm" in kinds:
        yield f'  megaphase generate {run}@{name} --prompt "..."'
    if "chat" in kinds:
        yield f'  megaphase generate {run}@{name} --chat --prompt "..."'
    if "translation" in kinds:
        run_file = shlex.quote(shown_path(config.path))
        yield f"  megaphase translate {run_file} --checkpoint {name}"


def shown_path(path: Path) -> str:
    """Return a path below the current folder as relative to it, and others as they are."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
