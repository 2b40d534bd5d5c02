"""The report of a sweep: its page, plots and numbers, and the terminal's summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from rich import box
from rich.table import Table
from rich.text import Text

from megaphase.report.report_files import NUMBERS_FOLDER, PageContent, write_page
from megaphase.report.run_page import NOTHING
from megaphase.sweep.arms.budgets import own_budgets
from megaphase.sweep.law.section import write_law_numbers
from megaphase.sweep.law.sweep_law import SweepLaw
from megaphase.sweep.pareto.contrasts import Contrast
from megaphase.sweep.pareto.fronts import ModelFronts
from megaphase.sweep.pareto.numbers import write_sweep_numbers
from megaphase.sweep.pareto.pruned import pruned_sentence
from megaphase.sweep.pareto.sweep_page import sweep_article
from megaphase.sweep.pareto.tables import comparison_cells
from megaphase.sweep.pareto.verdict import shown
from megaphase.sweep.pareto.view import SweepView

MARGIN = "how much lower the low-resource loss is at each static point’s high-resource loss"


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

    def summary_tables(self) -> list[Table]:
        """Return tables of fronts and differences for the terminal, of at most 80 columns."""
        tables = []
        for fronts in self.view.fronts:
            model = "" if fronts.model is None else f", {fronts.model}"
            tables.append(self._fronts(fronts, f"{self.view.name}{model}: trade-off fronts"))
            contrasts = [each for each in self.view.contrasts if each.model == fronts.model]
            if contrasts:
                tables.append(_differences(contrasts, f"{self.view.name}{model}: differences"))
        return tables

    def _fronts(self, fronts: ModelFronts, title: str) -> Table:
        margin = f"\nMargin: {MARGIN}." if fronts.is_compared else ""
        table = _table(title, f"{self.view.progress.sentence}{margin}")
        table.add_column("arm", overflow="fold")
        compared = ("static\npoints\ndominated", "dominated\nby static", "margin, nats")
        for column in ("on front", "hyper-\nvolume", *(compared if fronts.is_compared else ())):
            table.add_column(column, justify="right", overflow="fold")
        for arm in fronts.arms:
            volume = NOTHING if arm.hypervolume is None else f"{arm.hypervolume:.4f}"
            cells = [f"{len(arm.front)} of {len(arm.points)}", volume]
            if fronts.is_compared:
                dominated, *others = comparison_cells(arm)
                cells += [dominated.split(" (")[0], *others]
            table.add_row(Text(arm.arm), *cells)
        return table

    def sentences(self) -> list[str]:
        """Return the verdicts, the arms with budgets of their own, how many settings were pruned,
        and the runs that have failed or diverged."""
        failed = [
            f"{name} {reason if reason.startswith('diverged') else f'failed: {reason}'}"
            for name, reason in self.view.failures
        ]
        budgets = [f"{each}." for each in own_budgets(self.view.record.sweep)]
        pruned = [pruned_sentence(self.view.pruned)] if self.view.pruned else []
        verdicts = (f"{each.sentence} {each.front}".rstrip() for each in self.view.verdicts)
        return [*verdicts, *budgets, *pruned, *failed]

    def _content(self, folder: Path) -> PageContent:
        """Write plots and numbers into `folder`; return the page's content."""
        law = SweepLaw.of(self.view.record, self.view.phases)
        tables = write_sweep_numbers(self.view, folder / NUMBERS_FOLDER)
        tables += write_law_numbers(law, folder / NUMBERS_FOLDER)
        return PageContent([sweep_article(self.view, law, folder)], tables)


def _table(title: str, caption: str) -> Table:
    return Table(
        title=Text(title),
        caption=Text(caption),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )


def _differences(contrasts: Sequence[Contrast], title: str) -> Table:
    table = _table(title, "Mean loss of arm minus other, nats [95 %]: below 0 the arm is better.")
    for column in ("arm", "with"):
        table.add_column(column, overflow="fold")
    table.add_column("best\nof", justify="right", overflow="fold")
    table.add_column("difference", justify="right", overflow="fold")
    table.add_column("p", justify="right", min_width=5)
    table.add_column("verdict", min_width=9)
    before = ""
    for each in contrasts:
        mean = each.nats.mean
        p = NOTHING if mean.p is None else "<.001" if mean.p < 0.001 else f"{mean.p:.3f}"
        # An arm is named in its first row alone.
        names = Text("" if each.arm == before else each.arm), Text(each.against)
        before = each.arm
        table.add_row(*names, str(each.k), shown(mean), p, each.result)
    return table
