"""A run's record: lost metrics are reported, and TensorBoard shows every step once."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_support import (
    STEPS,
    copy_run,
    make_corpora,
    read_rows,
    run_settings,
    timeless,
    write_run_file,
)
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from warm_commands import run_killed, run_well

from megaphase.callbacks.metrics_recovery import kept_metrics
from megaphase.callbacks.tensorboard import TensorBoard
from megaphase.launch.slurm.status import read_status
from megaphase.report.load_run import load_run
from megaphase.utils.files import hash_file
from megaphase.utils.metrics_rows import missing_steps, steps_in_words

LAST = sum(STEPS)
SAVED = 16  # the newest checkpoint before the kill, in the second phase
KILLED = 18


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return make_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def stopped(corpora, tmp_path_factory):
    """Return the folder of a run that was killed in its second phase."""
    folder = tmp_path_factory.mktemp("stopped") / "a"
    checkpoint = {"every_steps": 4, "keep": 2, "asynchronous": False}
    path = write_run_file(folder, run_settings(corpora, checkpoint=checkpoint))
    run_killed(path, before_step=KILLED)
    return folder


@pytest.fixture(scope="module")
def whole(stopped, tmp_path_factory):
    """Return all rows of that run, resumed with intact metrics."""
    path = copy_run(stopped, tmp_path_factory.mktemp("whole") / "a")
    said = run_well("train", path)
    assert warnings_of(said) == []
    return timeless(read_rows(path.parent / "run"))


def warnings_of(said: str) -> list[str]:
    """Return the warnings, but for those of few held-out documents, which these runs have."""
    lines = [line for line in said.splitlines() if "Warning" in line]
    return [line for line in lines if "its validation loss is of only" not in line]


def steps_of(rows: list[dict[str, Any]]) -> list[int]:
    return [row["step"] for row in rows if "loss" in row]


def cut_in_a_row(lines: list[bytes]) -> bytes:
    return b"".join(lines)[:100]


def zeros_for_rows(lines: list[bytes]) -> bytes:
    """Three consecutive rows, including their ends, have become NUL bytes."""
    first = next(i for i, line in enumerate(lines) if line.startswith(b'{"step": 6, "phase"'))
    zeros = b"\0" * len(b"".join(lines[first : first + 3]))
    return b"".join([*lines[:first], zeros, *lines[first + 3 :]])


def without_row(lines: list[bytes]) -> bytes:
    return b"".join(line for line in lines if not line.startswith(b'{"step": 9, "phase"'))


@pytest.mark.parametrize(
    ("harm", "problem", "missing", "unreadable"),
    [
        (cut_in_a_row, "was cut off", [[1, SAVED]], 0),
        pytest.param(zeros_for_rows, "has been altered", [[6, 8]], 1, marks=pytest.mark.slow),
        pytest.param(without_row, "has been altered", [[9, 9]], 0, marks=pytest.mark.slow),
        (None, "is missing", [[1, SAVED]], 0),
    ],
)
def test_lost_rows_are_said_and_stay_lost(
    harm: Callable[[list[bytes]], bytes] | None,
    problem: str,
    missing: list[list[int]],
    unreadable: int,
    stopped: Path,
    whole: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    path = copy_run(stopped, tmp_path / "a")
    run_dir = tmp_path / "a" / "run"
    metrics = run_dir / "metrics.jsonl"
    harmed = b""
    if harm is None:
        metrics.unlink()
    else:
        harmed = harm(metrics.read_bytes().splitlines(keepends=True))
        metrics.write_bytes(harmed)
    said = run_well("train", path)
    [warning] = warnings_of(said)
    holes = [(first, last) for first, last in missing]
    assert f"{metrics} {problem}" in warning
    assert f"the rows of {steps_in_words(holes)} are missing" in warning

    content = metrics.read_bytes()
    assert content.count(b"\0") == harmed.count(b"\0")
    assert content.endswith(b"\n")
    rows = [json.loads(line) for line in content.splitlines() if b"\0" not in line]
    [event] = [row for row in rows if row.get("event") == "metrics_damaged"]
    assert event["missing_steps"] == missing
    assert event["unreadable_lines"] == unreadable
    assert event["step"] == SAVED
    # The existing rows are those of an undamaged run, in the same order.
    left = [row for row in timeless(rows) if row.get("event") != "metrics_damaged"]
    rest = iter(whole)
    assert all(row in rest for row in left)
    lost = {step for first, last in missing for step in range(first, last + 1)}
    assert steps_of(left) == [step for step in range(1, LAST + 1) if step not in lost]
    assert timeless(rows)[-8:] == whole[-8:]

    run = load_run(run_dir)
    assert list(run.missing_steps) == holes
    assert run.unreadable_lines == unreadable
    assert [phase.steps for phase in run.plan.phases] == list(STEPS)
    status = read_status(run_dir)
    assert (status.step, status.done) == (LAST, True)
    assert status.metrics_problem == f"the rows of {steps_in_words(holes)} are missing"
    report = run_well("report", run_dir, "--out", tmp_path / "report")
    assert "metrics.jsonl is damaged: the rows of" in report
    assert "are missing" in (tmp_path / "report" / "index.html").read_text()
    again = run_well("train", path)
    assert warnings_of(again) == []
    assert metrics.read_bytes() == content


def test_a_checkpoint_without_a_hash_is_of_an_earlier_version(stopped, tmp_path):
    path = copy_run(stopped, tmp_path / "a")
    run_dir = tmp_path / "a" / "run"
    state = json.loads((run_dir / "checkpoints" / "latest" / "state.json").read_text())
    for key in ("metrics_hash", "history"):
        del state[key]
    kept = kept_metrics(run_dir / "metrics.jsonl", state, 1)
    assert kept.problem is None
    assert kept.bytes == state["metrics_bytes"]
    lines = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_bytes(without_row(lines))
    kept = kept_metrics(run_dir / "metrics.jsonl", state, 1)
    assert kept.missing == ((9, 9),)
    assert path.exists()


def written(steps: int, saved: int) -> tuple[list[bytes], int]:
    """Return the lines of a log, and how many of them belong to the checkpoint after step
    `saved`."""
    lines, kept = [], 0
    for step in range(1, steps + 1):
        lines.append(json.dumps({"step": step, "phase": "a", "loss": step / 7}).encode() + b"\n")
        if step == saved:
            lines.append(json.dumps({"step": step, "event": "checkpoint"}).encode() + b"\n")
            kept = len(lines)
    return lines, kept


@settings(max_examples=100, deadline=None)
@given(data=st.data(), steps=st.integers(2, 12))
def test_any_damage_is_found_and_whole_lines_before_the_checkpoint_are_kept(
    data: st.DataObject, steps: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "metrics.jsonl"
    saved = data.draw(st.integers(1, steps - 1))
    lines, kept = written(steps, saved)
    path.write_bytes(b"".join(lines))
    size = len(b"".join(lines[:kept]))
    state = {"step": saved, "metrics_bytes": size, "metrics_hash": hash_file(path, size=size)}
    assert kept_metrics(path, state, 1).problem is None
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, size - 1)) :]
    else:
        at = data.draw(st.integers(0, size - 1))
        for place in range(at, min(at + data.draw(st.integers(1, 80)), size)):
            content[place] ^= 0x80  # no byte of JSON here
    path.write_bytes(content)
    found = kept_metrics(path, state, 1)
    assert found.problem is not None
    unharmed = [
        line
        for line in bytes(content[: found.bytes]).splitlines(keepends=True)
        if line in lines[:kept]
    ]
    assert found.bytes == 0 or content[found.bytes - 1 : found.bytes] == b"\n"
    # Everything of the intact part is kept, except rows on the same line as a broken one.
    there = [line for line in bytes(content).splitlines(keepends=True) if line in lines[:kept]]
    assert unharmed == there
    steps_left = {json.loads(line)["step"] for line in there if b"loss" in line}
    lost = {step for first, last in found.missing for step in range(first, last + 1)}
    assert lost == set(range(1, saved + 1)) - steps_left


def test_missing_steps_and_their_words():
    assert missing_steps([], 1, 0) == []
    assert missing_steps([1, 2, 3], 1, 3) == []
    assert missing_steps([5, 2, 9], 1, 8) == [(1, 1), (3, 4), (6, 8)]
    assert steps_in_words([]) == "no steps"
    assert steps_in_words([(4, 4)]) == "step 4"
    assert steps_in_words([(4, 4), (1_000, 2_000)]) == "steps 4 and 1,000 to 2,000"
    assert steps_in_words([(n, n) for n in range(1, 20, 2)], 2) == "steps 1, 3 and 8 more ranges"


def scalars(folder: Path) -> dict[str, list[int]]:
    """Return the steps that TensorBoard shows, by the name of the curve."""
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return {tag: [event.step for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def event_texts(folder: Path) -> list[tuple[str, int, str]]:
    """Return name, step and text of every event that TensorBoard's web server shows."""
    board = plugin_event_accumulator.EventAccumulator(
        str(folder / "tensorboard"), size_guidance={"tensors": 0}
    )
    board.Reload()
    return [
        (name, event.step, event.tensor_proto.string_val[0].decode())
        for tag in board.Tags()["tensors"]
        for name in [tag.removeprefix("events/").removesuffix("/text_summary")]
        if tag.startswith("events/")
        for event in board.Tensors(tag)
    ]


