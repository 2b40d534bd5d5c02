"""The lines that a run prints without a terminal, and its bar in a terminal."""

from __future__ import annotations

import io

from callback_support import step_record
from rich.console import Console

from megaphase.callbacks.callback import HeldOutLoss, StepSeconds, ValidationRecord
from megaphase.callbacks.display import TrainingDisplay


def shown(*, terminal: bool, phase_steps: int = 12) -> str:
    """Return the output of a run of 12 steps, of which 3 were done before."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    display = TrainingDisplay(
        console, steps=12, phase_steps={"only": phase_steps}, done=3, every_steps=5
    )
    display.on_run_begin()
    for step in range(4, 13):
        seconds = StepSeconds(0.25, 0.5, 0.25)
        display.on_step_end(step_record(step, seconds=seconds, tokens_per_second=2048.0))
        if step == 6:
            losses = {"en": HeldOutLoss(1.5, 0.5)}
            average = {"en": HeldOutLoss(1.25, 0.4)}
            record = ValidationRecord(6, "[x]", losses, {"en": None}, False, average)
            display.on_validation_end(record)
    display.on_run_end(None)
    return out.getvalue()


def test_plain_lines_come_every_few_steps_and_at_the_end() -> None:
    assert shown(terminal=False).splitlines() == [
        "only step 5/12  loss 2.0000  learning rate 1.00e-03  2,048 tokens/s  0:07 left",
        "[x] step 6  validation loss: en 1.5000",
        "[x] step 6  validation loss of the average: en 1.2500",
        "only step 10/12  loss 2.0000  learning rate 1.00e-03  2,048 tokens/s  0:02 left",
        "only step 12/12  loss 2.0000  learning rate 1.00e-03  2,048 tokens/s  0:00 left",
    ]


def test_a_phase_that_is_a_part_of_the_run_counts_its_own_steps_too() -> None:
    lines = shown(terminal=False, phase_steps=9).splitlines()
    assert lines[0].startswith("only step 5/12 (5/9 of the phase)  loss 2.0000  ")
    assert "only (12/9 of the phase)" in shown(terminal=True, phase_steps=9)


def test_a_terminal_gets_a_bar_and_the_validations() -> None:
    text = shown(terminal=True)
    assert "[x] step 6  validation loss: en 1.5000" in text
    assert "12/12" in text
    assert "learning rate" not in text


def test_the_time_left_counts_validations_as_long_as_the_newest() -> None:
    out, now = io.StringIO(), [0.0]
    console = Console(file=out, width=120)
    display = TrainingDisplay(
        console,
        steps=40,
        phase_steps={"only": 40},
        done=0,
        every_steps=10,
        validation_steps=10,
        clock=lambda: now[0],
    )
    display.on_run_begin()
    losses = ValidationRecord(0, "[x]", {"en": HeldOutLoss(1.5, 0.5)}, {"en": None}, False, None)
    for step in range(41):
        now[0] += 1.0
        if step:
            seconds = StepSeconds(0.25, 0.5, 0.25)
            display.on_step_end(step_record(step, seconds=seconds, tokens_per_second=2048.0))
        if step % 10 == 0:
            now[0] += 60.0 - (not step)
            display.on_validation_end(losses)
    display.on_run_end(None)
    left = [line.rpartition("  ")[2] for line in out.getvalue().splitlines() if "left" in line]
    # After step 10: 30 steps of a second, and validations after the steps 10, 20, 30 and 40.
    assert left == ["4:30 left", "3:20 left", "2:10 left", "0:00 left"]
