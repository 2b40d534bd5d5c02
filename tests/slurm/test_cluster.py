"""The cluster of these tests behaves as expected: small jobs show what real ones rely on."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path
from shlex import quote

import pytest
from cluster import Cluster
from daemons import NODE_CPUS
from data_support import start_python, wait_until

WAIT = "while :; do sleep 0.05; done"


@pytest.fixture(scope="module", autouse=True)
def out_of_time(cluster: Cluster) -> str:
    """A job with a limit of a minute. Submitted first: Slurm checks limits every 30 seconds."""
    task = f"trap 'echo task $SLURM_PROCID is told; exit 3' USR1; {WAIT}"
    script = f"trap 'echo the script is told' USR1; srun bash -c {quote(task)}; echo rc $?"
    options = ("--time=1", "--signal=USR1@60", "--ntasks=2", "--nodelist=n1")
    return cluster.submit(script, *options)


def processes_with(word: str) -> list[str]:
    """Return the command lines of this machine's processes that contain a word."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if word in line:
            found.append(line)
    return found


def test_nodes_have_their_own_names_and_find_each_other(cluster: Cluster) -> None:
    look = "echo $(hostname) $SLURM_NODEID/$SLURM_NNODES $(getent hosts n1 n2)"
    job = cluster.submit(f"srun --label bash -c '{look}'", "--nodes=2", "--ntasks-per-node=1")
    cluster.wait_for(job, "COMPLETED")
    assert sorted(cluster.log_of(job).splitlines()) == [
        "0: n1 0/2 127.0.0.1 n1 127.0.0.1 n2",
        "1: n2 1/2 127.0.0.1 n1 127.0.0.1 n2",
    ]


def test_a_node_claims_more_than_the_machine_has(cluster: Cluster) -> None:
    script = "srun --label bash -c 'echo $SLURM_LOCALID $SLURM_CPUS_PER_TASK $CUDA_VISIBLE_DEVICES'"
    options = ("--nodes=2", "--ntasks-per-node=2", f"--cpus-per-task={NODE_CPUS // 4}")
    job = cluster.submit(script, *options, "--gpus-per-node=2", "--mem=32G")
    cluster.wait_for(job, "COMPLETED")
    assert sorted(cluster.log_of(job).splitlines()) == [
        f"{rank}: {rank % 2} {NODE_CPUS // 4} 0,1" for rank in range(4)
    ]


def test_what_a_job_asks_too_much_of_is_refused(cluster: Cluster) -> None:
    with pytest.raises(AssertionError, match="Requested node configuration is not available"):
        cluster.submit("true", "--gpus-per-node=3")


def test_processes_of_several_nodes_meet(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "meet.py").write_text(
        "import os, torch, torch.distributed as dist\n"
        "os.environ['RANK'] = os.environ['SLURM_PROCID']\n"
        "os.environ['WORLD_SIZE'] = os.environ['SLURM_NTASKS']\n"
        "dist.init_process_group('gloo')\n"
        "total = torch.tensor(dist.get_rank() + 1)\n"
        "dist.all_reduce(total)\n"
        "print('total', total.item(), flush=True)\n"
        "dist.destroy_process_group()\n"
    )
    script = (
        'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\n'
        "export MASTER_PORT=$((10000 + SLURM_JOB_ID % 50000)) OMP_NUM_THREADS=1\n"
        f"srun {sys.executable} meet.py"
    )
    job = cluster.submit(script, "--nodes=2", "--ntasks-per-node=1", folder=tmp_path)
    cluster.wait_for(job, "COMPLETED")
    assert cluster.log_of(job).count("total 3") == 2


def test_a_requeued_job_starts_again(cluster: Cluster) -> None:
    script = f"echo start ${{SLURM_RESTART_COUNT:-0}}; (( SLURM_RESTART_COUNT )) || {WAIT}"
    job = cluster.submit(script, "--open-mode=append")
    cluster.wait_for_log(job, "start 0")
    cluster.run("scontrol", "requeue", job)
    cluster.hurry(job)
    assert cluster.wait_for(job, "COMPLETED")["Restarts"] == "1"
    assert cluster.log_of(job).splitlines()[-1] == "start 1"