def assert_every_step_once(run_dir: Path, first: int, last: int) -> None:
    found = scalars(run_dir)
    assert found["train/loss"] == list(range(first, last + 1))
    for tag, steps in found.items():
        assert [step for step, count in Counter(steps).items() if count > 1] == [], tag
    rows = read_rows(run_dir)
    validated = {row["step"] for row in rows if "validation" in row}
    assert set(found["validation_loss/cimri"]) == validated
    events = [(row["event"], row["step"]) for row in rows if "event" in row]
    assert sorted((name, step) for name, step, _ in event_texts(run_dir)) == sorted(events)


def test_tensorboard_shows_every_step_once(corpora, tmp_path):
    """Killed before the first checkpoint, twice; then before and after the switch."""
    path = write_run_file(tmp_path, run_settings(corpora, logging={"tensorboard": True}))
    for step in (4, 3, STEPS[0] + 1, STEPS[0] + 3):
        run_killed(path, before_step=step)
    run_well("train", path)
    assert_every_step_once(tmp_path / "run", 1, LAST)

    joint = run_settings(corpora, logging={"tensorboard": True}, output="branch")
    del joint["phases"][0]
    branch = tmp_path / "branch.yaml"
    branch.write_text(json.dumps(joint))
    source = f"{tmp_path / 'run'}@pretrain"
    for _ in range(2):
        run_killed(branch, "--from", source, before_step=STEPS[0] + 3)
    run_well("train", branch)
    assert_every_step_once(tmp_path / "branch", STEPS[0] + 1, LAST)


