"""The end of a log, however long it is."""

from __future__ import annotations

from pathlib import Path

from megaphase.sweep.slurm import _cut_off, _reason
from megaphase.sweep.trial_run import last_line
from megaphase.utils.files import last_lines

CANCELLED = "JOB 7 ON n1 CANCELLED AT 2025-01-01T00:00:00 DUE TO TIME LIMIT"


def test_it_is_that_of_the_whole_text(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for text in ("", "\n\n", "one", "one\n", "one\n \ntwo\r\nthree\n\n", "é\u2028\nü"):
        log.write_text(text)
        expected = [line for line in log.read_text().splitlines() if line.strip()]
        assert last_lines(log) == expected


def test_only_so_many_bytes_are_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("first\nsecond\nthird\n")
    assert last_lines(log, 12) == ["econd", "third"]
    log.write_text("ééé\nlast\n")
    assert last_lines(log, 9) == ["\ufffdé", "last"]


def test_a_log_that_does_not_fit_memory(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with open(log, "wb") as file:
        file.truncate(1 << 40)  # a hole, which takes no space on the disk
        file.seek(0, 2)
        file.write(b"\nn1: megaphase: out of memory\n\nmegaphase: job 7: given up\n")
    assert last_line(log) == "job 7: given up"
    assert _reason(log) == "out of memory"
    assert _cut_off(log) is None
    with open(log, "ab") as file:
        file.write(f"slurmstepd-n1: error: *** {CANCELLED} ***\n".encode())
    assert _cut_off(log) == CANCELLED
