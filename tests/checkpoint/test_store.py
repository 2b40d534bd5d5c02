"""The checkpoint store, the saver and their files: damage, full disks, folders, slow disks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from store_support import make_saver, make_store, names, save, snapshot
from torch import Tensor

from megaphase.callbacks.metrics_file import MetricsFile
from megaphase.callbacks.metrics_recovery import KeptMetrics
from megaphase.checkpoint import saver as saver_module
from megaphase.checkpoint import store as store_module
from megaphase.checkpoint.saver import Saver, SaveStatus
from megaphase.checkpoint.state import full_name
from megaphase.checkpoint.store import CheckpointStore
from megaphase.checkpoint.tensor_file import file_bytes, write_tensors
from megaphase.distributed.control_group import ControlGroup
from megaphase.utils.errors import InputError, RunError
from megaphase.utils.files import describe_file

PROCESSES = 2
TIMEOUT_SECONDS = 400.0


def damage(victim: Path, how: str) -> None:
    content = bytearray(victim.read_bytes())
    if how == "missing":
        victim.unlink()
    elif how == "truncated":
        victim.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)


@pytest.mark.parametrize("how", ["altered", "truncated", "missing"])
@pytest.mark.parametrize(
    "file", ["shard-00000.safetensors", "parameters.json", "state.json", "manifest.json"]
)
def test_damage_is_named_and_the_checkpoint_before_is_taken(
    file: str, how: str, tmp_path: Path
) -> None:
    for step in (4, 8):
        save(tmp_path, step)
    victim = tmp_path / full_name(8) / file
    damage(victim, how)
    said: list[str] = []
    found = make_store(tmp_path).newest_whole(said.append)
    assert found is not None
    assert found.folder == tmp_path / full_name(4)
    assert found.state["step"] == 4
    (sentence,) = said
    assert str(tmp_path / full_name(8)) in sentence
    # A bit of a manifest may be one of the hash of another file, which then seems altered.
    assert str(victim) in sentence or (file == "manifest.json" and how == "altered")
    assert "going back to the checkpoint before" in sentence


def test_where_none_is_whole_nothing_begins_anew(tmp_path: Path) -> None:
    for step in (4, 8):
        save(tmp_path, step)
        damage(tmp_path / full_name(step) / "state.json", "altered")
    said: list[str] = []
    with pytest.raises(InputError) as refused:
        make_store(tmp_path).newest_whole(said.append)
    assert len(said) == 1
    assert str(tmp_path / full_name(4) / "state.json") in str(refused.value)
    assert f"remove {tmp_path} to start again" in str(refused.value)


def test_latest_leads_to_the_newest_and_the_last_and_permanent_ones_stay(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep=2, permanent=step == 2)
        assert (tmp_path / "latest").resolve().name == full_name(step)
    assert names(tmp_path) == ["latest", *map(full_name, (2, 4, 5))]


def test_the_newest_one_from_before_a_divergence_stays(tmp_path: Path) -> None:
    for step in (1, 2, 4):
        save(tmp_path, step, keep=1)
    assert names(tmp_path) == ["latest", full_name(4)]
    for step in (6, 8):
        save(tmp_path, step, keep=1, sound=5)
        assert names(tmp_path) == ["latest", full_name(4), full_name(step)]
    assert make_store(tmp_path).newest_name() == full_name(8)
    assert make_store(tmp_path).newest_name(until=7) == full_name(4)
    assert make_store(tmp_path).newest_name(until=3) is None
    save(tmp_path, 10, keep=1)
    assert names(tmp_path) == ["latest", full_name(10)]


def test_a_run_that_was_copied_without_its_links_goes_on(tmp_path: Path) -> None:
    save(tmp_path / "a", 1)
    shutil.copytree(tmp_path / "a", tmp_path / "b", symlinks=False)
    save(tmp_path / "b", 2)
    assert (tmp_path / "b" / "latest").is_symlink()
    assert (tmp_path / "b" / "latest").resolve().name == full_name(2)


def test_damaged_checkpoints_of_later_steps_do_not_crowd_out_new_ones(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        save(tmp_path, step, keep=3)
    for step in (8, 12):
        damage(tmp_path / full_name(step) / "state.json", "altered")
    save(tmp_path, 6, keep=1)  # of the run that resumed from step 4
    found = make_store(tmp_path).newest_whole(lambda text: None)
    assert found is not None
    assert found.state["step"] == 6
    save(tmp_path, 8, keep=1)  # at the step of a damaged one
    found = make_store(tmp_path).newest_whole(lambda text: None)
    assert found is not None
    assert found.state["step"] == 8
    assert names(tmp_path) == ["latest", full_name(8), full_name(12)]


def test_what_a_killed_process_left_aside_is_removed(tmp_path: Path) -> None:
    save(tmp_path, 4)
    left = tmp_path / f".{full_name(8)}.partial"
    shutil.copytree(tmp_path / full_name(4), left)
    shutil.copytree(left, tmp_path / f".{full_name(2)}.removed")
    (tmp_path / ".latest.link").symlink_to("nowhere")
    store = make_store(tmp_path)
    found = store.newest_whole(lambda text: None)
    assert found is not None
    assert found.state["step"] == 4, "it lies aside, so it is never taken for whole"
    store.prepare({"best-hi": full_name(4)})
    assert names(tmp_path) == ["best-hi", "latest", full_name(4)]


def test_too_little_space_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 4)
    nearly_full = SimpleNamespace(free=300)
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda path: nearly_full)
    with pytest.raises(RunError, match=r"needs 0\.000 GB.*resumes from step-00000004") as error:
        save(tmp_path, 8)
    assert len(str(error.value).splitlines()) == 1
    assert names(tmp_path) == ["latest", full_name(4)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only a privileged user may mount a small disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_small_disk_that_fills_up_keeps_its_whole_checkpoints(small_disk: Path) -> None:
    save(small_disk, 1)
    saver = make_saver(small_disk)
    with pytest.raises(RunError, match=r"the disk has .* left.*resumes from step-00000001"):
        saver.save(full_name(2), snapshot(torch.zeros(20_000)), {}, {})
    shown = store_module.shutil.disk_usage(small_disk).free
    with pytest.MonkeyPatch.context() as patch:  # another process takes the space first
        patch.setattr(store_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e9))
        saver.save(full_name(2), snapshot(torch.zeros(20_000)), {}, {})
        with pytest.raises(RunError, match=r"rank 0 could not write: No space left on device"):
            saver.finish()
    assert names(small_disk) == ["latest", full_name(1)]
    assert store_module.shutil.disk_usage(small_disk).free == shown
    assert make_store(small_disk).newest_whole(pytest.fail) is not None
    save(small_disk, 3)


@pytest.mark.parametrize("what", ["a file in its place", "a file above it"])
def test_a_folder_that_cannot_be_made_is_found_at_the_start(what: str, tmp_path: Path) -> None:
    place = tmp_path / "run" / "checkpoints"
    blocked = place if what == "a file in its place" else place.parent
    blocked.parent.mkdir(exist_ok=True)
    blocked.write_text("")
    with pytest.raises(RunError, match=rf"{place}: cannot be written \("):
        make_store(place).prepare({})
    if blocked == place:
        # Before the run's record is started again.
        with pytest.raises(InputError, match=rf"{place}: is a file, where a run has"):
            make_store(place).newest_whole(pytest.fail)
    else:
        assert make_store(place).newest_whole(pytest.fail) is None


def prepare_read_only(folder: str) -> str:
    """Return the error for a folder that this process may not write to."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        make_store(Path(folder)).prepare({})
    except RunError as error:
        return str(error)
    finally:
        os.seteuid(before)
    return "nothing"


