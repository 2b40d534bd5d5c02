"""Checkpoints in an object store: uploaded whole or not at all, kept, found and fetched."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
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
from megaphase.convert.commands import to_hf_command
from megaphase.generation.commands import generate_command
from megaphase.utils import remote_calls
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

    def __init__(
        self, folder: Path, url: str, *, keep: int = 2, plan: str = "plan", wait: float = 300.0
    ) -> None:
        self.folder, self.url, self.said = folder, url, list[str]()
        self.uploader = Uploader(
            folder, url, key="run.yaml: checkpoint.upload", plan=plan, keep=keep,
            wait_seconds=wait, say=self.said.append,
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


@pytest.mark.parametrize(
    "fault", ["hang", *(pytest.param(it, marks=pytest.mark.slow) for it in (503, "cut request"))]
)
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

    def altering(path: Path, url: str, advance: object) -> None:
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
    run.start().save(2)
    run.finish()
    other = Run(run.folder, run.url, plan="other")
    with pytest.raises(
        InputError, match=r"run\.yaml: checkpoint\.upload: memory://.* holds the check"
    ):
        other.uploader.claim()


def checkpoint_bytes(run: Run) -> dict[str, list[bytes]]:
    urls = {name: run.remote.folder(name) for name in run.uploaded()}
    return {name: [read_bytes(f"{url}/{file}") for file in FILES] for name, url in urls.items()}


def test_another_run_with_the_same_plan_is_refused_and_changes_nothing(
    run: Run, tmp_path: Path
) -> None:
    run.start().save(2)
    run.finish()
    before = checkpoint_bytes(run)
    other = Run(tmp_path / "other" / "checkpoints", run.url)
    other.save(2, model="another")
    other.save(4, model="another")
    with pytest.raises(InputError, match=r"another run; give each run a URL .*; to continue that"):
        other.uploader.claim()
    other.uploader.start()  # as where the store could not be reached at the start
    assert "holds the checkpoints of another run" in other.finish()[-1]
    assert checkpoint_bytes(run) == before


def test_a_run_whose_checkpoints_were_put_back_has_its_folder(run: Run, tmp_path: Path) -> None:
    run.start().save(2)
    run.save(4)
    run.finish()
    again = Run(tmp_path / "again" / "checkpoints", run.url)
    shutil.copytree(run.folder, again.folder)
    again.start().save(6)
    assert again.finish()[-1] == f"uploaded: {run.url}/checkpoints/{full_name(6)}"
    run.save(6)  # the process on the machine that was taken for lost
    assert "holds the checkpoints of another run" in run.finish()[-1]
    assert checkpoint_bytes(run)[full_name(6)] == [
        (again.folder / full_name(6) / file).read_bytes() for file in FILES
    ]


def test_the_claim_of_an_earlier_version_is_of_the_run_that_has_its_checkpoints(
    run: Run, tmp_path: Path
) -> None:
    run.start().save(2)
    run.finish()
    claim = f"{run.url}/upload.json"
    write_bytes(claim, b'{"plan": "plan"}')
    other = Run(tmp_path / "other" / "checkpoints", run.url)
    for step in (None, 2):
        if step is not None:
            other.save(step, model="another")
        with pytest.raises(InputError, match="holds the checkpoints of another run"):
            other.uploader.claim()
    (run.folder.parent / "upload.json").unlink()
    Run(run.folder, run.url).uploader.claim()
    assert json.loads(read_bytes(claim)) == {
        "plan": "plan", **json.loads((run.folder.parent / "upload.json").read_bytes())
    }  # fmt: skip


@pytest.mark.parametrize("plan", ["plan", "other"])
def test_a_claim_without_checkpoints_is_taken_over(run: Run, tmp_path: Path, plan: str) -> None:
    """As that of a start which then failed."""
    run.start()
    other = Run(tmp_path / "other" / "checkpoints", run.url, plan=plan).start()
    other.save(2)
    other.finish()
    run.save(4)
    assert "holds the checkpoints of another run" in run.finish()[-1]
    assert run.uploaded() == [full_name(2)]


def test_the_end_of_a_run_does_not_wait_for_a_silent_store(
    s3: Run, server: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(s3.folder, s3.url, wait=0.2).start()
    server.fail("hang", method="PUT", part=SHARD)
    monkeypatch.setattr(remote_calls.RETRIES, "stalled_seconds", 600.0)
    run.save(2)
    said = run.finish()
    server.released.set()
    assert said[-1] == (
        f"not uploaded to {run.url}: {full_name(2)} (no byte has moved for 0.2 s); the same "
        "command uploads them"
    )
    server.fail(None)
    server.released.clear()


def test_the_end_of_a_run_waits_for_a_store_that_is_slow(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    begun = threading.Event()

    def slow(path: Path, url: str, advance: Callable[[int], object]) -> None:
        if not url.startswith(run.url):  # of the thread of an earlier test
            return
        begun.wait(60)
        for _ in range(10):
            now[0] += 200.0
            assert run.uploader.is_busy
            advance(1)
        write_bytes(url, path.read_bytes())

    monkeypatch.setattr(upload, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(upload, "upload", slow)
    run.start().save(2)
    run.uploader.hurry()
    begun.set()
    wait_until(lambda: not run.uploader.is_busy)
    run.uploader.close()
    assert run.said[-1] == f"uploaded: {run.url}/checkpoints/{full_name(2)}"
    assert run.uploaded() == [full_name(2)]


def test_a_wrong_store_is_refused_and_a_store_that_is_down_is_not(
    s3: Run, server: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Run(s3.folder, "s3://no-such-bucket/run")
    named = (
        r"^run\.yaml: checkpoint\.upload: .*no such .* bucket; make the bucket s3://no-such-bucket,"
    )
    with pytest.raises(InputError, match=named):
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


def test_a_fetch_resumes_and_finds_what_is_damaged(
    s3: Run, server: FaultyProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    fetched = fill(s3)
    server.fail(503, method="GET", part="state.json")
    with pytest.raises(RunError, match=r"state\.json: cannot be read"):
        fetched(full_name(8))
    said = capsys.readouterr().err
    assert said.count("; trying again, 3 times in all") == 1
    assert f"\n{s3.url}/checkpoints/{full_name(8)}/state.json: cannot be read (" in said
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


def cut_off(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [cut_off, Path.unlink])
def test_a_cached_checkpoint_that_lacks_bytes_is_fetched_again(
    run: Run, fetched: Callable[[str], Path], harm: Callable[[Path], None]
) -> None:
    folder = fetched("joint")
    harm(folder / SHARD)
    assert fetched("joint") == folder
    assert equal(folder, run.remote.folder(full_name(6)))


def test_a_cached_checkpoint_that_was_altered_is_named_with_what_to_do(
    run: Run, fetched: Callable[[str], Path]
) -> None:
    folder = fetched("joint")
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputError) as refused:
        make_store(folder.parent).open(fetched("joint"))
    remedy = f"remove {folder}: it is then fetched again"
    assert str(refused.value) == f"{folder / SHARD}: has been altered; {remedy}"
    shutil.rmtree(folder)
    assert equal(fetched("joint"), run.remote.folder(full_name(6)))
    own = run.folder / full_name(8)
    cut_off(own / SHARD)
    with pytest.raises(InputError, match=r"; use another checkpoint$"):
        make_store(run.folder).open(own)


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


def test_a_checkpoint_whose_tokenizer_is_not_known_is_not_fetched(
    run: Run, fetched: Callable[[str], Path], tmp_path: Path
) -> None:
    url = f"{run.url}@latest"
    message = f"^{url}: lies in a store, .*; give --tokenizer$"
    with pytest.raises(InputError, match=message):
        generate_command(url, prompt=["a"])
    with pytest.raises(InputError, match=message):
        to_hf_command(url, tmp_path / "hf")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("url", ["s3://@latest", "s3:///runs@latest", "s3://"])
def test_a_url_without_a_bucket_is_named(url: str) -> None:
    with pytest.raises(InputError, match=f"^{url}: names no bucket; give s3://BUCKET/RUN@NAME"):
        find_checkpoint(url)
