"""`megaphase rehearse` as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from rehearsal_support import needs_compiler
from run_support import make_corpora, megaphase, run_settings, write_run_file

from megaphase.rehearsal import fake_device
from megaphase.utils.errors import InputError

LIMIT_SECONDS = 300
GPU_MODEL = {"layers": 2, "hidden": 1024, "heads": 8, "seq_len": 512}


def run_file(folder: Path, **changes: Any) -> Path:
    settings = run_settings(make_corpora(folder)) | {
        "precision": "bf16",
        "model": GPU_MODEL,
        "batch": {"samples": 64, "micro": 2},
    }
    return write_run_file(folder, settings | changes)


def rehearse(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        megaphase("rehearse", *arguments),
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        env=os.environ | {"COLUMNS": "80"},
    )


@pytest.mark.slow
@needs_compiler
def test_a_rank_of_many_is_shown(tmp_path: Path) -> None:
    run = run_file(tmp_path, parallel={"tensor": 2, "zero": 3, "sequence": True})
    before = sorted(tmp_path.rglob("*"))
    done = rehearse(run, "--processes", 8, "--rank", 3)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Rank 3 of 8 on a fake GPU" in done.stdout
    assert "A step of the run has 8 micro-batches, and 2 of them are rehearsed" in done.stdout
    for action in ("training", "validation", "save", "load", "reset"):
        assert f"│ {action} " in done.stdout
    assert "100% of them ahead of their use" in done.stdout
    assert sorted(tmp_path.rglob("*")) == before
    figures = json.loads(rehearse(run, "--processes", 8, "--rank", 3, "--json").stdout)
    assert figures["reports"]["train"]["kernels"]["_fused_adamw_"] == 2


@needs_compiler
@pytest.mark.slow
def test_memory_beyond_the_card_is_a_fault(tmp_path: Path) -> None:
    huge = GPU_MODEL | {"hidden": 16_384, "heads": 128}
    run = run_file(tmp_path, model=huge, parallel={"zero": 0}, hardware={"card": "a100-40gb"})
    done = rehearse(run, "--processes", 2)
    assert done.returncode == 1
    assert "megaphase: the run needs " in done.stderr
    assert "`megaphase plan` names layouts that fit" in done.stderr


@needs_compiler
@pytest.mark.parametrize(
    ("change", "key"),
    [
        pytest.param(
            "hardware.card=unknown", "hardware.card: no card 'unknown'", marks=pytest.mark.slow
        ),
        ("parts.optimizer=apex", "parts.optimizer: apex needs "),
        ("parallel={zero: 3, offload: nvme, offload_folder: nvme}", "parallel: a rehearsal has no"),
    ],
)
def test_wrong_input_of_the_rehearsed_rank_is_said_as_the_run_would(
    change: str, key: str, tmp_path: Path
) -> None:
    run = run_file(tmp_path)
    done = rehearse(run, change)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"megaphase: {run}: {key}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "3"], "processes"),
        (["--processes", "8192"], "megaphase: --processes: is 8,192; give at most 4,096"),
        pytest.param(
            ["--processes", "8", "--rank", "8"],
            "megaphase: --rank: is 8; give one below 8",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_wrong_options_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    done = rehearse(run_file(tmp_path, parallel={"tensor": 2}), *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        megaphase("rehearse", run_file(tmp_path)),
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        env={"PATH": str(tmp_path)},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("megaphase: g++: is not installed")


def test_code_that_others_could_have_put_there_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = fake_device._own_folder()
    assert (folder.parent, folder.stat().st_mode & 0o777) == (tmp_path, 0o700)
    assert fake_device._own_folder() == folder
    folder.chmod(0o777)
    with pytest.raises(InputError, match="can be written by other users, or is no folder; remove"):
        fake_device._own_folder()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(InputError, match="or is no folder"):
        fake_device._own_folder()
