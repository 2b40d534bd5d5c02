"""What happens to a job after each of its starts: the decision, and the loop on a real Slurm.

The programs of these jobs are a few lines of bash instead of `megaphase train`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from shlex import quote

import pytest
from cluster import Cluster
from data_support import wait_until
from run_support import run_settings, write_run_file

from megaphase.launch.slurm.requeue import (
    RestartHistory,
    decide,
    newest_step,
    read_restart_history,
    write_restart_history,
)
from megaphase.launch.slurm.script import template

OPTIONS = ("--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0")


def after(steps: list[int], restarts: int = 2, code: int = 1) -> list[bool]:
    """Return whether the job is requeued after each start, given the newest checkpoints."""
    chain, again = RestartHistory("7"), []
    for step in steps:
        chain = chain.after_start(step)
        again.append(decide(chain, code, restarts).again)
    return again


@pytest.mark.parametrize("code", [1, 75, 137])
def test_a_chain_ends_after_so_many_starts_in_a_row_without_progress(code: int) -> None:
    assert after([0, 0, 0], code=code) == [True, True, False]
    assert after([4, 4, 4, 4], code=code) == [True, True, True, False]
    assert after([4, 4, 4, 8, 8, 8, 8], code=code) == [True] * 6 + [False]
    assert after([0], restarts=0, code=code) == [False]


def test_a_checkpoint_that_is_gone_is_no_progress_when_it_comes_back() -> None:
    assert after([8, 4, 8]) == [True, True, True]
    assert after([8, 4, 8, 8]) == [True, True, True, False]


def test_what_is_done_or_wrong_is_not_queued_again() -> None:
    chain = RestartHistory("7", step=4)
    done, wrong = decide(chain, 0, 3), decide(chain, 2, 3)
    assert (done.again, done.exit_code) == (False, 0)
    assert (wrong.again, wrong.exit_code) == (False, 2)
    assert wrong.sentence == "the input is wrong, see above; not requeued"


def test_a_run_that_end_after_has_ended_is_not_done() -> None:
    ended = decide(RestartHistory("7", step=4_000), 0, 3, end_after=4_000)
    assert (ended.again, ended.exit_code) == (False, 0)
    assert ended.sentence == "checkpoint.end_after: 4,000 has ended the run; it can be resumed"


def test_a_run_that_has_diverged_is_not_queued_again() -> None:
    chain = RestartHistory("7", step=4)
    diverged = decide(chain, 1, 3, diverged=True)
    assert (diverged.again, diverged.exit_code) == (False, 1)
    assert diverged.sentence == "the run has diverged, see above; not requeued"
    # It was stopped, or killed, before it could report it again.
    assert decide(chain, 75, 3, diverged=True).again
    assert decide(chain, 137, 3, diverged=True).again


def test_what_is_said() -> None:
    stopped = decide(RestartHistory("7", step=12_000), 75, 3)
    assert stopped.sentence == (
        "stopped by a signal; the newest checkpoint is that of step 12,000; requeued"
    )
    stuck = decide(RestartHistory("7", step=12_000, without_progress=4), 137, 3)
    assert stuck.sentence == (
        "failed with exit code 137; the newest checkpoint is that of step 12,000, and 4 starts in "
        "a row produced no newer one; not requeued"
    )
    assert (stuck.again, stuck.exit_code) == (False, 1)


def test_a_chain_is_remembered_and_another_job_begins_anew(tmp_path: Path) -> None:
    assert read_restart_history(tmp_path, "7", 0) == RestartHistory("7")
    write_restart_history(tmp_path, RestartHistory("7", step=8, without_progress=2))
    assert read_restart_history(tmp_path, "7", 4) == RestartHistory("7", 8, without_progress=2)
    assert read_restart_history(tmp_path, "9", 8) == RestartHistory("9", step=8)
    assert read_restart_history(tmp_path, "9", 12) == RestartHistory("9", step=8)


def test_a_job_after_a_roll_back_makes_progress_below_the_removed_checkpoints(
    tmp_path: Path,
) -> None:
    write_restart_history(tmp_path, RestartHistory("7", step=80))
    for step in (50, 52, 54, 56, 58):
        chain = read_restart_history(tmp_path, "9", step).after_start(step)
        write_restart_history(tmp_path, chain)
        assert decide(chain, 1, 1).again
    assert chain == RestartHistory("9", step=58)


def test_the_newest_checkpoint_is_a_whole_one(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == 0
    for name in ("step-00000008", "step-00000012", ".step-00000016.partial", "latest", "pretrain"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(tmp_path) == 12


class StubJob:
    """The real batch script, with bash instead of the training and the node check."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        train: str,
        check: str = 'echo "$SLURMD_NODENAME"',
        **settings: str,
    ) -> None:
        self.cluster = cluster
        run_file = write_run_file(folder, run_settings(folder / "no corpora"))
        stub = folder / "stub"
        stub.write_text(
            f'#!/bin/bash\n[ "$1" = launch ] && {{ {check}; exit; }}\n'
            f"[ $1 = train ] && : ${{SLURM_RESTART_COUNT:=0}}\n{train}\n"
        )
        stub.chmod(0o755)
        values = {
            "megaphase": f"({quote(str(stub))})",
            "outside": f"({sys.executable} -m megaphase)",
            "patience": "2",
            **settings,
        }
        script = template()
        for name, value in values.items():
            script, found = re.subn(rf"(?m)^{name}=.*$", f"{name}={value}", script)
            assert found == 1
        path = folder / "train.sbatch"
        path.write_text(script)
        command = ("sbatch", "--parsable", *OPTIONS, path, run_file)
        self.job = cluster.run(*command, folder=folder).strip()

    def words(self) -> list[str]:
        """Return the messages about its starts."""
        log = self.cluster.log_of(self.job)
        start = f"megaphase: job {self.job}: "
        return [line.removeprefix(start) for line in log.splitlines() if line.startswith(start)]


