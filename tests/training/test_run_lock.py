"""A job that starts again waits for the lock of a node that was lost in its last start."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from megaphase.training.run_directory import RunDirectory
from megaphase.utils.errors import RunError

FORK = multiprocessing.get_context("fork")


def train(path: Path, held: Event, seconds: float) -> None:
    with RunDirectory(path).sole_run("run.yaml: output"):
        held.set()
        time.sleep(seconds)


@pytest.mark.parametrize("restarts", ["0", "2"])
def test_only_a_job_that_was_requeued_waits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    restarts: str,
) -> None:
    held = FORK.Event()
    FORK.Process(target=train, args=(tmp_path / "run", held, 1.5)).start()
    held.wait()
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    directory = RunDirectory(tmp_path / "run")
    if restarts == "0":
        with (
            pytest.raises(RunError, match=r"another process is training .* remove .*run/\.lock"),
            directory.sole_run("run.yaml: output"),
        ):
            pass
    else:
        with directory.sole_run("run.yaml: output"):
            said = capsys.readouterr().err
        assert "run/.lock: waiting up to 5 minutes for the end of the job's last start" in said
