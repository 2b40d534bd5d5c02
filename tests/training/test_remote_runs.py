"""Runs that upload their checkpoints while they train, and runs that start from those."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from remote_support import BUCKET, FaultyProxy, s3_server
from run_support import STEPS, make_corpora, read_rows, run_settings, timeless, write_run_file
from warm_commands import run, run_well

from megaphase.checkpoint.names import find_checkpoint
from megaphase.checkpoint.remote import RemoteRun
from megaphase.checkpoint.state import full_name
from megaphase.plan.load_plan import open_run, preview_plan
from megaphase.plan.same_run import settings_of as settings_of_run
from megaphase.utils import remote_calls
from megaphase.utils.remote_files import list_folder, read_bytes, write_bytes

VARIABLES = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
URL = f"s3://{BUCKET}/runs/first"


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyProxy]:
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as proxy:
        yield proxy


def reach(variables: dict[str, str]) -> None:
    """In the process of a command: find the server, and try failing calls again at once."""
    os.environ |= variables
    remote_calls.RETRIES = remote_calls.Retries(2, pause_seconds=0.01, of_requests=0)


@pytest.fixture(scope="module")
def prepare(server: FaultyProxy, tmp_path_factory: pytest.TempPathFactory) -> partial[None]:
    cache = tmp_path_factory.mktemp("cache")
    os.environ["MEGAPHASE_CACHE"] = str(cache)
    variables = {name: os.environ[name] for name in VARIABLES}
    return partial(reach, variables | {"MEGAPHASE_CACHE": str(cache)})


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def plain_rows(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of a run that uploads nothing."""
    folder = tmp_path_factory.mktemp("plain")
    run_well("train", write_run_file(folder, settings_of(corpora)))
    return timeless(read_rows(folder / "run"))


def settings_of(corpora: Path, **checkpoint: object) -> dict[str, object]:
    checkpoint = {"every_steps": 4, "keep": 1, **checkpoint}
    return run_settings(corpora, checkpoint=checkpoint)


def whole(url: str) -> list[str]:
    return [name for name in RemoteRun(url).names() if RemoteRun(url).is_whole(name)]


@pytest.mark.slow
def test_a_store_that_fails_changes_no_number_and_the_next_start_uploads(
    corpora: Path,
    tmp_path: Path,
    server: FaultyProxy,
    prepare: partial[None],
    plain_rows: list[dict[str, Any]],
) -> None:
    uploading = write_run_file(tmp_path / "up", settings_of(corpora, upload=URL))
    server.fail(503, method="PUT", part="shard-")
    said = run_well("train", uploading, prepare=prepare)
    assert timeless(read_rows(tmp_path / "up" / "run")) == plain_rows
    assert "is not uploaded yet: s3://" in said
    assert f"not uploaded to {URL}: " in said
    assert said.index("before the end: ") < said.index("Done: ")  # the results come last
    assert whole(URL) == []

    server.fail(None)
    said = run_well("train", uploading, prepare=prepare)
    assert "all 21 steps are done; nothing to do" in said
    assert "not uploaded" not in said
    here = [path.name for path in (tmp_path / "up/run/checkpoints").iterdir()]
    assert set(whole(URL)) == {name for name in here if name.startswith("step-")}
    assert {full_name(STEPS[0]), full_name(sum(STEPS))} <= set(whole(URL))

    other = settings_of(corpora, upload=URL) | {"seed": 12}
    result = run("train", write_run_file(tmp_path / "other", other), prepare=prepare)
    assert result.returncode == 2
    assert f"{URL} holds the checkpoints of another run; give each run" in result.stderr
    assert not (tmp_path / "other" / "run").exists()


def test_a_run_that_is_killed_while_it_uploads_resumes(
    corpora: Path,
    tmp_path: Path,
    server: FaultyProxy,
    prepare: partial[None],
    plain_rows: list[dict[str, Any]],
) -> None:
    """SIGKILL in the middle of the upload of a file: what is whole in the store can be fetched, the
    rest counts for nothing, and the resumed run uploads it, with the rows of an unbroken run."""
    url = f"{URL}-killed"
    file = write_run_file(tmp_path / "up", settings_of(corpora, upload=url))
    process = tmp_path / "process"
    begun: list[str] = []

    def kill(method: str, path: str) -> str | None:
        folder, _, name = path.rpartition("/")
        if method == "PUT" and name.startswith("shard-"):
            begun.append(folder.rpartition("/")[2])
        if method == "PUT" and len(set(begun)) == 2:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process.read_text()), signal.SIGKILL)
            return "cut request"
        return None

    server.fault = kill
    result = run("train", file, prepare=partial(note_process, prepare, process))
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert whole(url) == begun[:1]
    assert find_checkpoint(f"{url}@latest").name == begun[0]  # its files are as in the manifest
    server.fail(None)
    run_well("train", file, prepare=prepare)
    assert timeless(read_rows(tmp_path / "up" / "run")) == plain_rows
    for folder in (tmp_path / "up/run/checkpoints").glob("step-*"):
        remote = RemoteRun(url).folder(folder.name)
        assert sorted(list_folder(remote)) == sorted(path.name for path in folder.iterdir())
        for path in folder.iterdir():
            assert read_bytes(f"{remote}/{path.name}") == path.read_bytes()


