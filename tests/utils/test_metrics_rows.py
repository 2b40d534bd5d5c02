"""`metrics.jsonl` from its end, also where a part of it was cut off or altered."""

import json
from pathlib import Path

import pytest

from megaphase.sweep.display import phase_steps_done
from megaphase.utils import metrics_rows
from megaphase.utils.metrics_rows import last_rows, rows_from_end

TRAINING = [{"step": step, "phase_step": step - 3, "loss": 2.0} for step in (4, 5, 6)]


def write(path: Path, rows: list[dict], tail: str = "") -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + tail)
    return path


def test_the_newest_row_comes_first_and_half_a_row_is_none(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", TRAINING, '{"step": 7, "phase_st')
    assert list(rows_from_end(path)) == TRAINING[::-1]
    assert last_rows(path) == TRAINING


def test_lines_that_are_no_rows_are_passed_over(tmp_path: Path) -> None:
    lines = ["no row", "[1]", '{"step": "x"}', '{"step": -1, "loss": 1}', f'{{"step": {2**63}}}']
    path = write(tmp_path / "metrics.jsonl", TRAINING[:1], "\n".join(lines) + "\n")
    assert last_rows(path) == TRAINING[:1]


def test_of_a_long_file_only_the_end_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "metrics.jsonl", TRAINING)
    monkeypatch.setattr(metrics_rows, "_TAIL_BYTES", len(json.dumps(TRAINING[2])) + 10)
    assert last_rows(path) == TRAINING[2:]


def test_steps_of_the_newest_phase(tmp_path: Path) -> None:
    validation = {"step": 6, "validation": {"en": {"loss": 2.0}}}
    assert phase_steps_done(write(tmp_path / "metrics.jsonl", [*TRAINING, validation])) == 3
    assert phase_steps_done(write(tmp_path / "none.jsonl", [validation])) == 0
    assert phase_steps_done(tmp_path / "missing.jsonl") == 0
