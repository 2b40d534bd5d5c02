"""The report in a terminal: a line for each finding, and its remedy below it."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megaphase.doctor.doctor import Result

STYLES = {"ok": "green", "warning": "yellow", "fault": "bold red"}
VERDICT_WIDTH, NAME_WIDTH = len("warning"), len("shared memory")


def print_result(console: Console, result: Result) -> None:
    """Print the findings of a check."""
    for finding in result.findings:
        row = Table.grid(padding=(0, 2, 0, 0))
        row.add_column(width=VERDICT_WIDTH)
        row.add_column(width=NAME_WIDTH)
        row.add_column(overflow="fold")
        verdict = Text(finding.verdict, style=STYLES[finding.verdict])
        row.add_row(verdict, Text(result.check), Text(finding.text))
        if finding.remedy:
            row.add_row("", "", Text(f"→ {finding.remedy}", style="italic"))
        console.print(row)


def print_summary(console: Console, counts: Mapping[str, int]) -> None:
    """Print how many findings there are of each kind."""

    def number(count: int, word: str) -> str:
        return f"{count} {word}{'' if count == 1 else 's'}"

    faults, warnings = counts["faults"], counts["warnings"]
    console.print(
        f"{counts['ok']} ok, {number(warnings, 'warning')}, {number(faults, 'fault')}",
        style="bold",
    )