def note_process(prepare: partial[None], file: Path) -> None:
    prepare()
    file.write_text(str(os.getpid()))


@pytest.mark.slow
def test_a_branch_from_the_store_equals_one_from_the_run(
    corpora: Path, tmp_path: Path, server: FaultyProxy, prepare: partial[None]
) -> None:
    settings = settings_of(corpora, upload=f"{URL}-base")
    base = settings | {"phases": settings["phases"][:1]}  # type: ignore[index]
    said = run_well("train", write_run_file(tmp_path / "base", base), prepare=prepare)
    assert f"uploaded: {URL}-base/checkpoints/{full_name(STEPS[0])}" in said

    settings = settings_of(corpora)
    joint = settings | {"phases": settings["phases"][1:]}  # type: ignore[index]
    local, remote = (write_run_file(tmp_path / name, joint) for name in ("local", "remote"))
    run_well("train", local, "--from", f"{tmp_path}/base/run@pretrain")
    source = f"{URL}-base@pretrain"
    run_well("train", remote, "--from", source, prepare=prepare)
    own = ("branch",)  # names the checkpoint
    rows = [
        [row for row in timeless(read_rows(path.parent / "run")) if row.get("event") not in own]
        for path in (local, remote)
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) > STEPS[1]
    origin = json.loads((tmp_path / "remote/run/origin.json").read_text())
    assert origin["source"] == source

    told = run("train", remote, "--from", f"{URL}-base@nothing", prepare=prepare)
    assert told.returncode == 2
    assert told.stderr.count("\n") == 1


def test_other_corpora_are_refused_as_that_and_claim_nothing(
    corpora: Path, tmp_path: Path, server: FaultyProxy, prepare: partial[None]
) -> None:
    server.fail(None)
    url = f"s3://{BUCKET}/runs/corpora"
    run_file = write_run_file(tmp_path, settings_of(corpora, upload=url))
    config, tokenizer = open_run(run_file, None)
    plan = preview_plan(config, tokenizer)
    # As a run leaves them that has uploaded a checkpoint.
    run_dir = tmp_path / "run"
    (run_dir / "plan.json").write_text(json.dumps(plan.summary()))
    (run_dir / "run.json").write_text(json.dumps(settings_of_run(config)))
    (run_dir / "upload.json").write_text(json.dumps({"run": "own"}))
    claim = json.dumps({"plan": plan.spec.fingerprint, "run": "own"}).encode()
    write_bytes(f"{url}/upload.json", claim)
    write_bytes(f"{url}/checkpoints/{full_name(4)}/manifest.json", b"{}")
    before = sorted(run_dir.rglob("*"))
    refused = run(
        "train", run_file, f"tasks.cimri.corpus={corpora / 'data' / 'alda'}", prepare=prepare
    )
    assert refused.returncode == 2
    [line] = refused.stderr.splitlines()
    assert "tasks: the corpora are not those with which the run in" in line
    assert sorted(run_dir.rglob("*")) == before
    assert read_bytes(f"{url}/upload.json") == claim


def test_a_signal_does_not_wait_for_uploads(
    corpora: Path, tmp_path: Path, server: FaultyProxy, prepare: partial[None]
) -> None:
    url = f"{URL}-stopped"
    file = write_run_file(tmp_path / "run", settings_of(corpora, upload=url))
    server.fail("hang", method="PUT", part="shard-")
    stopping = partial(stop_after, prepare, 6)
    result = run("train", file, prepare=stopping)
    assert result.returncode == 75, result.stderr
    assert f"not uploaded to {url}: " in result.stdout
    assert full_name(6) in result.stdout
    server.released.set()
    server.fail(None)


def stop_after(prepare: partial[None], steps: int) -> None:
    """Send this process SIGTERM as it ends a step."""
    from megaphase.training.trainer import Trainer

    prepare()
    train_step = Trainer.train_step

    def step(self: Trainer, *arguments: object) -> None:
        train_step(self, *arguments)  # type: ignore[arg-type]
        if self.state.step == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    Trainer.train_step = step  # type: ignore[assignment,method-assign]
