"""Every process keeps compiled kernels on its own node, in a folder of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megaphase.distributed.triton_cache import use_local_triton_cache


def test_no_two_processes_of_a_node_share_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folders = set()
    for rank in ("0", "1"):
        monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
        monkeypatch.setenv("LOCAL_RANK", rank)
        use_local_triton_cache()
        folders.add(Path(os.environ["TRITON_CACHE_DIR"]))
    assert len(folders) == 2
    assert all(tmp_path in folder.parents for folder in folders)


def test_a_folder_that_was_chosen_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/scratch/kernels")
    use_local_triton_cache()
    assert os.environ["TRITON_CACHE_DIR"] == "/scratch/kernels"
