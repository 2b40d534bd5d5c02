"""`launch status` shows what the run recorded and what Slurm reported."""

from __future__ import annotations

import fcntl
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from shlex import quote
from subprocess import CompletedProcess
from typing import Any

import pytest

from megaphase.cli import main
from megaphase.launch.slurm import activity
from megaphase.launch.slurm.job_file import remember_job
from megaphase.launch.slurm.status import ended_diverged, has_ended_after

PHASES = {"pretrain": 60, "joint": 40}
UNKNOWN_JOB = ("slurm_load_jobs error: Invalid job id specified", 1)
NO_ANSWER = ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", 1)


def training(step: int, phase: str) -> dict[str, Any]:
    return {
        "step": step,
        "phase": phase,
        "phase_step": step,
        "tokens": step * 256,
        "loss": 7.0 - step / 50,
        "loss_by_task": {"en": 7.0},
        "step_seconds": 0.5 + step % 7 / 10,
        "tokens_per_second": 256 / (0.5 + step % 7 / 10),
    }


def event(step: int, name: str, **facts: Any) -> dict[str, Any]:
    return {"step": step, "event": name, **facts}


def rows_until(step: int) -> list[dict[str, Any]]:
    """Return the rows of a run whose first phase stopped at step 50 of 60."""
    rows = [event(0, "phase_start", phase="pretrain")]
    for at in range(1, step + 1):
        rows.append(training(at, "pretrain" if at <= 50 else "joint"))
        if at % 10 == 0:
            rows.append({"step": at, "phase": rows[-1]["phase"], "validation": {"en": {"loss": 1}}})
        if at == 50:
            rows.append(event(50, "phase_end", phase="pretrain", reason="overfit"))
            rows.append(event(50, "phase_start", phase="joint"))
    return rows