def test_a_folder_that_is_read_only_is_found_at_the_start(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == tmp_path.owner() and folder.stat().st_mode & 0o77 == 0:
            folder.chmod(0o755)  # pytest's own, which nobody else may look into
    place = tmp_path / "checkpoints"
    place.mkdir(mode=0o555)
    (said,) = run_ranks(prepare_read_only, 1, str(place))
    assert said == f"{place}: cannot be written (Permission denied)"


class SlowDisk:
    """Replaces write_tensors: starts when it is allowed to, and records that it was called."""

    def __init__(self) -> None:
        self.called, self.may_write = threading.Event(), threading.Event()
        self.at_work = 0
        self.most_at_work = 0

    def write(self, path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
        self.at_work += 1
        self.most_at_work = max(self.most_at_work, self.at_work)
        self.called.set()
        assert self.may_write.wait(60)
        written = write_tensors(path, tensors)
        self.at_work -= 1
        return written


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    disk = SlowDisk()
    monkeypatch.setattr(saver_module, "write_tensors", disk.write)
    return disk


def stored(folder: Path, step: int) -> Tensor:
    return load_file(folder / full_name(step) / "shard-00000.safetensors")["weight/w"]


def test_a_save_holds_what_was_when_it_began(slow_disk: SlowDisk, tmp_path: Path) -> None:
    weights = torch.arange(1000.0)
    expected = weights.clone()
    saver = make_saver(tmp_path)
    saver.save(full_name(1), snapshot(weights), {}, {})
    assert slow_disk.called.wait(60)
    assert saver.status == SaveStatus.AT_WORK
    weights.zero_()  # the next step
    assert names(tmp_path) == [f".{full_name(1)}.partial"]
    slow_disk.may_write.set()
    saver.finish()
    assert saver.status == SaveStatus.DONE
    assert torch.equal(stored(tmp_path, 1), expected)


def test_a_save_waits_for_the_one_before(slow_disk: SlowDisk, tmp_path: Path) -> None:
    weights = torch.full((1000,), 1.0)
    saver = make_saver(tmp_path)
    saver.save(full_name(1), snapshot(weights), {}, {})
    weights.fill_(2.0)
    second = threading.Thread(target=saver.save, args=(full_name(2), snapshot(weights), {}, {}))
    second.start()
    second.join(0.2)
    assert second.is_alive(), "the first has not been written"
    slow_disk.may_write.set()
    second.join(60)
    saver.finish()
    assert slow_disk.most_at_work == 1
    assert torch.equal(stored(tmp_path, 1), torch.full((1000,), 1.0))
    assert torch.equal(stored(tmp_path, 2), torch.full((1000,), 2.0))


def test_a_save_that_need_not_be_waited_for_is_not_asked_for(
    slow_disk: SlowDisk, tmp_path: Path
) -> None:
    saver = make_saver(tmp_path, asynchronous=False)
    slow_disk.may_write.set()
    saver.save(full_name(1), snapshot(torch.ones(10)), {}, {})
    assert names(tmp_path) == ["latest", full_name(1)]


def test_after_a_failed_save_the_next_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = make_saver(tmp_path)

    def fail(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
        path.write_bytes(b"half")
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(saver_module, "write_tensors", fail)
        saver.save(full_name(1), snapshot(torch.ones(10)), {}, {})
        with pytest.raises(RunError, match=r"rank 0 could not write: Input/output error"):
            saver.finish()
    assert names(tmp_path) == []
    saver.save(full_name(2), snapshot(torch.ones(10)), {}, {})
    saver.finish()
    assert make_store(tmp_path).newest_whole(pytest.fail) is not None


def agreed_failure(folder: str) -> tuple[str, list[str]]:
    """Let rank 1 fail to write its shard; return each rank's error, and the remaining files."""
    from megaphase.distributed.all_ranks import process_group
    from megaphase.distributed.process_grid import start_process_grid

    with process_group():
        start_process_grid(1)
        control_group = ControlGroup()
        store = CheckpointStore(Path(folder), control_group)
        saver = Saver(store, control_group, keep=1, asynchronous=True, say=lambda text: None)
        saver.save(full_name(1), snapshot(torch.ones(10)), {}, {})
        saver.finish()
        if control_group.rank == 1:
            saver_module.write_tensors = missing_device  # type: ignore[assignment]
        saver.save(full_name(2), snapshot(torch.ones(10)), {}, {})
        try:
            saver.finish()
        except RunError as error:
            return str(error), names(Path(folder))
        return "nothing", []


def missing_device(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    raise OSError(19, "No such device")


@pytest.mark.distributed
def test_all_ranks_learn_of_the_one_that_could_not_write(tmp_path: Path) -> None:
    expected = (
        f"{tmp_path / full_name(2)}: rank 1 could not write: No such device; earlier checkpoints "
        f"are untouched: the same command resumes from {full_name(1)}"
    )
    for told, left in run_ranks(agreed_failure, PROCESSES, str(tmp_path), timeout=TIMEOUT_SECONDS):
        assert told == expected
        assert left == ["latest", full_name(1)]


tensors_by_name = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(
        st.sampled_from([torch.float32, torch.uint8]),
        st.lists(st.integers(0, 5), max_size=3),
    ),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(described=tensors_by_name)
def test_tensor_files_are_read_by_the_safetensors_package(
    described: dict[str, tuple[torch.dtype, list[int]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.getbasetemp() / "property.safetensors"
    tensors = {
        name: (torch.rand(shape) * 255).to(dtype) for name, (dtype, shape) in described.items()
    }
    written = write_tensors(path, tensors)
    assert written == describe_file(path)
    assert written["bytes"] == file_bytes(tensors)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_metrics_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.mkdir()
    with pytest.raises(RunError, match=rf"{path}: cannot be written \(Is a directory\)"):
        MetricsFile(path, KeptMetrics(0))


def test_metrics_of_a_full_disk_leave_no_part_of_a_row_behind_a_restart(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "metrics.jsonl"
    log = MetricsFile(path, KeptMetrics(0))
    log.write({"step": 1})
    kept = log.on_save()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kept["metrics_bytes"] + 5, hard))
    try:
        with pytest.raises(RunError, match=r"cannot be written \(File too large\)"):
            log.write({"step": 2, "text": "x" * 100})
        log.on_run_end(None)  # says nothing more
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log = MetricsFile(path, KeptMetrics(kept["metrics_bytes"]), resumed_step=1)
    log.write({"step": 2})
    log.on_run_end(None)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1}, {"step": 2},
    ]  # fmt: skip
