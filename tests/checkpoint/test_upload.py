"""Checkpoints in an object store: uploaded whole or not at all, kept, found and fetched."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from data_support import wait_until
from remote_support import BUCKET, FaultyProxy, s3_server
from store_support import Alone, make_store, names, snapshot

from megaphase.checkpoint import fetch, upload
from megaphase.checkpoint.names import find_checkpoint
from megaphase.checkpoint.remote import RemoteRun
from megaphase.checkpoint.saver import Saver
from megaphase.checkpoint.state import best_name, full_name
from megaphase.checkpoint.upload import Uploader
from megaphase.utils.errors import InputError, RunError
from megaphase.utils.remote_files import list_folder, read_bytes, write_bytes

SHARD = "shard-00000.safetensors"
FILES = ["manifest.json", "parameters.json", SHARD, "state.json"]


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyProxy]:
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as proxy:
        yield proxy


class Run:
    """A run's checkpoint folder, saver and uploader, with what they said."""

    def __init__(self, folder: Path, url: str, *, keep: int = 2, plan: str = "plan") -> None:
        self.folder, self.url, self.said = folder, url, list[str]()
        self.uploader = Uploader(
            folder, url, key="run.yaml: checkpoint.upload", plan=plan, keep=keep,
            say=self.said.append,
        )  # fmt: skip
        self.saver = Saver(
            make_store(folder), Alone(), keep=keep, asynchronous=False,
            say=lambda text: None, uploader=self.uploader,
        )  # type: ignore[arg-type]  # fmt: skip
        self.remote = RemoteRun(url)

    def start(self) -> Run:
        self.uploader.claim()
        self.uploader.start()
        return self

    def save(self, step: int, best: dict[str, str] | None = None, **state: Any) -> None:
        state = {"step": step, "permanent": False, "best": best or {}} | state
        weights = torch.full((1000,), float(step))
        name = best_name(step) if state.pop("is_best", False) else full_name(step)
        self.saver.save(name, snapshot(weights), state, best or {})

    def finish(self) -> list[str]:
        """Wait until everything is uploaded or has failed, and return what was said."""
        self.uploader.hurry()
        wait_until(lambda: not self.uploader.is_busy)
        self.uploader.close()
        return self.said

    def uploaded(self) -> list[str]:
        return [n for n in (*self.remote.names(), *self.remote.names("best"))
                if self.remote.is_whole(n)]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose store is in memory: it never fails."""
    monkeypatch.setattr(upload, "PAUSE_SECONDS", 0.05)
    monkeypatch.setenv("MEGAPHASE_CACHE", str(tmp_path / "cache"))
    return Run(tmp_path / "checkpoints", f"memory://{tmp_path.name}")


@pytest.fixture
def s3(server: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """A run whose store is S3, behind a proxy that does not fail yet."""
    server.fail(None)
    server.requests.clear()
    monkeypatch.setattr(upload, "PAUSE_SECONDS", 0.05)
    monkeypatch.setenv("MEGAPHASE_CACHE", str(tmp_path / "cache"))
    yield Run(tmp_path / "checkpoints", f"s3://{BUCKET}/{tmp_path.name}")
    server.fail(None)


def equal(local: Path, url: str) -> bool:
    return sorted(list_folder(url)) == names(local) == FILES and all(
        read_bytes(f"{url}/{name}") == (local / name).read_bytes() for name in FILES
    )


def test_whole_checkpoints_are_uploaded_and_the_manifest_comes_last(
    s3: Run, server: FaultyProxy
) -> None:
    s3.start().save(4)
    assert s3.finish()[-1] == f"uploaded: {s3.url}/checkpoints/{full_name(4)}"
    assert equal(s3.folder / full_name(4), s3.remote.folder(full_name(4)))
    puts = [each.rpartition("/")[2] for each in server.requests if each.startswith("PUT")]
    assert puts[0] == "upload.json"
    assert puts[-1] == "manifest.json"
    assert sorted(puts[1:]) == FILES


def test_the_store_keeps_what_the_run_keeps(run: Run) -> None:
    run.start()
    for step, facts in {
        2: {}, 4: {"permanent": True, "phase_name": "pretrain"}, 6: {}, 8: {}, 10: {}
    }.items():  # fmt: skip
        run.save(step, **facts)
        wait_until(lambda step=step: full_name(step) in run.uploaded())
    run.finish()
    assert run.uploaded() == [full_name(step) for step in (4, 8, 10)]
    assert [n for n in names(run.folder) if n.startswith("step")] == run.uploaded()


def test_best_weights_are_uploaded_and_removed_with_the_last_checkpoint_that_names_them(
    run: Run,
) -> None:
    run.start()
    best = {"best-mean": best_name(3)}
    run.save(3, best, is_best=True)
    run.save(4, best)
    run.finish()
    assert run.uploaded() == [full_name(4), best_name(3)]
    assert run.remote.find("best-mean") == best_name(3)
    for step in (6, 8):
        run.save(step, {"best-mean": full_name(6)})
        wait_until(lambda step=step: full_name(step) in run.uploaded())
    run.finish()
    assert run.uploaded() == [full_name(6), full_name(8)]


def test_a_checkpoint_is_not_removed_while_it_is_uploaded(s3: Run, server: FaultyProxy) -> None:
    held, begun = threading.Event(), threading.Event()

    def fault(method: str, path: str) -> None:
        if method == "PUT" and full_name(2) in path:
            begun.set()
            held.wait(60)

    server.fault = fault
    s3.start().save(2)
    assert begun.wait(60)
    for step in (4, 6, 8):
        s3.save(step)
    assert [n for n in names(s3.folder) if n.startswith("step")] == [
        full_name(step) for step in (2, 6, 8)
    ]
    held.set()
    said = s3.finish()
    assert f"{full_name(4)} is not uploaded: checkpoint.keep removed it before its turn" in said
    assert s3.uploaded() == [full_name(step) for step in (2, 6, 8)]  # as on this machine


@pytest.mark.parametrize("fault", [503, "hang", "cut request"])
def test_saving_never_waits_for_a_store_that_fails(
    s3: Run, server: FaultyProxy, fault: int | str
) -> None:
    """Saves return while every upload fails; the next start of the run uploads what is left."""
    s3.start()
    server.fail(fault, method="PUT", part=SHARD)
    for step in (2, 4):
        s3.save(step)
    said = s3.finish()
    assert s3.uploaded() == []
    assert said[-1].startswith(
        f"not uploaded to {s3.url}: {full_name(2)}, {full_name(4)} (s3://{BUCKET}/"
    )
    assert said[-1].endswith("; the same command uploads them")
    server.fail(None)
    server.released.set()
    again = Run(s3.folder, s3.url).start()
    again.finish()
    server.released.clear()
    assert again.uploaded() == [full_name(2), full_name(4)]
    assert equal(s3.folder / full_name(2), s3.remote.folder(full_name(2)))


def test_a_failure_is_said_once_and_tried_again(s3: Run, server: FaultyProxy) -> None:
    server.fail(403, times=4, method="PUT", part=SHARD)
    s3.start().save(2)
    wait_until(lambda: s3.said and s3.said[-1].startswith("uploaded: "))
    failures = [text for text in s3.said if "is not uploaded yet" in text]
    assert len(failures) == 1
    assert failures[0].startswith(f"{full_name(2)} is not uploaded yet: s3://{BUCKET}/")


def test_a_partial_upload_is_not_taken_for_a_whole_one(s3: Run, server: FaultyProxy) -> None:
    s3.start()
    server.fail(503, method="PUT", part="state.json")
    s3.save(2)
    s3.finish()
    folder = s3.remote.folder(full_name(2))
    assert sorted(list_folder(folder)) == ["parameters.json", SHARD]
    with pytest.raises(InputError, match="there is no whole checkpoint; check the URL"):
        find_checkpoint(f"{s3.url}@latest")
    with pytest.raises(InputError, match="there is no whole checkpoint"):
        find_checkpoint(f"{s3.url}@{full_name(2)}")
    server.fail(None)
    server.requests.clear()
    Run(s3.folder, s3.url).start().finish()
    assert equal(s3.folder / full_name(2), folder)
    assert server.count("PUT", SHARD) == 0  # it was there, whole


def test_what_arrives_altered_is_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []

    def altering(path: Path, url: str) -> None:
        sent.append(path.name)
        data = bytearray(path.read_bytes())
        data[0] ^= path.name == SHARD and len(sent) < limit
        write_bytes(url, bytes(data))

    monkeypatch.setattr(upload, "upload", altering)
    limit = 3  # alters the first time that the shard is sent, after the parameters
    run.start().save(2)
    run.finish()
    assert run.uploaded() == [full_name(2)]
    assert sent.count(SHARD) == 2
    limit = 10**9
    run.save(4)
    said = run.finish()[-1]
    assert f"{SHARD}: has another content after it was uploaded 2 times); the same command" in said
    assert run.uploaded() == [full_name(2)]


def test_a_damaged_checkpoint_is_never_whole_in_the_store(run: Run) -> None:
    run.save(2)
    path = run.folder / full_name(2) / SHARD
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    said = run.start().finish()
    assert f"({path}: has been altered)" in said[-1]
    assert run.uploaded() == []


def test_another_checkpoint_of_this_name_is_replaced(run: Run) -> None:
    run.start().save(2)
    run.finish()
    again = Run(run.folder.with_name("again"), run.url)
    again.save(2, other=1)
    again.start().finish()
    assert equal(again.folder / full_name(2), again.remote.folder(full_name(2)))


def test_a_folder_of_another_run_is_refused(run: Run) -> None:
    run.start()
    other = Run(run.folder, run.url, plan="other")
    with pytest.raises(
        InputError, match=r"run\.yaml: checkpoint\.upload: memory://.* holds the check"
    ):
        other.uploader.claim()


def test_a_wrong_store_is_refused_and_a_store_that_is_down_is_not(
    s3: Run, server: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Run(s3.folder, "s3://no-such-bucket/run")
    with pytest.raises(InputError, match="no such file, folder or bucket"):
        wrong.uploader.claim()
    server.fail(503)
    s3.uploader.claim()
    assert "uploads are tried again while the run trains" in s3.said[-1]
    monkeypatch.setattr(upload, "CLAIM_SECONDS", 0.1)
    server.fail("hang")
    s3.uploader.claim()
    assert s3.said[-1] == f"{s3.url}: no answer yet; checkpoints are uploaded when it answers"
    server.fail(None)
    server.released.set()
    s3.uploader.start()
    s3.save(2)
    s3.finish()
    server.released.clear()
    assert s3.uploaded() == [full_name(2)]


def fill(run: Run) -> Callable[[str], Path]:
    """Upload checkpoints, and return what fetches one by its name."""
    run.start()
    run.save(4, permanent=True, phase_name="pretrain")
    run.save(6, {"best-mean": full_name(4)}, permanent=True, phase_name="joint")
    run.save(8, {"best-mean": full_name(4)}, phase_name="next")
    run.finish()
    return lambda name: find_checkpoint(f"{run.url}@{name}")


@pytest.fixture
def fetched(run: Run) -> Callable[[str], Path]:
    return fill(run)


def test_a_checkpoint_is_fetched_by_every_name(
    run: Run, fetched: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_name = {"pretrain": 4, "joint": 6, "latest": 8, "best-mean": 4, full_name(6): 6}
    for name, step in by_name.items():
        assert equal(fetched(name), run.remote.folder(full_name(step)))
    folder = find_checkpoint(run.remote.folder(full_name(6)))
    assert folder == fetched("joint")
    assert names(folder.parent) == [full_name(step) for step in (4, 6, 8)]
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "_fetch", None)  # it lies in the cache
        assert fetched(full_name(6)) == folder
    with pytest.raises(InputError, match=r"@jiont: there is no such checkpoint; .*'?joint"):
        fetched("jiont")
    with pytest.raises(InputError, match="this is not a checkpoint; give URL@NAME"):
        find_checkpoint(run.url)


def test_a_fetch_resumes_and_finds_what_is_damaged(s3: Run, server: FaultyProxy) -> None:
    fetched = fill(s3)
    server.fail(503, method="GET", part="state.json")
    with pytest.raises(RunError, match=r"state\.json: cannot be read"):
        fetched(full_name(8))
    server.fail(None)
    server.requests.clear()
    folder = fetched(full_name(8))
    assert server.count("GET", SHARD) == 0
    assert equal(folder, s3.remote.folder(full_name(8)))
    shard = f"{s3.remote.folder(full_name(6))}/{SHARD}"
    whole = read_bytes(shard)
    write_bytes(shard, bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(RunError, match=rf"{SHARD}: is not what its manifest describes; use anoth"):
        fetched("joint")
    write_bytes(shard, whole)
    assert equal(fetched("joint"), s3.remote.folder(full_name(6)))


def test_a_changed_checkpoint_is_fetched_again(
    run: Run, fetched: Callable[[str], Path], tmp_path: Path
) -> None:
    before = fetched("joint")
    again = Run(tmp_path / "again", run.url)
    again.save(6, permanent=True, phase_name="joint", other=1)
    again.start().finish()
    assert fetched("joint") == before
    assert equal(before, run.remote.folder(full_name(6)))


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", ".x", ""])
def test_a_manifest_leads_to_no_other_folder(
    run: Run, fetched: Callable[[str], Path], name: str
) -> None:
    url = f"{run.remote.folder(full_name(8))}/manifest.json"
    manifest = json.loads(read_bytes(url))
    manifest["files"][name] = {"bytes": 1, "hash": ""}
    write_bytes(url, json.dumps(manifest).encode())
    with pytest.raises(InputError, match=r"manifest\.json: is damaged"):
        fetched(full_name(8))


def test_a_full_disk_is_named(
    run: Run, fetched: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(RunError, match=r"needs .* GB, the disk has .*; MEGAPHASE_CACHE names an"):
        fetched("latest")
