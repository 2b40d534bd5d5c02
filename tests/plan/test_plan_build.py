"""Building the index: by one process at a time, and atomically, whatever happens."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_support import LIMIT_SECONDS, wait_until
from plan_support import (
    PLAN_PHASES,
    TOKENIZER_HASH,
    Documents,
    contents,
    phase,
    random_lengths,
    spec_of,
    write_corpus,
    write_run,
    write_three_tasks,
)
from rich.console import Console

from megaphase.config.run import RunConfig
from megaphase.plan import build as build_module
from megaphase.plan.build import build_index, ensure_built, plan_folder
from megaphase.plan.built_folder import INDEX_FILE
from megaphase.plan.plan import Plan
from megaphase.plan.progress import building_progress
from megaphase.utils.errors import InputError, RunError
from megaphase.utils.files import hash_json


@pytest.fixture
def run(tmp_path) -> tuple[RunConfig, dict[str, Documents]]:
    return write_three_tasks(tmp_path)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _edit(key: str, value: object):
    def edit(path: Path) -> None:
        header = json.loads(path.read_text())
        header[key] = value
        path.write_text(json.dumps(header))

    return edit


def _foreign(path: Path) -> None:
    header = json.loads(path.read_text())
    del header["hash"]
    header["fingerprint"] = "0" * 32
    path.write_text(json.dumps(header | {"hash": hash_json(header)}))


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        ("blend-0.tasks", _truncate, "blend-0.tasks has 95 bytes, not 96"),
        ("blend-1.counts", _alter, "blend-1.counts has been altered"),
        ("starts", _alter, "starts has been altered"),
        ("starts", Path.unlink, "starts is missing"),
        ("index.json", Path.unlink, "index.json is missing"),
        ("index.json", lambda path: os.truncate(path, 100), "index.json has been altered"),
        ("index.json", _edit("phases", []), "index.json has been altered"),
        ("index.json", _edit("files", {}), "index.json has been altered"),
        ("index.json", _foreign, "index.json belongs to another plan"),
        ("index.json", lambda path: path.write_text("[]"), "index.json has been altered"),
        ("index.json", lambda path: path.write_bytes(b"\xff"), "index.json has been altered"),
    ],
)
def test_a_damaged_index_is_named_and_built_again(run, name, harm, said):
    config, _ = run
    spec = spec_of(config)
    folder = ensure_built(spec, config.output)
    whole = contents(folder)
    harm(folder / name)
    lines: list[str] = []
    assert ensure_built(spec, config.output, say=lines.append) == folder
    assert lines == [f"{folder}: {said}; building the plan again"]
    assert contents(folder) == whole
    assert ensure_built(spec, config.output, say=pytest.fail) == folder


WHOLE = "blend of one, two and sample index"

# Without plan_support, which imports torch: that takes seconds in every process.
BUILD = """
import time
from pathlib import Path
from types import SimpleNamespace
from megaphase.config.load import load_run_file
from megaphase.plan.build import ensure_built
from megaphase.plan.spec import plan_spec

last = None
def progress(what, done, of):
    global last
    if what == {stop_at!r} and what != last:
        print("at", what, flush=True)
        while not Path({release!r}).exists():
            time.sleep(0.02)
    last = what

