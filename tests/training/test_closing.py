"""The lines with which a run ends, once all of its phases are done."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_support import run_settings, write_run_file

from megaphase.callbacks.callback import HeldOutLoss
from megaphase.config.load import load_run_file
from megaphase.training.closing import MOST_TASKS, closing_lines, next_commands

LOSSES = {"alda": HeldOutLoss(2.5, 1.25), "boreth": HeldOutLoss(3.0, 1.5)}


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The run file of a finished run; its folder is the current one."""
    monkeypatch.chdir(tmp_path)
    return load_run_file(write_run_file(tmp_path / "my runs", run_settings(Path("/corpora"))))


def lines(config, **changes):
    facts = {"step": 21, "steps": 21, "earlier": 0, "seconds": 134.4, "losses": LOSSES}
    return list(closing_lines(config, **facts | {"average": None, "bests": {}} | changes))


def test_losses_checkpoint_and_commands(config):
    assert lines(config) == [
        "Done: 21 steps, in 2:14",
        "Validation loss at the end, nats a token (bits a byte):",
        "  alda    2.5000 (1.2500)",
        "  boreth  3.0000 (1.5000)",
        "Checkpoint: my runs/run/checkpoints/step-00000021, also my runs/run@joint",
        "What next:",
        "  megaphase report 'my runs/run' --out report",
        "  megaphase evaluate 'my runs/run'@joint",
        "  megaphase generate 'my runs/run'@joint --prompt \"...\"",
    ]


def test_a_resumed_branch_with_best_weights_and_an_average(config):
    found = lines(
        config,
        steps=9,
        earlier=5,
        bests={"boreth": (15, 2.75), "mean": (15, 2.6)},
        average={"alda": HeldOutLoss(2.25, 1.0), "boreth": HeldOutLoss(2.9, 1.4)},
    )
    assert found[0] == "Done: 9 steps, 4 of them since the last start, in 2:14"
    assert found[3] == (
        "  boreth  3.0000 (1.5000), of the average 2.9000, best 2.7500 at step 15: best-boreth"
    )


def test_of_very_many_tasks_the_last_are_counted(config):
    losses = {f"task{i}": HeldOutLoss(2.0, 1.0) for i in range(MOST_TASKS + 3)}
    found = lines(config, losses=losses)
    assert f"  task{MOST_TASKS - 1}  2.0000 (1.0000)" in found
    assert "  and 3 more tasks; the report has all" in found


def test_commands_go_with_the_tasks(tmp_path):
    settings = run_settings(Path("/corpora"), test={"fraction": 0.1})
    for task in settings["tasks"].values():
        task["kind"] = "translation"
    found = list(next_commands(load_run_file(write_run_file(tmp_path / "run", settings))))
    assert found[2].endswith("@joint --split test")
    assert found[3] == f"  megaphase translate {tmp_path / 'run' / 'run.yaml'} --checkpoint joint"
    assert len(found) == 4
