"""Files in a run's folders that are not the run's: ignored or set aside, and reported."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from data_support import wait_until
from plan_support import contents, spec_of, write_corpus, write_three_tasks
from rich.console import Console
from run_support import (
    STEPS,
    copy_run,
    make_corpora,
    read_rows,
    run_settings,
    timeless,
    write_run_file,
)
from store_support import make_store, names, save
from warm_commands import run_killed, run_well

from megaphase.checkpoint.names import find_in_run, newest_state
from megaphase.checkpoint.state import checkpoint_folders, full_name, step_of
from megaphase.corpus import Corpus
from megaphase.plan.build import ensure_built, plan_folder
from megaphase.training.startup import claim_directory, open_plan
from megaphase.utils.errors import InputError
from megaphase.utils.locks import exclusive_lock

WAIT_SECONDS = 60


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """End the test if something waits forever for the other end of a FIFO."""

    def fail(*_: object) -> None:
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(10 * WAIT_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def a_file(path: Path) -> None:
    path.write_text("mine")


def a_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def a_loop(path: Path) -> None:
    path.symlink_to(path.name)


def a_link_to_a_checkpoint(path: Path) -> None:
    path.symlink_to(full_name(4))


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.mkdir()
    (path / "notes").write_text("mine")


def a_fifo_as_manifest(path: Path) -> None:
    path.mkdir()
    os.mkfifo(path / "manifest.json")
    os.mkfifo(path / "state.json")


NO_FOLDERS = [a_file, a_dangling_link, a_loop, a_link_to_a_checkpoint, a_fifo]
FOLDERS = [a_folder, a_fifo_as_manifest]
Put = Callable[[Path], None]


@pytest.mark.parametrize("put", [*NO_FOLDERS, *FOLDERS])
def test_with_the_name_of_a_checkpoint(put: Put, tmp_path: Path) -> None:
    save(tmp_path, 4)
    put(tmp_path / full_name(8))
    said: list[str] = []
    store = make_store(tmp_path)
    found = store.newest_whole(said.append)
    assert found is not None
    assert found.folder == tmp_path / full_name(4)
    [sentence] = said
    assert sentence.startswith(f"{tmp_path / full_name(8)}")
    assert ("ignored" if put in NO_FOLDERS else "going back") in sentence
    assert store.newest_name() == full_name(4)
    state = newest_state_of(tmp_path)
    assert state is not None
    assert state["step"] == 4
    store.prepare({})
    save(tmp_path, 8)
    assert {full_name(4), f"{full_name(8)}.set-aside", full_name(8), "latest"} == set(
        names(tmp_path)
    )
    found = make_store(tmp_path).newest_whole(pytest.fail)
    assert found is not None
    assert found.folder == tmp_path / full_name(8)


def newest_state_of(folder: Path) -> dict[str, object] | None:
    """Return the newest state of the run with this folder of checkpoints."""
    run = folder.parent / f"{folder.name}-run"
    run.mkdir()
    (run / "checkpoints").symlink_to(folder)
    with pytest.raises(InputError, match="there is no such checkpoint"):
        find_in_run(run, "x" * 300)
    return newest_state(run)


@pytest.mark.parametrize("put", [a_file, a_dangling_link, a_loop, a_fifo, a_folder])
def test_where_a_save_is_written_aside(
    put: Put, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    for name in (f".{full_name(4)}.partial", ".latest.link", f".{full_name(2)}.removed"):
        put(tmp_path / name)
    (tmp_path / ".snapshot").mkdir()
    (tmp_path / ".snapshot" / "file").write_text("of the file system")
    save(tmp_path, 2)
    make_store(tmp_path).prepare({})
    for step in (4, 6):
        save(tmp_path, step, keep=1)
    left = names(tmp_path)
    assert {full_name(6), "latest", ".snapshot"} <= set(left)
    assert (tmp_path / ".snapshot" / "file").exists()
    # This program leaves directories and links there; the others belong to somebody else.
    kept = [name for name in left if name.endswith(".set-aside")]
    assert len(kept) == (3 if put in (a_file, a_fifo) else 0)
    assert capfd.readouterr().err.count("it is renamed to") == len(kept)


@pytest.mark.parametrize("put", [a_file, a_fifo, a_folder])
def test_in_the_place_of_a_link(put: Put, tmp_path: Path) -> None:
    put(tmp_path / "latest")
    save(tmp_path, 2)
    assert (tmp_path / "latest").resolve().name == full_name(2)
    assert os.path.lexists(tmp_path / "latest.set-aside")


def test_names_that_are_none_of_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 4)
    others = ["step-1", "step-000000008", "step-٠٠٠٠٠٠٠٨", "step-00000009 ", "best-x", "a\nb"]
    for name in others:
        (tmp_path / name).mkdir()
    os.mkdir(os.fsencode(tmp_path) + b"/step-\xff0000008")
    assert [step_of(name) for name in others] == [None] * len(others)
    found = make_store(tmp_path).newest_whole(pytest.fail)
    assert found is not None
    assert found.folder.name == full_name(4)
    before = set(os.listdir(os.fsencode(tmp_path)))
    make_store(tmp_path).prepare({})
    save(tmp_path, 8, keep=1)
    after = set(os.listdir(os.fsencode(tmp_path)))
    assert before - {full_name(4).encode()} <= after


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 5):
        (tmp_path / full_name(step)).mkdir()
    found = [folder.name for folder in checkpoint_folders(tmp_path)]
    assert found == [full_name(5), full_name(99_999_999), full_name(100_000_000)]


def test_other_directories_do_not_take_the_place_of_checkpoints_that_are_kept(
    tmp_path: Path,
) -> None:
    for step in (2, 4):
        save(tmp_path, step, keep=2)
    a_folder(tmp_path / full_name(3))
    save(tmp_path, 6, keep=2)
    assert {full_name(3), full_name(4), full_name(6)} < set(names(tmp_path))
    assert full_name(2) not in names(tmp_path)


@pytest.mark.parametrize("put", [a_file, a_loop, a_fifo])
def test_where_nothing_but_that_is_there_no_run_begins_anew(put: Put, tmp_path: Path) -> None:
    put(tmp_path / full_name(4))
    with pytest.raises(
        InputError, match=r"not a checkpoint, and no other checkpoint there is intact"
    ):
        make_store(tmp_path).newest_whole(pytest.fail)
    assert names(tmp_path) == [full_name(4)]


@pytest.mark.parametrize("put", [a_dangling_link, a_loop, a_fifo, a_folder, a_file])
def test_in_the_place_of_a_lock(put: Put, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    path = tmp_path / "lock"
    put(path)
    with exclusive_lock(path, lambda: pytest.fail("somebody holds it")):
        pass
    set_aside = put in (a_dangling_link, a_loop, a_folder)
    assert os.path.lexists(tmp_path / "lock.set-aside") == set_aside
    assert ("not a lock file; it is renamed" in capfd.readouterr().err) == set_aside


@pytest.mark.parametrize("put", [a_file, a_dangling_link, a_loop, a_fifo, a_folder])
def test_in_the_place_of_a_plan(put: Put, tmp_path: Path) -> None:
    config, _ = write_three_tasks(tmp_path)
    spec = spec_of(config)
    whole = contents(ensure_built(spec, tmp_path / "elsewhere"))
    folder = plan_folder(config.output, spec)
    if put is not a_folder:
        folder.parent.parent.mkdir()
        put(folder.parent)
        ensure_built(spec, config.output, say=lambda text: None)
        os.rename(folder, folder.with_name("built"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    put(folder)
    said: list[str] = []
    assert ensure_built(spec, config.output, say=said.append) == folder
    assert contents(folder) == whole
    assert len(said) == 1
    assert os.path.lexists(folder.with_name(f"{folder.name}.set-aside"))


def test_indices_of_other_plans_are_removed_when_a_run_begins(tmp_path: Path) -> None:
    config, _ = write_three_tasks(tmp_path)
    plans, said = config.output / "plan", list[str]()
    old, foreign = plans / "0123456789abcdef", plans / "00112233445566ff"

    def begin() -> None:
        plan = open_plan(config, spec_of(config), None, said.append, Console(quiet=True))
        claim_directory(config, plan, said.append, trains=True)

    ensure_built(spec_of(config), config.output).rename(old)
    for folder in (foreign, plans / "documents-0123456789abcdef"):
        folder.mkdir()
        (folder / "mine").touch()
    own = plan_folder(config.output, spec_of(config))
    kept = {own.name, foreign.name, "documents-0123456789abcdef"}
    begin()
    sentence = f"{old}: the index of another plan, which is not trained here, is removed"
    assert sentence in said
    wait_until(lambda: {path.name for path in plans.iterdir() if path.is_dir()} == kept)
    # When it is resumed, nothing is removed.
    ensure_built(spec_of(config), tmp_path / "elsewhere").rename(old)
    begin()
    assert said.count(sentence) == 1
    assert old.is_dir()


def test_a_fifo_as_the_header_of_a_plan(tmp_path: Path) -> None:
    config, _ = write_three_tasks(tmp_path)
    folder = ensure_built(spec_of(config), config.output)
    (folder / "index.json").unlink()
    os.mkfifo(folder / "index.json")
    said: list[str] = []
    ensure_built(spec_of(config), config.output, say=said.append)
    assert said == [f"{folder}: index.json has been altered; building the plan again"]


@pytest.mark.parametrize("put", [a_file, a_loop, a_fifo, a_folder])
def test_in_the_place_of_a_draft(put: Put, tmp_path: Path) -> None:
    put(tmp_path / ".en.draft")
    (tmp_path / ".en.draft" / "below").mkdir() if put is a_folder else None
    write_corpus(tmp_path / "en", [3, 4])
    assert np.array_equal(Corpus.open(tmp_path / "en").lengths, [3, 4])


def test_a_run_goes_on_whatever_lies_in_its_way(tmp_path: Path) -> None:
    settings = run_settings(
        make_corpora(tmp_path / "corpora"),
        checkpoint={"every_steps": 4, "keep": 2, "asynchronous": False},
    )
    path = write_run_file(tmp_path / "a", settings)
    run_killed(path, before_step=STEPS[0] - 1)
    whole = copy_run(tmp_path / "a", tmp_path / "whole")
    run_well("train", whole)

    run_dir = tmp_path / "a" / "run"
    checkpoints = run_dir / "checkpoints"
    # The newest of two is missing.
    os.rename(checkpoints / full_name(8), tmp_path / "moved")
    a_file(checkpoints / full_name(8))
    a_loop(checkpoints / full_name(12))
    a_file(checkpoints / f".{full_name(12)}.partial")
    a_folder(checkpoints / full_name(16))
    a_fifo_as_manifest(checkpoints / full_name(20))
    os.mkdir(os.fsencode(checkpoints) + b"/\xff")
    (run_dir / ".lock").unlink()
    a_folder(run_dir / ".lock")
    os.rename(run_dir / "plan", tmp_path / "plan")
    a_file(run_dir / "plan")
    run_well("train", path)
    assert timeless(read_rows(run_dir)) == timeless(read_rows(whole.parent / "run"))
    assert "steps are done; nothing to do\n" in run_well("train", path)
