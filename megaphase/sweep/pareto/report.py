"""The report of a sweep: its page, plots and numbers, and the terminal's summary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from rich.table import Table
from rich.text import Text

from megaphase.report.report_files import NUMBERS_FOLDER, PageContent, write_page
from megaphase.report.run_page import NOTHING
from megaphase.sweep.arms.budgets import own_budgets
from megaphase.sweep.pareto.numbers import write_sweep_numbers
from megaphase.sweep.pareto.sweep_page import sweep_article
from megaphase.sweep.pareto.tables import comparison_cells
from megaphase.sweep.pareto.view import SweepView


@dataclass(frozen=True)
class SweepReport:
    """The results of a sweep, complete or not."""

    view: SweepView

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Read the directory of a sweep.

        Raises:
            InputError: a file in it is missing or invalid.
        """
        return cls(SweepView.of(folder))

    def write(self, out: Path) -> Path:
        """Write page, plots and numbers as `write_report` does; return the page's path.

        The files depend only on the sweep, not on when, where or how fast its runs were done.

        Raises:
            InputError: `out` contains anything other than an earlier report.
        """
        return write_page(out, self.view.name, self._content)

    def summary_table(self) -> Table:
        """Return a table of the fronts for the terminal."""
        title = f"{self.view.name}: trade-off fronts. {self.view.progress.sentence}"
        table = Table(title=Text(title), title_justify="left")
        several = len(self.view.fronts) > 1
        for column in (*(["model"] if several else []), "arm"):
            table.add_column(column, no_wrap=True)
        for column in ("settings", "on front", "hypervolume", "of static front dominated",
                       "of own front dominated", "margin, nats"):  # fmt: skip
            table.add_column(column, justify="right")
        for fronts in self.view.fronts:
            for arm in fronts.arms:
                volume = NOTHING if arm.hypervolume is None else f"{arm.hypervolume:.4f}"
                model = [Text(str(fronts.model))] if several else []
                counts = [str(len(arm.points)), str(len(arm.front)), volume]
                table.add_row(*model, Text(arm.arm), *counts, *comparison_cells(arm))
        return table

    def sentences(self) -> list[str]:
        """Return the verdicts, the arms with budgets of their own, and the runs that have failed or
        diverged."""
        failed = [
            f"{name} {reason if reason.startswith('diverged') else f'failed: {reason}'}"
            for name, reason in self.view.failures
        ]
        budgets = [f"{each}." for each in own_budgets(self.view.record.sweep)]
        return [*(verdict.sentence for verdict in self.view.verdicts), *budgets, *failed]

    def _content(self, folder: Path) -> PageContent:
        """Write plots and numbers into `folder`; return the page's content."""
        tables = write_sweep_numbers(self.view, folder / NUMBERS_FOLDER)
        return PageContent([sweep_article(self.view, folder)], tables)
