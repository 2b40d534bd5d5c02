"""What a person sees of a run: a live bar in a terminal, plain lines elsewhere; rank 0 only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

SMOOTHING = 0.1  # weight of the newest step in the shown speed


@dataclass(frozen=True)
class StepFigures:
    """The figures of one step that are shown."""

    phase: str
    step: int
    loss: float
    learning_rate: float
    tokens: int
    seconds: float


class TrainingDisplay:
    """Context manager; `step` after every step, `say` for everything else."""

    def __init__(self, console: Console, *, steps: int, done: int, every_steps: int) -> None:
        """
        Args:
            steps: of the whole run.
            done: steps that were done before.
            every_steps: how often a plain line is printed where there is no terminal.
        """
        self._console, self._steps, self._every = console, steps, every_steps
        self._done = done
        self._seconds_a_step: float | None = None
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(
                "start", total=self._steps, completed=self._done, figures=""
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        console = self._bar.console if self._bar is not None else self._console
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, figures: StepFigures) -> None:
        """Show that a step is done."""
        before = self._seconds_a_step
        newest = figures.seconds
        self._seconds_a_step = newest if before is None else before + SMOOTHING * (newest - before)
        speed = figures.tokens / self._seconds_a_step
        if self._bar is not None:
            text = f"loss {figures.loss:.3f}  {speed:,.0f} tokens/s"
            self._bar.update(
                self._task,
                completed=figures.step,
                description=escape(figures.phase),
                figures=text,
            )
        elif figures.step % self._every == 0 or figures.step == self._steps:
            left = (self._steps - figures.step) * self._seconds_a_step
            self.say(
                f"{figures.phase} step {figures.step:,}/{self._steps:,}  loss {figures.loss:.4f}  "
                f"learning rate {figures.learning_rate:.2e}  {speed:,.0f} tokens/s  "
                f"{_duration(left)} left"
            )

    def validation(self, phase: str, step: int, losses: Mapping[str, float]) -> None:
        """Show the validation losses of all tasks."""
        shown = "  ".join(f"{task} {loss:.4f}" for task, loss in losses.items())
        self.say(f"{phase} step {step:,}  validation loss: {shown}")


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