config = load_run_file(Path({run_file!r}))
say = lambda text: print(text, flush=True)
tokenizer = SimpleNamespace(fingerprint={tokenizer!r}, adds_bos=False, vocab_size=1 << 16)
ensure_built(plan_spec(config, tokenizer), config.output, say=say, progress=progress)
print("done", flush=True)
"""


def in_another_process(config: RunConfig, stop_at: str = "") -> subprocess.Popen:
    """Build the plan there; with `stop_at`, print that point and wait there until `release`."""
    script = BUILD.format(
        tokenizer=TOKENIZER_HASH,
        stop_at=stop_at,
        release=str(release_file(config)),
        run_file=str(config.path),
    )
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def release_file(config: RunConfig) -> Path:
    return config.path.with_name("release")


def first_line(process: subprocess.Popen) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip()


def output_of(process: subprocess.Popen) -> list[str]:
    out, error = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, error
    return out.splitlines()


@pytest.mark.parametrize(
    ("order", "stop_at"),
    [("balanced", WHOLE), ("random", "blend of one, two"), ("random", "sample index")],
)
def test_a_build_that_is_killed_leaves_nothing_that_counts(run, tmp_path, order, stop_at):
    _, written = run
    phases = [PLAN_PHASES[0], PLAN_PHASES[1] | {"order": order}]
    config = write_run(tmp_path, list(written), phases=phases)
    spec = spec_of(config)
    with in_another_process(config, stop_at) as process:
        assert first_line(process) == f"at {stop_at}"
        process.send_signal(signal.SIGKILL)
    assert not plan_folder(config.output, spec).exists()
    folder = ensure_built(spec, config.output, say=pytest.fail)
    elsewhere = ensure_built(spec, config.output.with_name("elsewhere"))
    assert contents(folder) == contents(elsewhere)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_of_several_processes_one_builds_and_the_others_wait(run):
    config, _ = run
    builder = in_another_process(config, WHOLE)
    assert first_line(builder) == f"at {WHOLE}"
    waiters = [in_another_process(config, WHOLE) for _ in range(3)]
    folder = plan_folder(config.output, spec_of(config))
    for waiter in waiters:
        told = f"{folder}: another process is building this plan; waiting for it"
        assert first_line(waiter) == told
    assert not folder.exists()
    release_file(config).touch()
    for process in (builder, *waiters):
        assert output_of(process) == ["done"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert ensure_built(spec_of(config), config.output, say=pytest.fail) == folder


@pytest.mark.parametrize("damaged", [False, True])
def test_without_locks_what_another_process_has_published_is_used(run, damaged):
    config, _ = run
    spec = spec_of(config)
    other = ensure_built(spec, config.output.with_name("elsewhere"))
    folder = plan_folder(config.output, spec)

    def publish(what: str, done: int, of: int) -> None:
        if what == WHOLE and not folder.exists():
            shutil.copytree(other, folder)
            if damaged:
                _truncate(folder / "starts")

    if damaged:
        with pytest.raises(RunError, match=r"could not be written \(Directory not empty\)"):
            ensure_built(spec, config.output, progress=publish)
        return
    assert ensure_built(spec, config.output, say=pytest.fail, progress=publish) == folder
    assert contents(folder) == contents(other)
    wait_until(lambda: [path.name for path in folder.parent.iterdir()] == [folder.name])


def test_a_process_that_waits_goes_on_when_the_builder_is_killed(run):
    config, _ = run
    with in_another_process(config, WHOLE) as builder:
        assert first_line(builder) == f"at {WHOLE}"
        waiter = in_another_process(config)
        assert "waiting for it" in first_line(waiter)
        builder.kill()
    assert output_of(waiter) == ["done"]
    folder = ensure_built(spec_of(config), config.output, say=pytest.fail)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_what_a_live_process_on_this_machine_writes_is_not_removed(run):
    from megaphase.utils.files import remove_abandoned, temporary_path

    config, _ = run
    final = config.output / "plan" / "name"
    own, dead, elsewhere, old = (
        temporary_path(final),
        temporary_path(final).with_name(
            temporary_path(final).name.replace(str(os.getpid()), "4194999")
        ),
        final.with_name(".name.another-node-17.partial"),
        final.with_name(".name.another-node-18.partial"),
    )
    for each in (own, dead, elsewhere, old):
        each.mkdir(parents=True)
        (each / "file").write_text("")
    for path in (old / "file", old):
        os.utime(path, (time.time() - 3600,) * 2)
    remove_abandoned(final)
    assert sorted(final.parent.iterdir()) == sorted([own, elsewhere])


def test_a_build_that_fails_leaves_nothing(run):
    config, _ = run
    spec = spec_of(config)

    def fail(what: str, done: int, of: int) -> None:
        if what == WHOLE:
            raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"could not be written \(No space left on device\)"):
        ensure_built(spec, config.output, progress=fail)
    wait_until(lambda: not config.output.exists())


@pytest.mark.parametrize("cut", ["tokens", "documents"])
def test_an_impossible_mixture_leaves_nothing(tmp_path, cut):
    write_corpus(tmp_path / "en", random_lengths(40, 30, 1))
    demand = phase("two", 10_000, {"proportional": True, "max_epochs": 2})
    possible = phase("one", 3, {"rates": {"en": 1}}) | {"cut": cut}
    config = write_run(tmp_path, ["en"], phases=[possible, demand])
    with pytest.raises(InputError, match="max_epochs 2 leaves only"):
        ensure_built(spec_of(config), config.output)
    wait_until(lambda: not config.output.exists())


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(run, monkeypatch):
    config, _ = run
    usage = type("usage", (), {"free": 100})
    monkeypatch.setattr("megaphase.plan.build.shutil.disk_usage", lambda path: usage)
    with pytest.raises(RunError, match=r"needs 0\.001 MB for 80 samples, the disk has 0\.000 MB"):
        ensure_built(spec_of(config), config.output)
    assert not config.output.exists()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list to which the space that a plan asks for is appended."""
    found: list[int] = []
    real = build_module._require_space
    monkeypatch.setattr(
        build_module, "_require_space", lambda *a: (found.append(a[-1]), real(*a))[1]
    )
    return found