@pytest.mark.parametrize(
    ("option", "told"), [("--signal=USR1", "task"), ("--batch", "script"), ("--full", "both")]
)
def test_scancel_signals_whom_it_is_asked_to(cluster: Cluster, option: str, told: str) -> None:
    task = f"trap 'echo told task; exit' USR1; echo ready; {WAIT}"
    script = f"trap 'echo told script' USR1; srun bash -c {quote(task)} & wait; wait"
    job = cluster.submit(script)
    cluster.wait_for_log(job, "ready")
    cluster.run("scancel", "--signal=USR1", option, job)
    for each in ("task", "script") if told == "both" else (told,):
        cluster.wait_for_log(job, f"told {each}")
    assert told == "both" or cluster.log_of(job).count("told") == 1
    cluster.run("scancel", job)


@pytest.mark.slow
def test_a_crashed_node_is_noticed_and_its_job_goes_elsewhere(cluster: Cluster) -> None:
    own_session = f": {cluster.folder}; sleep 1000; :"
    script = (
        "echo start ${SLURM_RESTART_COUNT:-0} on $(hostname)\n"
        f"(( SLURM_RESTART_COUNT )) || {{ setsid sh -c {quote(own_session)} & {WAIT}; }}"
    )
    job = cluster.submit(script, "--nodelist=n2", "--open-mode=append")
    cluster.wait_for_log(job, "start 0 on n2")
    wait_until(lambda: bool(processes_with(own_session)))
    cluster.kill_node("n2")
    assert not processes_with(own_session)
    try:
        cluster.wait_for_node("n2", "down*")
        cluster.wait_for(job, "PENDING")
        cluster.run("scontrol", "update", f"JobId={job}", "ReqNodeList=n1")
        cluster.wait_for(job, "COMPLETED")
    finally:
        cluster.start_node("n2")
    assert cluster.log_of(job).splitlines()[-1] == "start 1 on n1"


def test_the_time_limit_is_announced_to_the_tasks(cluster: Cluster, out_of_time: str) -> None:
    cluster.wait_for(out_of_time, "COMPLETED")
    lines = cluster.log_of(out_of_time).splitlines()
    assert {"task 0 is told", "task 1 is told", "rc 3"} <= set(lines)
    assert "the script is told" not in lines


def test_a_node_set_down_loses_its_jobs(cluster: Cluster) -> None:
    job = cluster.submit(f"(( SLURM_RESTART_COUNT )) || {WAIT}", "--nodelist=n2")
    cluster.wait_for(job, "RUNNING")
    cluster.down("n2")
    assert cluster.wait_for(job, "PENDING")["Restarts"] == "1"
    assert cluster.node_state("n2") == "down"
    cluster.up("n2")
    cluster.hurry(job)
    cluster.wait_for(job, "COMPLETED")


HOLD_A_CLUSTER = """
import sys, time
from pathlib import Path
from cluster import start_cluster
with start_cluster(Path(sys.argv[1]), nodes=("n1",)) as cluster:
    job = cluster.submit("echo up; sleep 1000")
    cluster.wait_for_log(job, "up")
    print("up", flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_clusters_stand_side_by_side_and_die_with_who_started_them(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    with tempfile.TemporaryDirectory() as short:
        monkeypatch.setenv("TMPDIR", short)
        process = start_python(HOLD_A_CLUSTER, tmp_path)
        assert process.stdout.readline() == "up\n", process.communicate()
        assert processes_with(str(tmp_path))
        process.send_signal(sent)
        process.communicate()
        wait_until(lambda: not processes_with(str(tmp_path)))
    job = cluster.submit("true")
    cluster.wait_for(job, "COMPLETED")
