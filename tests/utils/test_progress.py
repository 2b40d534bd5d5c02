"""Progress is a bar on a terminal, and a plain line now and then in a log."""

import io

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn

from megaphase.utils import progress
from megaphase.utils.progress import ProgressDisplay, bytes_progress


def console_of(screen: io.StringIO, terminal: bool) -> Console:
    return Console(file=screen, force_terminal=terminal, width=80)


def test_a_terminal_gets_bars_and_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    screen = io.StringIO()
    console = console_of(screen, terminal=True)
    with ProgressDisplay(console, BarColumn(), MofNCompleteColumn()) as display:
        assert display.has_bars
        first, second = display.add_bar("[first]", 4, done=1), display.add_bar("second", None)
        first.update(advance=2)
        second.restart("third")
        second.update(completed=5, total=7)
        display.line_when_due(lambda: pytest.fail("a line beside bars"))
    last = screen.getvalue()
    assert "[first]" in last
    assert "3/4" in last
    assert "third" in last
    assert "5/7" in last


def test_a_bar_that_was_removed_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    with ProgressDisplay(console_of(screen, terminal=True), BarColumn()) as display:
        display.add_bar("gone", 4).remove()
    assert "gone" not in screen.getvalue().splitlines()[-1]


def test_a_log_gets_a_line_when_one_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 9.0, 11.0, 12.0, 22.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    screen = io.StringIO()
    with ProgressDisplay(console_of(screen, terminal=False), BarColumn()) as display:
        assert not display.has_bars
        bar = display.add_bar("work", 4)
        for done in range(1, 5):
            bar.update(advance=1)
            display.line_when_due(lambda done=done: f"[{done}] of 4")
    assert screen.getvalue().splitlines() == ["[2] of 4", "[4] of 4"]


def test_nothing_is_shown_without_a_console() -> None:
    with bytes_progress(None, "reading", 10) as count:
        count(5)