def sizes_in(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("cuts", [["documents"], ["tokens", "documents"], ["tokens", "tokens"]])
def test_the_space_that_an_index_needs_is_that_of_its_files(tmp_path, monkeypatch, asked, cuts):
    # Samples that begin where documents begin have no starts; those of a whole epoch are stored.
    write_corpus(tmp_path / "en", random_lengths(400, 30, 1))
    phases = [
        phase(f"{number}-{cut}", 3, {"rates": {"en": 1}}) | {"cut": cut}
        for number, cut in enumerate(cuts)
    ]
    spec = spec_of(write_run(tmp_path, ["en"], phases=phases))
    folder = ensure_built(spec, tmp_path / "roomy")
    sizes = sizes_in(folder)
    blends = sum(size for name, size in sizes.items() if name.startswith("blend-"))
    assert (sizes["starts"] == 0) == (cuts == ["documents"])
    if "documents" in cuts:
        tables = asked[0] - blends
        assert tables > 0
        # Those are stored when all blends are written, and the starts then known.
        assert asked[-1] == sizes["starts"]
    else:
        assert asked[-1] == blends + sizes["starts"]
    needed = max(asked)
    usage = type("usage", (), {"free": needed})
    monkeypatch.setattr("megaphase.plan.build.shutil.disk_usage", lambda path: usage)
    assert contents(ensure_built(spec, tmp_path / "exact")) == contents(folder)
    usage.free -= 1
    with pytest.raises(RunError, match="make room or put output on a larger disk"):
        ensure_built(spec, tmp_path / "full")
    wait_until(lambda: not list((tmp_path / "full").glob("plan/[0-9a-f]*")))


@pytest.mark.parametrize(
    ("lengths", "lengths_of_samples"),
    [
        ([2] * 3000, [(64, "documents")]),
        (random_lengths(3000, 30, 1), [(16, "documents"), (64, "documents")]),
        (random_lengths(3000, 30, 1), [(16, "tokens"), (64, "documents"), (16, "documents")]),
        (random_lengths(40, 1000, 2), [(8, "tokens"), (512, "documents")]),
        (random_lengths(3000, 17, 3), [(16, "documents"), (16, "tokens"), (16, "documents")]),
    ],
)
def test_tables_of_documents_are_counted_before_any_is_written(
    tmp_path, asked, lengths, lengths_of_samples
):
    write_corpus(tmp_path / "en", lengths)
    phases = [
        phase(str(number), 3, {"rates": {"en": 1}}) | {"cut": cut, "model": {"seq_len": seq_len}}
        for number, (seq_len, cut) in enumerate(lengths_of_samples)
    ]
    spec = spec_of(write_run(tmp_path, ["en"], phases=phases))
    folder = ensure_built(spec, tmp_path / "run")
    plan = Plan(spec, folder)
    for number in range(len(phases)):
        plan.open_phase(number)
    plan.summary()
    tables = [sizes_in(path) for path in folder.parent.glob("documents-*")]
    documents = {length for length, cut in lengths_of_samples if cut == "documents"}
    assert len(tables) >= len(documents)
    written = sum(size for table in tables for name, size in table.items() if name != INDEX_FILE)
    blends = sum(size for name, size in sizes_in(folder).items() if name.startswith("blend-"))
    counted = asked[0] - blends
    assert written <= counted
    if lengths_of_samples[0][1] == "tokens":
        return  # the table of whole epochs is not needed, and not written
    assert counted <= 3 * written
    # What is stored is not counted again.
    shutil.rmtree(folder)
    asked.clear()
    ensure_built(spec_of(write_run(tmp_path, ["en"], phases=phases)), tmp_path / "run")
    assert asked[0] - blends < counted
    if len(phases) == 1:
        assert asked[0] == blends


def test_a_plan_of_2_to_the_40_samples_is_refused_for_the_disk_alone(run, tmp_path):
    config, written = run
    steps = 2**40 // 4
    config = write_run(
        tmp_path, list(written), phases=[phase("one", steps, {"proportional": True})]
    )
    # 2 bytes for the task and 8 for the start of each, and 8 for each of 3 tasks every 1,024.
    with pytest.raises(RunError, match=r"needs 11,020\.9 GB for 1,099,511,627,776 samples"):
        ensure_built(spec_of(config), config.output)
    config = write_run(
        tmp_path,
        list(written),
        batch={"samples": 1024},
        phases=[phase("one", 10**12, {"proportional": True})],
    )
    with pytest.raises(
        InputError, match=r"phases\[0\]\.steps: one has 1,024,000,000,000,000 samples"
    ):
        spec_of(config)


def test_ctrl_c_ends_the_command_and_leaves_nothing(tmp_path):
    write_corpus(tmp_path / "en", random_lengths(400, 30, 1))
    config = write_run(tmp_path, ["en"], phases=[phase("one", 30_000_000, {"rates": {"en": 1}})])
    release_file(config).touch()
    with in_another_process(config, "blend of one and sample index") as process:
        assert first_line(process) == "at blend of one and sample index"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=LIMIT_SECONDS)
    assert "KeyboardInterrupt" in error
    # A slow disk may still be removing the output.
    wait_until(lambda: not config.output.exists())