@pytest.mark.slow
def test_a_job_that_does_not_come_further_gives_up(cluster: Cluster, tmp_path: Path) -> None:
    train = 'echo "attempt $SLURM_RESTART_COUNT of $RANK on $SLURMD_NODENAME"; exit 9'
    # The first one to end must not end the other before that one has reported.
    stub = StubJob(cluster, tmp_path / "a run", train, restarts="1", patience="60")
    cluster.hurry(stub.job)
    fields = cluster.wait_for(stub.job, "FAILED")
    assert (fields["Restarts"], fields["ExitCode"]) == ("1", "1:0")
    nothing = "failed with exit code 9; the newest checkpoint is that of step 0"
    assert stub.words() == [
        f"{nothing}; requeued",
        f"{nothing}, and 2 starts in a row produced no newer one; not requeued",
    ]
    # Only messages of the second start's processes, and none of the first.
    log = cluster.log_of(stub.job)
    assert log.count("attempt 0") == log.count("attempt 1") == 2
    second = log.partition("start 2 of job")[2]
    assert sorted(line for line in second.splitlines() if "attempt" in line) == [
        f"n1: attempt 1 of {rank} on n1" for rank in range(2)
    ]


def test_a_check_of_which_no_node_says_anything_blames_none(
    cluster: Cluster, tmp_path: Path
) -> None:
    check = 'echo "cannot start" >&2; exit 1'
    stub = StubJob(cluster, tmp_path, "exit 0", check, restarts="0", exclude_bad_nodes="yes")
    cluster.wait_for(stub.job, "FAILED")
    assert stub.words() == [
        "failed with exit code 1; the newest checkpoint is that of step 0, and 1 start in a row "
        "produced no newer one; not requeued"
    ]
    assert cluster.job(stub.job)["ExcNodeList"] == "(null)"


def test_wrong_input_ends_a_job_at_once(cluster: Cluster, tmp_path: Path) -> None:
    train = 'echo "megaphase: run.yaml: model.layers: is wrong" >&2; exit 2'
    stub = StubJob(cluster, tmp_path, train)
    fields = cluster.wait_for(stub.job, "FAILED")
    assert (fields["Restarts"], fields["ExitCode"]) == ("0", "2:0")
    assert stub.words() == ["the input is wrong, see above; not requeued"]
    assert cluster.log_of(stub.job).splitlines()[-2] == (
        "n1: megaphase: run.yaml: model.layers: is wrong"
    )


def test_a_job_that_is_cancelled_stays_so(cluster: Cluster, tmp_path: Path) -> None:
    train = "trap 'exit 75' TERM; touch here; while :; do sleep 0.1; done"
    stub = StubJob(cluster, tmp_path, train)
    cluster.wait_for_log(stub.job, "start 1")
    wait_until((tmp_path / "here").exists)
    cluster.run("scancel", stub.job)
    assert cluster.wait_for(stub.job, "CANCELLED")["Restarts"] == "0"
    cluster.wait_for_all()
    assert cluster.state(stub.job) == "CANCELLED"
    assert stub.words() == []


def test_a_process_that_never_ends_is_ended(cluster: Cluster, tmp_path: Path) -> None:
    train = 'if ((RANK)); then sleep 600; fi; echo "megaphase: rank 1 on n1 is frozen"; exit 1'
    stub = StubJob(cluster, tmp_path, train, restarts="0")
    cluster.wait_for(stub.job, "FAILED")
    last = cluster.log_of(stub.job).splitlines()[-2:]
    assert last[0] == "n1: megaphase: rank 1 on n1 is frozen"
    assert last[1].endswith("1 start in a row produced no newer one; not requeued")
