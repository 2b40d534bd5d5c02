"""`checkpoint.end_after` ends a run at a fixed step; without it, the run resumes exactly."""

from pathlib import Path
from typing import Any

import pytest
from distributed import check, launch
from run_support import (
    STEPS,
    make_corpora,
    megaphase,
    read_rows,
    run_settings,
    timeless,
    write_run_file,
)

ALL_STEPS = sum(STEPS)


def test_a_run_ends_after_a_step_and_resumes_exactly(tmp_path: Path) -> None:
    """In the middle of a phase, between two saves, and at the end of a phase."""
    settings = run_settings(make_corpora(tmp_path / "corpora"))
    whole = write_run_file(tmp_path / "whole", settings)
    paused = write_run_file(tmp_path / "paused", settings)
    train(whole)
    for end in (5, STEPS[0]):
        train(paused, f"checkpoint.end_after={end}")
        rows = read_rows(paused.parent / "run")
        assert [row["step"] for row in rows if "loss" in row] == [*range(1, end + 1)]
        assert rows[-1] == {"step": end, "event": "checkpoint", "phase": "pretrain"}
        words = train(paused, f"checkpoint.end_after={end}")
        assert f"checkpoint.end_after: {end} has been reached" in words
        assert read_rows(paused.parent / "run") == rows
    train(paused)
    assert measured(paused) == measured(whole)
    assert measured(whole)[-1]["step"] == ALL_STEPS


def measured(run_file: Path) -> list[dict[str, Any]]:
    rows = timeless(read_rows(run_file.parent / "run"))
    return [row for row in rows if row.get("event") != "checkpoint"]


@pytest.mark.distributed
def test_all_ranks_end_there(tmp_path: Path) -> None:
    settings = run_settings(make_corpora(tmp_path / "corpora"), parallel={"tensor": 2, "zero": 3})
    run_file = write_run_file(tmp_path / "run", settings)
    train(run_file, "checkpoint.end_after=3", processes=4)
    assert read_rows(run_file.parent / "run")[-1]["step"] == 3


def train(run_file: Path, *overrides: str, processes: int = 1) -> str:
    results = launch(megaphase("train", run_file, *overrides), processes)
    check(results)
    return results[0].stdout + results[0].stderr
