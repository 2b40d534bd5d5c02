"""The benchmarks of a run, for its report."""

from __future__ import annotations

from megaphase.report.page import Cell, PageTable
from megaphase.report.runs import BenchmarkRow, RunRecord

NOTHING = "–"
_NOTE = "By lm-evaluation-harness, on the weights after so many steps, without standard errors."
_GROUPS = " Groups of tasks are in bold: the mean over their tasks that have the metric."


def benchmark_table(run: RunRecord) -> PageTable | None:
    """Return the figures at the end of each phase and the newest ones, first those of groups; None
    if there are none."""
    if not run.benchmarks:
        return None
    shown = _shown(run)
    columns = ["benchmark", "metric", *(f"{row.phase}, step {row.step:,}" for row in shown)]
    rows: list[list[str | Cell]] = []
    for is_group in (True, False):
        by_row = [row.benchmark_groups if is_group else row.benchmarks for row in shown]
        names = dict.fromkeys(name for each in by_row for name in each)
        for name in names:
            metrics = dict.fromkeys(metric for each in by_row for metric in each.get(name, {}))
            for metric in metrics:
                values = [each.get(name, {}).get(metric) for each in by_row]
                cells = [NOTHING if value is None else f"{value:.4f}" for value in values]
                rows.append([Cell(name, bold=is_group), metric, *cells])
    note = _NOTE + (_GROUPS if any(row.benchmark_groups for row in shown) else "")
    return PageTable(columns, rows, note)


def _shown(run: RunRecord) -> list[BenchmarkRow]:
    """The first measurement, the last one of each phase, and the newest."""
    last = {row.phase: row for row in run.benchmarks}
    shown = {row.step: row for row in (run.benchmarks[0], *last.values())}
    return [shown[step] for step in sorted(shown)]
