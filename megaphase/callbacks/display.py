"""Shows a run's progress: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from megaphase.callbacks.callback import (
    BenchmarkRecord,
    Callback,
    HeldOutLoss,
    StepRecord,
    ValidationRecord,
)
from megaphase.utils.progress import ProgressDisplay

SMOOTHING = 0.1  # weight of the newest step in the shown speed


class TrainingDisplay(Callback):
    """Shows steps and validations; exists on rank 0 alone.

    Other lines that are printed to the same console appear above the bar.
    """

    def __init__(
        self,
        console: Console,
        *,
        steps: int,
        phase_steps: Mapping[str, int],
        done: int,
        every_steps: int,
        validation_steps: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            steps: of the whole run.
            phase_steps: of every phase, as planned.
            done: steps that were done before.
            every_steps: how often a plain line is printed where there is no terminal.
            validation_steps: how often there is a validation, for the time that is left; None if
                there is none between the ends of phases.
            clock: gives seconds.
        """
        self._console, self._steps, self._done, self._every = console, steps, done, every_steps
        self._phase_steps = phase_steps
        self._validation_steps, self._clock = validation_steps, clock
        self._seconds_a_step: float | None = None
        self._validation_seconds, self._since = 0.0, clock()
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        self._progress = ProgressDisplay(console, *columns, transient=True)
        self._resources = ExitStack()

    def on_run_begin(self) -> None:
        self._resources.enter_context(self._progress)
        self._since = self._clock()
        self._bar = self._progress.add_bar("start", self._steps, done=self._done, figures="")

    def on_run_end(self, error: BaseException | None) -> None:
        self._resources.close()

    def on_step_end(self, record: StepRecord) -> None:
        before, newest = self._seconds_a_step, record.seconds.total
        self._seconds_a_step = newest if before is None else before + SMOOTHING * (newest - before)
        speed = record.tokens_per_second * newest / self._seconds_a_step
        self._bar.update(
            completed=record.step,
            description=f"{record.phase}{self._within_phase(record)}",
            figures=f"loss {record.loss:.3f}  {speed:,.0f} tokens/s",
        )
        self._since = self._clock()
        is_due = record.step % self._every == 0 or record.step == self._steps
        if is_due and not self._progress.has_bars:
            left = self._seconds_left(record.step)
            self._print(
                f"{record.phase} step {record.step:,}/{self._steps:,}"
                f"{self._within_phase(record)}  loss {record.loss:.4f}  "
                f"learning rate {record.learning_rate:.2e}  {speed:,.0f} tokens/s  "
                f"{clock_time(left)} left"
            )

    def _seconds_left(self, step: int) -> float:
        """The time of the steps that are left, and of validations as long as the newest one."""
        validations = 0
        if self._validation_steps is not None and step < self._steps:
            every = self._validation_steps
            validations = max(1, self._steps // every - (step - 1) // every)
        steps = (self._steps - step) * (self._seconds_a_step or 0.0)
        return steps + validations * self._validation_seconds

    def _within_phase(self, record: StepRecord) -> str:
        """The step within the phase, where that is not the whole run: steps are counted over the
        run, and so are those of a branch."""
        steps = self._phase_steps[record.phase]
        if steps == self._steps:
            return ""
        return f" ({record.phase_step:,}/{steps:,} of the phase)"

    def on_validation_end(self, record: ValidationRecord) -> None:
        self._validation_seconds = self._clock() - self._since
        self._since = self._clock()
        at = f"{record.phase} step {record.step:,}"
        self._print(f"{at}  validation loss: {_shown(record.losses)}")
        if record.average is not None:
            self._print(f"{at}  validation loss of the average: {_shown(record.average)}")

    def on_benchmarks_end(self, record: BenchmarkRecord) -> None:
        at = f"{record.phase} step {record.step:,}"
        self._print(f"{at}  benchmarks: {_first_figures(record.groups or record.tasks)}")

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _shown(losses: Mapping[str, HeldOutLoss]) -> str:
    return "  ".join(f"{task} {found.loss:.4f}" for task, found in losses.items())


def _first_figures(results: Mapping[str, Mapping[str, float]]) -> str:
    """Return the first figure of each task or group."""
    first = {name: next(iter(figures.items()), None) for name, figures in results.items()}
    return "  ".join(f"{name} {each[0]} {each[1]:.4f}" for name, each in first.items() if each)


def clock_time(seconds: float) -> str:
    """A duration as H:MM:SS, or M:SS below an hour."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