@pytest.mark.parametrize(
    "changes",
    [{}, {"order": "random"}, {"mixture": {"temperature": 3.3, "max_epochs": 3}}],
    ids=["at once", "random", "after the phase before"],
)
def test_the_number_of_threads_changes_no_byte(run, tmp_path, changes):
    _, written = run
    phases = [PLAN_PHASES[0], PLAN_PHASES[1] | changes]
    config = write_run(tmp_path, list(written), phases=phases)
    for threads in (1, 2, 7):
        build_index(spec_of(config), tmp_path / str(threads), lambda *_: None, threads)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "7")


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ["blend of one, two and sample index"]),
        ({"order": "random"}, ["blend of one, two", "sample index"]),
        (
            {"mixture": {"temperature": 3.3, "max_epochs": 3}},
            ["blend of one", "blend of two and sample index"],
        ),
    ],
    ids=["at once", "random", "after the phase before"],
)
def test_progress_is_told_to_the_end(run, tmp_path, changes, names):
    _, written = run
    phases = [PLAN_PHASES[0], PLAN_PHASES[1] | changes]
    config = write_run(tmp_path, list(written), phases=phases)
    told = []
    build_index(spec_of(config), tmp_path / "index", lambda *news: told.append(news))
    assert all(done <= of for _, done, of in told)
    finished = {what: of for what, done, of in told if done == of}
    assert list(finished) == names
    rows = sum(n for _, n in json.loads((tmp_path / "index/index.json").read_text())["starts"])
    assert sum(finished.values()) == 48 + 32 + rows


def test_a_log_gets_a_line_now_and_then(monkeypatch):
    out = io.StringIO()
    clock = itertools.count(start=0, step=4)
    monkeypatch.setattr("megaphase.utils.progress.time.monotonic", lambda: next(clock))
    with building_progress(Console(file=out)) as progress:
        for done in range(1000, 7000, 1000):
            progress("blend of [joint]", done, 6000)
    assert out.getvalue().splitlines() == [
        "plan: blend of [joint], 3,000 of 6,000 samples",
        "plan: blend of [joint], 6,000 of 6,000 samples",
    ]


def test_a_terminal_gets_a_bar(run, tmp_path):
    config, _ = run
    out = io.StringIO()
    with building_progress(Console(file=out, force_terminal=True, width=80)) as progress:
        build_index(spec_of(config), tmp_path / "index", progress)
    assert "sample index" in out.getvalue()
    assert "100%" in out.getvalue()
