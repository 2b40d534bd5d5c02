"""Show the progress of a sweep: bars in a terminal, and a line for every run that ends."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn

from megaphase.sweep.outcome import Outcome
from megaphase.sweep.sweep import Sweep
from megaphase.sweep.trials import Trial
from megaphase.utils.metrics_rows import rows_from_end
from megaphase.utils.progress import ProgressBar, ProgressDisplay
from megaphase.utils.run_files import METRICS_FILE


class SweepDisplay:
    """Shows the runs in progress and the outcomes of others.

    Args:
        total: the expected number of runs.
        ended: the number of runs that had ended before.
    """

    def __init__(self, console: Console, sweep: Sweep, total: int, ended: int) -> None:
        self._console, self._sweep, self._total = console, sweep, total
        columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self._progress = ProgressDisplay(console, *columns, transient=True)
        self._all = self._progress.add_bar("runs", total, done=ended)
        self._bars: dict[str, ProgressBar] = {}

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.__exit__(kind, error, trace)

    def say(self, sentence: str) -> None:
        """Print a separate line."""
        self._console.print(f"megaphase: {sentence}", markup=False, soft_wrap=True)

    def begin(self, trial: Trial, run_dir: Path) -> None:
        """A run has been started or restarted."""
        steps = trial.run["phases"][0]["steps"]
        self._bars[trial.name] = self._progress.add_bar(trial.name, steps)
        self.show(trial, run_dir)

    def show(self, trial: Trial, run_dir: Path) -> None:
        """Update the display of a running run."""
        if self._progress.has_bars:
            done = phase_steps_done(run_dir / METRICS_FILE)
            self._bars[trial.name].update(completed=done)

    def drop(self, trial: Trial) -> None:
        """Stop displaying a run."""
        if trial.name in self._bars:
            self._bars.pop(trial.name).remove()

    def end(self, trial: Trial, outcome: Outcome, outcomes: Mapping[str, Outcome]) -> None:
        """A run has ended."""
        self.drop(trial)
        ended = len(outcomes)
        self._all.update(completed=ended)
        what = f"failed: {outcome.failed}"
        if outcome.pruned is not None:
            what = f"pruned {outcome.pruned}"
        if outcome.diverged is not None:
            what = f"diverged: {outcome.diverged}"
        elif outcome.can_be_branched:
            high, low = (outcome.group_loss(g) for g in (self._sweep.high, self._sweep.low))
            what = f"high {high:.3f}, low {low:.3f}, {outcome.seconds:,.0f} s of steps"
        text = f"[{ended}/{self._total}] {trial.name}: {what}"
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def phase_steps_done(metrics: Path) -> int:
    """Return the steps of a run's newest phase from its metrics; 0 if there are none yet."""
    with contextlib.suppress(OSError):
        return next((r["phase_step"] for r in rows_from_end(metrics) if "phase_step" in r), 0)
    return 0