def write_run(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    phases = [{"name": name, "steps": steps} for name, steps in PHASES.items()]
    (folder / "plan.json").write_text(json.dumps({"phases": phases}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", rows_until(70))


@contextmanager
def trained(run_dir: Path) -> Iterator[None]:
    """As if a process trained the run."""
    with open(run_dir / ".lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def save(run_dir: Path, step: int) -> None:
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    state = {"step": step, "phase_name": "joint", "metrics_bytes": 0, "history": HISTORY}
    (folder / "state.json").write_text(json.dumps(state))


def path_with(folder: Path, answer: tuple[str, int] | None) -> str:
    """Return a PATH whose scontrol, if there is one, prints this and exits with this code."""
    programs = folder / "bin"
    programs.mkdir()
    if answer is None:
        return str(programs)
    text, code = answer
    program = programs / "scontrol"
    program.write_text(f"#!/bin/bash\necho {quote(text)}{' >&2' * code}\nexit {code}\n")
    program.chmod(0o755)
    return f"{programs}:{os.environ['PATH']}"


def call(*arguments: object, path: str | None = None) -> CompletedProcess[str]:
    """Run the command in this process; `path` is PATH."""
    out, error = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(error):
        patch.setattr(sys, "argv", ["megaphase", "launch", "status", *map(str, arguments)])
        if path is not None:
            patch.setenv("PATH", path)
        with pytest.raises(SystemExit) as end:
            main()
    return CompletedProcess(sys.argv, int(end.value.code or 0), out.getvalue(), error.getvalue())


def shown(*arguments: object, path: str | None = None) -> dict[str, str]:
    """Return the lines by their first word."""
    done = call(*arguments, path=path)
    assert done.returncode == 0, done.stderr
    return {line[:10].strip(): line[11:] for line in done.stdout.splitlines()}


def as_json(run_dir: Path) -> dict[str, Any]:
    done = call(run_dir, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_run_that_was_never_submitted(run_dir: Path) -> None:
    age = 7200
    os.utime(run_dir / "metrics.jsonl", (time.time() - age,) * 2)
    last = [training(at, "") for at in range(21, 71)]
    seconds = statistics.median(row["step_seconds"] for row in last)
    speed = statistics.median(row["tokens_per_second"] for row in last)
    with trained(run_dir):
        found, lines = as_json(run_dir), shown(run_dir)
    assert age <= found.pop("idle_seconds") < age + 180  # until then it is rounded to 2.0 hours
    nothing = ("job", "state", "reason", "nodes", "excluded", "restarts", "divergence", "log")
    nothing += ("metrics_problem", "stopped")
    # The first phase ended ten steps early: 90 steps are left of the 100 that were planned.
    assert found == dict.fromkeys(nothing) | {
        "run": str(run_dir),
        "phase": "joint",
        "step": 70,
        "steps": 90,
        "done": False,
        "loss": pytest.approx(5.6),
        "tokens_per_second": pytest.approx(speed),
        "remaining_seconds": pytest.approx(seconds * 20),
        "training": True,
    }
    assert lines == {
        "run": str(run_dir),
        "phase": "joint",
        "step": "70 of 90 (77.8%)",
        "loss": "5.6000",
        "speed": f"{speed:,.0f} tokens/s",
        "remaining": f"{seconds * 20:.0f} seconds of training",
        "last sign": "2.0 hours ago",
    }


def test_a_run_that_is_done(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", [*rows_until(90), event(90, "phase_end", phase="joint")])
    found = as_json(run_dir)
    assert (found["done"], found["step"], found["steps"]) == (True, 90, 90)
    assert found["remaining_seconds"] == 0
    assert shown(run_dir)["remaining"] == "nothing: all phases are done"


@pytest.mark.parametrize(
    ("saved", "last", "stopped"),
    [
        (
            60,
            None,
            "at step 70 (killed, or failed): 10 steps since step-00000060 are lost; the same "
            "command resumes from step-00000060",
        ),
        (
            None,
            None,
            "at step 70 (killed, or failed): 70 steps are lost, as there is no checkpoint yet; the "
            "same command starts from the beginning",
        ),
        (
            70,
            event(70, "stopped", phase="joint", signal="Ctrl-C"),
            "at step 70 (Ctrl-C): no step is lost; the same command resumes from step-00000070",
        ),
    ],
)
def test_a_run_that_nobody_trains(
    saved: int | None, last: dict[str, Any] | None, stopped: str, tmp_path: Path
) -> None:
    run_dir = write_run(tmp_path / "run", rows_until(70) + ([last] if last else []))
    if saved is not None:
        save(run_dir, saved)
    (run_dir / ".lock").touch()  # left by a killed process
    found, lines = as_json(run_dir), shown(run_dir)
    assert (found["training"], found["remaining_seconds"]) == (False, None)
    assert found["stopped"] == lines["stopped"] == stopped
    assert "remaining" not in lines
    (run_dir / ".lock").unlink()
    assert as_json(run_dir)["stopped"] == stopped
    with trained(run_dir):
        lines = shown(run_dir)
    assert "remaining" in lines
    assert "stopped" not in lines


@pytest.mark.parametrize(
    ("end", "stopped"),
    [
        (
            70,
            "at step 70 (checkpoint.end_after: 70): without that key, the same command resumes "
            "from there",
        ),
        (  # a later start with another value was killed
            80,
            "at step 70 (killed, or failed): no step is lost; the same command resumes from "
            "step-00000070",
        ),
    ],
)
def test_a_run_that_end_after_has_ended(run_dir: Path, end: int, stopped: str) -> None:
    save(run_dir, 70)
    (run_dir / "run.json").write_text(json.dumps({"checkpoint": {"end_after": end}}))
    assert as_json(run_dir)["stopped"] == shown(run_dir)["stopped"] == stopped
    assert has_ended_after(run_dir, end) == (end == 70)
    assert not has_ended_after(run_dir, None)


def test_a_run_that_is_done_was_not_ended_by_end_after(tmp_path: Path) -> None:
    rows = [*rows_until(90), event(90, "phase_end", phase="joint")]
    run_dir = write_run(tmp_path / "run", rows)
    save(run_dir, 90)
    state = run_dir / "checkpoints" / "step-00000090" / "state.json"
    pretrain, joint = HISTORY["phases"]
    ended = {"phases": [pretrain, joint | {"ended_after": 90, "reason": "length"}]}
    state.write_text(json.dumps(json.loads(state.read_text()) | {"history": HISTORY | ended}))
    assert as_json(run_dir)["done"]
    assert not has_ended_after(run_dir, 90)


def test_a_lock_of_another_node_may_not_be_seen(run_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr(activity, "_is_local", lambda path: False)
    (run_dir / ".lock").touch()
    assert as_json(run_dir)["training"]
    hour_ago = time.time() - 3600
    os.utime(run_dir / "metrics.jsonl", (hour_ago, hour_ago))
    assert not as_json(run_dir)["training"]


def test_a_plan_that_is_being_built_is_a_sign_of_life(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", [])
    (run_dir / "metrics.jsonl").unlink()
    assert as_json(run_dir)["stopped"] == "not trained yet"
    (run_dir / "plan").mkdir()
    with open(run_dir / "plan" / ".0123456789abcdef.lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert as_json(run_dir)["training"]


def test_a_run_that_diverges_or_has_ended_by_it(run_dir: Path) -> None:
    def add(*rows: dict[str, Any]) -> str | None:
        with open(run_dir / "metrics.jsonl", "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        found = as_json(run_dir)
        assert shown(run_dir).get("divergence") == found["divergence"]
        return found["divergence"]

    rise = {"phase": "joint", "kind": "rise"}
    assert add(event(70, "divergence", **rise)) == "since step 70 (rise)"
    assert add(event(70, "divergence_over", **rise)) is None
    assert add(training(71, "joint"), event(71, "divergence", **rise)) == "since step 71 (rise)"
    assert not ended_diverged(run_dir)
    assert add(event(71, "divergence_stop", **rise)) == "the run has ended at step 71 (rise)"
    assert "remaining" not in shown(run_dir)
    assert ended_diverged(run_dir)
    # Training continued afterwards.
    assert add(training(72, "joint")) == "since step 71 (rise)"
    assert not ended_diverged(run_dir)
    broken = event(72, "divergence_stop", phase="joint", kind="not_finite")
    assert add(broken) == "the run has ended at step 72 (not_finite)"
    assert not ended_diverged(run_dir)


def test_a_branch_counts_from_the_run_before_it(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", [])
    (run_dir / "origin.json").write_text(json.dumps({"step": 500, "used": {}}))
    found = as_json(run_dir)
    assert (found["step"], found["steps"], found["loss"]) == (500, 600, None)
    found = shown(run_dir)
    assert (found["phase"], found["step"]) == ("none yet", "500 of 600 (83.3%)")


def test_the_last_line_of_the_metrics_may_be_half_written(run_dir: Path) -> None:
    before = as_json(run_dir)
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps(training(71, "joint"))[:50])
    after = as_json(run_dir)
    assert {**after, "idle_seconds": 0} == {**before, "idle_seconds": 0}


def test_only_the_end_of_long_metrics_is_parsed(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", [])
    lines = [json.dumps(training(at, "joint")) for at in range(1, 3000)]
    end = json.dumps(event(0, "phase_end", phase="pretrain"))
    (run_dir / "metrics.jsonl").write_text("\n".join([end, "{", *lines, ""]))
    found = as_json(run_dir)
    assert (found["step"], found["steps"], found["phase"]) == (2999, 40, "joint")


def test_a_job_that_waits_before_the_run_has_begun(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    remember_job(run_dir, "17", tmp_path / "17.log")
    fields = "JobId=17 JobName=a b=c JobState=PENDING Reason=Resources Restarts=0 NodeList="
    path = path_with(tmp_path, (f"{fields} ExcNodeList=(null)", 0))
    assert shown(run_dir, path=path) == {
        "run": str(run_dir),
        "job": "17: PENDING (Resources)",
        "restarts": "0",
        "phase": "none yet",
        "step": "0",
        "log": str(tmp_path / "17.log"),
    }


@pytest.mark.parametrize(
    ("fields", "job"),
    [
        ("JobState=RUNNING Reason=None NodeList=n[1-4]", "17: RUNNING on n[1-4]"),
        (
            "JobState=FAILED Reason=NonZeroExitCode NodeList=n1",
            "17: FAILED (NonZeroExitCode) on n1",
        ),
        (
            "JobState=PENDING Reason=BadConstraints ExcNodeList=n7 NodeList=",
            "17: PENDING (BadConstraints), not on n7",
        ),
    ],
)
def test_what_slurm_says_of_a_job(run_dir: Path, tmp_path: Path, fields: str, job: str) -> None:
    remember_job(run_dir, "17", tmp_path / "17.log")
    path = path_with(tmp_path, (f"JobId=17 Restarts=3 {fields}", 0))
    found = shown(run_dir, path=path)
    assert (found["job"], found["restarts"]) == (job, "3")
    assert found["step"] == "70 of 90 (77.8%)"
    assert ("remaining" in found) == ("RUNNING" in job)
    assert ("stopped" in found) == ("FAILED" in job)


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        (None, "there is no Slurm on this machine"),
        (UNKNOWN_JOB, "no longer known to Slurm"),
        (NO_ANSWER, f"Slurm does not answer ({NO_ANSWER[0]})"),
    ],
)
def test_without_slurms_word_the_rest_is_shown(
    run_dir: Path, tmp_path: Path, answer: tuple[str, int] | None, state: str
) -> None:
    remember_job(run_dir, "17", tmp_path / "17.log")
    found = shown(run_dir, path=path_with(tmp_path, answer))
    assert (found["job"], found["restarts"]) == (f"17: {state}", "?")
    assert found["step"] == "70 of 90 (77.8%)"


def test_several_runs(run_dir: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", rows_until(3))
    lines = call(run_dir, other, "--json").stdout.splitlines()
    assert [json.loads(line)["step"] for line in lines] == [70, 3]
    first, second = call(run_dir, other).stdout.split("\n\n")
    assert (first.splitlines()[0][11:], second.splitlines()[0][11:]) == (str(run_dir), str(other))


@pytest.mark.parametrize("name", ["nothing", "empty", "file"])
def test_where_there_is_no_run_it_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    done = call(tmp_path / name)
    assert done.returncode == 2
    assert done.stderr == (
        f"megaphase: {tmp_path / name}: no run was started or submitted here; "
        "give the `output` of a run file\n"
    )


def test_a_damaged_plan_is_named(run_dir: Path) -> None:
    path = run_dir / "plan.json"
    path.write_text(path.read_text().replace(":", "", 1))
    done = call(run_dir)
    assert done.returncode == 2
    assert done.stderr.startswith(f"megaphase: {path}: is damaged; restore it")
    assert len(done.stderr.splitlines()) == 1


def test_lines_of_the_metrics_that_are_no_rows_are_passed_over(run_dir: Path) -> None:
    before, path = as_json(run_dir), run_dir / "metrics.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([b"\0" * 50 + b"\n", b"[]\n", *rows, b'{"step": 7', b"5}\n"]))
    found = as_json(run_dir)
    assert found | {"idle_seconds": 0} == before | {"idle_seconds": 0}


def test_metrics_that_are_shorter_than_at_the_newest_checkpoint(run_dir: Path) -> None:
    folder = run_dir / "checkpoints" / "step-00000060"
    folder.mkdir(parents=True)
    state = {"step": 60, "phase_name": "joint", "metrics_bytes": 10_000_000, "history": HISTORY}
    (folder / "state.json").write_text(json.dumps(state))
    found = as_json(run_dir)
    assert found["metrics_problem"].startswith("metrics.jsonl was cut off: ")
    (run_dir / "metrics.jsonl").unlink()
    found = as_json(run_dir)
    assert (found["phase"], found["step"], found["steps"]) == ("joint", 60, 90)
    assert found["metrics_problem"] == "metrics.jsonl is missing"
    assert "metrics    metrics.jsonl is missing\n" in call(run_dir).stdout


# The end of the first phase, as recorded in the run's checkpoints.
HISTORY = {
    "origin": None,
    "phases": [
        {"name": "pretrain", "begun_after": 0, "starts": {}, "ended_after": 50, "reason": "early"},
        {"name": "joint", "begun_after": 50, "starts": {}, "ended_after": None, "reason": None},
    ],
    "skipped_steps": [],
}


def test_a_damaged_number_is_left_out(run_dir: Path) -> None:
    with open(run_dir / "metrics.jsonl", "a") as file:
        row = training(71, "joint") | {"loss": "x", "tokens_per_second": None}
        file.write(json.dumps(row) + "\n")
    found = shown(run_dir)
    assert "loss" not in found
    assert found["step"].startswith("71")
