"""`megaphase sweep`: the runs that a file defines, and that each is trained once."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from data_support import LIMIT_SECONDS, wait_until
from run_support import HIGH, LOW, make_corpora, megaphase, read_rows
from sweep_run_support import (
    STEPS,
    invented,
    open_sweep,
    run_warm,
    running,
    settings,
    warm_start,
    write,
)

from megaphase.config.load import load_run_file
from megaphase.sweep.directory import SweepDirectory
from megaphase.sweep.outcome import Outcome
from megaphase.sweep.pareto.report import SweepReport
from megaphase.sweep.start import refuse_failures
from megaphase.sweep.trial_run import release_checkpoints
from megaphase.sweep.trials import known_trials
from megaphase.utils.errors import EndedAtOnce, RunError, Stopped


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def undisturbed(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepDirectory:
    """Return a finished sweep with all kinds of arms."""
    arms = {
        "static": {"rates": [0.2], "temperatures": [4]},
        "two-phase": {"pretrain": [0.6], "rates": [0.4]},
        "keep": {"pretrain": [0.6], "rates": [0.4]},
        "regularized": {
            "rates": [0.4], "settings": {"model.dropout": 0.2}, "early_stopping": 1,
        },
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("sweep")
    sweep, directory, outcomes = run_warm(write(folder, settings(corpora, arms=arms)))
    refuse_failures(sweep, directory, outcomes)
    return directory


def test_every_run_ends_with_its_losses(undisturbed: SweepDirectory) -> None:
    outcomes = undisturbed.outcomes()
    assert len(outcomes) == 7
    for name, outcome in outcomes.items():
        rows = [row for row in read_rows(undisturbed.run(name)) if "validation" in row]
        found = [{t: m["loss"] for t, m in row["validation"].items()} for row in rows]
        if name.startswith("regularized"):
            assert outcome.losses == min(found, key=lambda losses: losses[LOW[0]])
        else:
            assert outcome.losses == found[-1]
            last = 6 if "pretrain" in name else STEPS
            assert outcome.step == rows[-1]["step"] == last


def test_branches_go_on_from_the_first_stage(undisturbed: SweepDirectory) -> None:
    first = read_rows(undisturbed.run("pretrain-0.6-p0.01-s11"))
    branch = read_rows(undisturbed.run("two-phase-0.6-r0.4-p0.01-s11"))
    measured = [[row for row in rows if "validation" in row] for rows in (first, branch)]
    assert measured[1][0]["validation"].keys() == measured[0][-1]["validation"].keys()
    for task, loss in measured[1][0]["validation"].items():
        assert loss["loss"] == measured[0][-1]["validation"][task]["loss"]
    assert any(row.get("event") == "optimizer_reset" for row in branch)
    kept = read_rows(undisturbed.run("keep-0.6-r0.4-p0.01-s11"))
    assert not any(row.get("event") == "optimizer_reset" for row in kept)


def test_kept_schedule_is_that_of_a_single_phase(undisturbed: SweepDirectory) -> None:
    def rates(name: str) -> list[float]:
        rows = read_rows(undisturbed.run(name))
        return [row["learning_rate"] for row in rows if "learning_rate" in row]

    kept = rates("keep-pretrain-0.6-p0.01-s11") + rates("keep-0.6-r0.4-p0.01-s11")
    assert kept == rates("static-r0.2-p0.01-s11")


def test_ended_runs_are_never_repeated(undisturbed: SweepDirectory) -> None:
    """Even if the sweep was killed before it recorded that they had ended."""
    before = {path: path.stat().st_mtime_ns for path in undisturbed.path.rglob("metrics.jsonl")}
    outcomes = undisturbed.outcomes()
    for name in ("pretrain-0.6-p0.01-s11", "two-phase-0.6-r0.4-p0.01-s11"):
        undisturbed.outcome_file(name).unlink()
    run_warm(undisturbed.path.parent / "sweep.yaml")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert undisturbed.outcomes() == outcomes


FIRST, BRANCH = "pretrain-0.6-p0.01-s11", "two-phase-0.6-r0.4-p0.01-s11"
STATIC = "static-r0.2-p0.01-s11"


def with_checkpoints(directory: SweepDirectory) -> set[str]:
    return {path.parent.name for path in directory.run("").glob("*/checkpoints")}


def test_checkpoints_stay_as_long_as_they_are_needed(corpora: Path, tmp_path: Path) -> None:
    _, directory, outcomes = run_warm(write(tmp_path, settings(corpora)))
    assert with_checkpoints(directory) == {FIRST, BRANCH, STATIC} == set(outcomes)
    few = settings(corpora, keep_checkpoints="first-stages", seeds=[11, 12])
    _, directory, outcomes = run_warm(write(tmp_path, few))
    assert with_checkpoints(directory) == {FIRST, FIRST.replace("s11", "s12")}
    assert len(outcomes) == 6
    assert not any(outcome.failed for outcome in outcomes.values())


def test_checkpoints_of_a_run_that_failed_stay(corpora: Path, tmp_path: Path) -> None:
    config = settings(corpora, keep_checkpoints="first-stages")
    sweep, directory = open_sweep(write(tmp_path, config))
    first = next(trial for trial in known_trials(sweep, {}) if trial.name == FIRST)
    outcomes = {FIRST: invented(first, 1e-2)}
    for trial in known_trials(sweep, outcomes):
        (directory.run(trial.name) / "checkpoints").mkdir(parents=True)
        outcomes[trial.name] = invented(trial, 1e-2)
    outcomes[STATIC] = Outcome(failed="diverged")
    release_checkpoints(sweep, directory, known_trials(sweep, outcomes), outcomes)
    assert with_checkpoints(directory) == {FIRST, STATIC}
    assert not list(directory.run(BRANCH).iterdir())


def test_run_files_train_by_hand(undisturbed: SweepDirectory) -> None:
    path = undisturbed.run_file("two-phase-0.6-r0.4-p0.01-s11")
    source = undisturbed.run("pretrain-0.6-p0.01-s11")
    comment = path.read_text().splitlines()[0]
    assert comment == f"# megaphase train {path.name} --from {source}@pretrain"
    assert load_run_file(path).phases[0].name == "joint"


def test_a_run_that_fails_does_not_hold_up_the_others(corpora: Path, tmp_path: Path) -> None:
    arms = {"static": {"rates": [0.2, 0.3]}}
    path = write(tmp_path, settings(corpora, arms=arms, steps=3))
    sweep, directory, outcomes = run_warm(path, start=full_disk_start)
    assert outcomes["static-r0.3-p0.01-s11"].failed is None
    failed = outcomes["static-r0.2-p0.01-s11"].failed
    assert failed is not None
    assert "the disk is full" in failed
    with pytest.raises(RunError, match=r"1 of 2 runs have failed: static-r0\.2.*--retry restarts"):
        refuse_failures(sweep, directory, outcomes)
    directory.forget_failures()
    _, _, outcomes = run_warm(path)
    assert all(outcome.failed is None for outcome in outcomes.values())


def full_disk_start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Any:
    """Let one of the runs fail at once."""
    if not any("static-r0.2" in each for each in command):
        return warm_start(command, log, environment)
    with open(log, "a") as output:
        code = "import sys; sys.exit('megaphase: the disk is full')"
        argv = [sys.executable, "-c", code]
        return subprocess.Popen(argv, stderr=output, start_new_session=True)


def test_a_run_that_diverges_has_ended_and_is_no_failure(corpora: Path, tmp_path: Path) -> None:
    """One first stage diverges, another one has gradients that are not finite."""
    arms = {"two-phase": {"pretrain": [0.6], "rates": [0.4]}}
    grid = {"peaks": [1e-2, 3.0, 1e30], "warmup": 0.0}
    path = write(tmp_path, settings(corpora, arms=arms, learning_rate=grid, steps=16))
    sweep, directory, outcomes = run_warm(path)
    refuse_failures(sweep, directory, outcomes)
    good, *bad = (f"pretrain-0.6-p{peak}-s11" for peak in ("0.01", "3", "1e+30"))
    for name in bad:
        outcome = outcomes[name]
        assert outcome.failed is None
        assert outcome.diverged == f"ended at step {outcome.step} of 10"
        assert math.isinf(outcome.group_loss(HIGH))
    branches = [name for name in outcomes if name.startswith("two-phase")]
    assert len(branches) == 3
    assert all(directory.run_file(name).read_text().count(f"{good}@pretrain") for name in branches)
    (healthy,) = (name for name in branches if name.endswith("-p0.01-s11"))
    assert outcomes[healthy].diverged is None
    # Neither is restarted.
    before = [(directory.run(name) / "metrics.jsonl").read_bytes() for name in outcomes]
    directory.forget_failures()
    run_warm(path)
    assert [(directory.run(name) / "metrics.jsonl").read_bytes() for name in outcomes] == before
    text = "\n".join(SweepReport.of(directory.path).sentences())
    assert f"{bad[0]} diverged: ended at step" in text


def test_a_run_that_is_killed_is_told_so(corpora: Path, tmp_path: Path) -> None:
    path = write(tmp_path, settings(corpora, arms={"static": {"rates": [0.2]}}, steps=3))
    _, _, outcomes = run_warm(path, start=killed_start)
    assert outcomes["static-r0.2-p0.01-s11"].failed == "was killed by SIGSEGV"
    _, directory = open_sweep(path)
    directory.forget_failures()
    _, _, outcomes = run_warm(path)
    assert outcomes["static-r0.2-p0.01-s11"].failed is None


def test_a_run_that_ends_early_has_not_spent_the_budget(corpora: Path, tmp_path: Path) -> None:
    """Though its exit code is 0, and it was validated."""
    path = write(tmp_path, settings(corpora, arms={"static": {"rates": [0.2]}}))
    early = partial(overridden_start, "checkpoint.end_after=4")
    _, directory, outcomes = run_warm(path, start=early)
    assert read_rows(directory.run(STATIC))[-1]["step"] == 4
    assert outcomes[STATIC].failed == "ended before its last step, with exit code 0"
    directory.forget_failures()
    _, _, outcomes = run_warm(path)
    assert (outcomes[STATIC].failed, outcomes[STATIC].step) == (None, STEPS)


def overridden_start(
    override: str, command: Sequence[str], log: Path, environment: Mapping[str, str]
) -> Any:
    return warm_start([*command[:2], override, *command[2:]], log, environment)


@pytest.mark.parametrize(
    ("code", "said"), [(2, "run.yaml: the input is wrong"), (75, "SIGTERM came to rank 0: saved")]
)
def test_a_run_that_ends_by_itself_does_not_end_the_others(
    code: int, said: str, corpora: Path, tmp_path: Path
) -> None:
    path = write(tmp_path, settings(corpora, arms={"static": {"rates": [0.2, 0.3]}}, steps=3))
    _, _, outcomes = run_warm(path, start=partial(ending_start, code, said))
    assert outcomes[STATIC].failed == said
    assert outcomes["static-r0.3-p0.01-s11"].failed is None


def ending_start(
    code: int, said: str, command: Sequence[str], log: Path, environment: Mapping[str, str]
) -> Any:
    """Let one of the runs end at once with this exit code."""
    if not any("static-r0.2" in each for each in command):
        return warm_start(command, log, environment)
    with open(log, "a") as output:
        argv = ["bash", "-c", f"echo 'megaphase: {said}'; exit {code}"]
        return subprocess.Popen(argv, stdout=output, start_new_session=True)


def killed_start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Any:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True)


def test_killed_at_once_with_its_runs_it_goes_on(corpora: Path, tmp_path: Path) -> None:
    """SIGKILL of the sweep also ends its runs; restarted, it ends with the same losses."""
    arms = {"two-phase": {"pretrain": [0.6], "rates": [0.4]}}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        path = write(folder, settings(corpora, arms=arms))
    run_warm(whole / "sweep.yaml")
    process = subprocess.Popen(megaphase("sweep", path), stdout=subprocess.DEVNULL)
    first = SweepDirectory(killed / "out").run("pretrain-0.6-p0.01-s11")
    while not any(first.glob("checkpoints/step-*")):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    wait_until(lambda: first.name not in running(SweepDirectory(killed / "out")))
    run_warm(path)
    found = [
        {name: outcome.losses for name, outcome in SweepDirectory(f / "out").outcomes().items()}
        for f in (whole, killed)
    ]
    assert found[0] == found[1]
    assert len(found[0]) == 2


@pytest.mark.slow
def test_killed_at_random_it_gives_the_same_report(corpora: Path, tmp_path: Path) -> None:
    """SIGKILL after 5 to 25 s, repeatedly, until the sweep has ended; all files are equal."""
    arms = {
        "static": {"rates": [0.1, 0.3]},
        "two-phase": {"pretrain": [0.5, 0.75], "rates": [0.4]},
        "restart": {"pretrain": [0.5], "rates": [0.2]},
        "low-only": {"pretrain": [0.75]},
        "regularized": {"rates": [0.3], "settings": {"model.dropout": 0.2}, "early_stopping": 2},
    }
    grid = {"peaks": [3e-3, 1e-2], "warmup": 0.2}
    reports = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        path = write(tmp_path / name, settings(corpora, arms=arms, learning_rate=grid, steps=60))
        if name == "whole":
            run_warm(path)
        else:
            kills = kill_until_done(path, random.Random(3))
            assert kills >= 4
        out = tmp_path / name / "report"
        SweepReport.of(tmp_path / name / "out").write(out)
        files = sorted(file for file in out.rglob("*") if file.is_file())
        reports.append({file.relative_to(out): file.read_bytes() for file in files})
    assert len(reports[0]) > 10
    assert reports[0] == reports[1]


def kill_until_done(path: Path, chance: random.Random) -> int:
    """Restart a sweep repeatedly, two runs at a time; return how often it was killed."""
    kills = 0
    while True:
        process = subprocess.Popen(megaphase("sweep", path, "-j", "2"), stdout=subprocess.DEVNULL)
        try:
            assert process.wait(chance.uniform(5, 25)) == 0
            return kills
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1


@pytest.mark.slow
def test_a_signal_lets_the_runs_save(corpora: Path, tmp_path: Path) -> None:
    path = write(tmp_path, settings(corpora, steps=4000))
    process = subprocess.Popen(
        megaphase("sweep", path), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    first = tmp_path / "out" / "runs" / "pretrain-0.6-p0.01-s11"
    while not any(first.glob("checkpoints/step-*")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 75, stderr
    assert "SIGTERM was received: the runs have saved; the same command resumes" in stderr
    log = SweepDirectory(tmp_path / "out").log(first.name).read_text()
    assert "SIGTERM came to rank 0: saved after step" in log
    assert not SweepDirectory(tmp_path / "out").outcomes()


class Sleeper(subprocess.Popen):
    """A run that saves on a signal, or ends before; sends Ctrl-C to the sweep by itself."""

    def __init__(self, presses: int) -> None:
        super().__init__(["sleep", "600"], start_new_session=True)
        self._presses, self._saves, self._pressed_at = presses, presses == 1, 0.0

    def poll(self) -> int | None:
        if self._presses and time.monotonic() - self._pressed_at > 1.0:
            self._pressed_at, self._presses = time.monotonic(), self._presses - 1
            os.kill(os.getpid(), signal.SIGINT)
        return super().poll()

    def send_signal(self, number: int) -> None:
        assert number == signal.SIGINT
        if self._saves:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
            self.returncode = 75


def test_ctrl_c_lets_the_runs_save_and_a_second_one_kills_them(
    corpora: Path, tmp_path: Path
) -> None:
    path = write(tmp_path, settings(corpora, arms={"static": {"rates": [0.2]}}, steps=3))
    runs: list[Sleeper] = []

    def start(presses: int, *_: object) -> Sleeper:
        runs.append(Sleeper(presses))
        return runs[-1]

    with pytest.raises(
        Stopped, match=r"^Ctrl-C was received: the runs have saved; the same command resumes"
    ):
        run_warm(path, start=partial(start, 1))
    with pytest.raises(EndedAtOnce, match=r"^ended at once: .* resumes from those$"):
        run_warm(path, start=partial(start, 2))
    assert [run.wait() for run in runs] == [75, -signal.SIGKILL]
    assert not SweepDirectory(tmp_path / "out").outcomes()
