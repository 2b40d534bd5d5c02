"""The table that `megaphase plan` prints."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from megaphase.plan.plan import REPEATED_TOO_OFTEN


def plan_table(summary: dict[str, Any]) -> Table:
    """Tokens, sampling rate and epochs per phase and task, from `Plan.summary()`."""
    table = Table(title="Plan", title_justify="left")
    table.add_column("phase")
    table.add_column("task")
    for column in ("steps", "tokens", "asked", "rate", "epochs", "epochs so far"):
        table.add_column(column, justify="right")
    for phase in summary["phases"]:
        first = True
        for task, facts in phase["tasks"].items():
            if facts["samples"] == 0 and facts["rate"] == 0:
                continue
            warn = facts["epochs_so_far"] > REPEATED_TOO_OFTEN
            so_far = f"{facts['epochs_so_far']:.2f}"
            table.add_row(
                phase["name"] if first else "",
                task,
                f"{phase['steps']:,}" if first else "",
                f"{facts['tokens']:,}",
                f"{facts['requested_rate']:.4f}",
                f"{facts['rate']:.4f}",
                f"{facts['epochs']:.2f}",
                f"[bold yellow]{so_far} ![/]" if warn else so_far,
            )
            first = False
        table.add_section()
    return table


def plan_warnings(summary: dict[str, Any]) -> list[str]:
    """One sentence for every task that the run repeats too often."""
    last = summary["phases"][-1]["tasks"]
    return [
        f"{task} is repeated {facts['epochs_so_far']:.1f} times over the run (more than "
        f"{REPEATED_TOO_OFTEN:g}); lower its rate or set mixture.max_epochs"
        for task, facts in last.items()
        if facts["epochs_so_far"] > REPEATED_TOO_OFTEN
    ]