def test_events_with_a_loss_are_no_curves(tmp_path):
    """Such as those of a loss spike or of divergence."""
    log = TensorBoard(tmp_path / "tensorboard", resumed_step=None)
    log.write({"step": 5, "event": "loss_spike", "loss": 9.0, "mean_before": 3.0})
    log.write({"step": 6, "phase": "joint", "validation": {"hi": {"loss": 2.5}}})
    figures = {"hi": {"loss": 2.5}}
    row = {"validation": figures, "validation_average": {"hi": {"loss": 2.25}}}
    log.write({"step": 7, "phase": "joint"} | row)
    log.on_run_end(None)
    assert scalars(tmp_path) == {
        "validation_loss/hi": [6, 7], "validation_average_loss/hi": [7],
    }  # fmt: skip


def test_events_are_text_and_every_task_has_its_charts(tmp_path):
    """A resumed run writes the events of its checkpoint's step again, after they are purged."""
    board, metrics = tmp_path / "tensorboard", tmp_path / "metrics.jsonl"
    loss = {"event": "loss_spike", "phase": "joint", "loss": 9.0}
    saved = {"step": 6, "event": "checkpoint", "phase": "joint"}
    metrics.write_text(json.dumps({"step": 5} | loss) + "\n" + json.dumps(saved) + "\n")
    log = TensorBoard(board, None, metrics, ["hi", "c.b"])
    for row in ({"step": 5} | loss, saved, {"step": 7} | loss):
        log.write(row)
    log.on_run_end(None)
    log = TensorBoard(board, 6, metrics, ["hi", "c.b"])
    log.write({"step": 7, "event": "stopped", "signal": "SIGTERM"})
    log.on_run_end(None)
    assert event_texts(tmp_path) == [
        ("loss_spike", 5, '{"phase": "joint", "loss": 9.0}'),
        ("checkpoint", 6, '{"phase": "joint"}'),
        ("stopped", 7, '{"signal": "SIGTERM"}'),
    ]
    events = EventAccumulator(str(board))
    events.Reload()
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["hi", "c.b"]
    curves = list(layout.category[1].chart[0].multiline.tag)
    assert curves == [r"^train_loss/c\.b$", r"^validation(_average)?_loss/c\.b$"]


def test_other_files_in_the_folder_of_tensorboard_stay(corpora, tmp_path):
    path = write_run_file(tmp_path, run_settings(corpora, logging={"tensorboard": True}))
    board = tmp_path / "run" / "tensorboard"
    run_killed(path, before_step=2)
    (board / "notes.txt").write_text("mine, too")
    shutil.copy(next(board.glob("events.*")), board / "copy.of.events")
    run_killed(path, before_step=2)
    assert {"notes.txt", "copy.of.events"} < {each.name for each in board.iterdir()}
    assert len(list(board.glob("events.out.tfevents.*"))) == 1
