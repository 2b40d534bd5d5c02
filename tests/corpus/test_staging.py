"""The staging folder of a corpus has one writer, also while another one leaves it."""

from __future__ import annotations

import multiprocessing
import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from megaphase.corpus.staging import Figures, StagedCorpus
from megaphase.utils.errors import InputError
from megaphase.utils.locks import is_locked

ENTRIES = 300


def enter_often(prefix: Path) -> None:
    """Fails if another process is in the folder, or removes files there, at the same time."""
    mark = prefix.with_name("inside")
    for _ in range(ENTRIES):
        try:
            with StagedCorpus(prefix, "") as staged:
                os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
                for suffix in (".bin", ".hash", ".sum"):
                    staged.open(suffix).write(b"tokens")
                assert all(file.path.exists() for file in staged.files.values())
                mark.unlink()
        except InputError:
            pass
        except OSError as error:
            # Two processes that come and go in the same microseconds miss the folder itself.
            if error.filename != os.fspath(staged_folder(prefix)):
                raise


def staged_folder(prefix: Path) -> Path:
    return prefix.with_name(f".{prefix.name}.draft")


def test_writers_that_come_and_go_are_never_together(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=enter_often, args=(tmp_path / "en",)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_the_next_writer_uses_stays(tmp_path, monkeypatch):
    prefix, rmdir = tmp_path / "en", Path.rmdir
    with ExitStack() as next_one:

        def rmdir_too_late(folder: Path) -> None:
            monkeypatch.setattr(Path, "rmdir", rmdir)
            next_one.enter_context(StagedCorpus(prefix, "")).open(".bin").write(b"tokens")
            rmdir(folder)

        with StagedCorpus(prefix, "") as first:
            first.open(".bin").write(b"others")
            monkeypatch.setattr(Path, "rmdir", rmdir_too_late)
        assert sorted(path.name for path in staged_folder(prefix).iterdir()) == [".bin", "lock"]
        with pytest.raises(InputError, match="is being written by another process"):
            StagedCorpus(prefix, "").__enter__()
        assert is_locked(staged_folder(prefix) / "lock")
    assert list(tmp_path.iterdir()) == []


def test_what_is_left_for_the_next_start(tmp_path):
    prefix = tmp_path / "en"
    with StagedCorpus(prefix, "job") as staged:
        staged.open(".bin").write(b"tokens")
        staged.save(Figures(documents=1), "note")
    names = sorted(path.name for path in staged_folder(prefix).iterdir())
    assert names == [".bin", "state.json"]  # no lock
    with StagedCorpus(prefix, "job") as staged:
        assert staged.state is not None
        assert staged.state.note == "note"
        staged.discard()
    assert list(tmp_path.iterdir()) == []
