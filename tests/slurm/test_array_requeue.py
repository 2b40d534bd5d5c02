"""A task of an array that queues itself again leaves the others alone, on a real Slurm."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cluster import Cluster

# The second task, whose job id is that of the array, queues itself again while the first one has
# ended and the third one runs.
QUEUE_AGAIN = """
echo "start ${SLURM_RESTART_COUNT:-0}"
case $SLURM_ARRAY_TASK_ID in
1) sleep 2;;
2) [ -n "${SLURM_RESTART_COUNT:-}" ] || exec %s -c '
from megaphase.launch.slurm.requeue import queue_again
from megaphase.utils.slurm import own_job
print(own_job(), flush=True)
queue_again(own_job(), "%s")';;
esac
"""


@pytest.mark.parametrize("leave_out", ["", "n2"])
def test_the_other_tasks_are_left_alone(cluster: Cluster, leave_out: str, tmp_path: Path) -> None:
    script = QUEUE_AGAIN % (sys.executable, leave_out)
    options = ["--array=0-2", "--requeue", "--open-mode=append", "--output=array-%a.log"]
    array = cluster.submit(script, *options, "--nodelist=n1", folder=tmp_path)
    cluster.wait_for(f"{array}_2", "PENDING")
    assert cluster.job(f"{array}_2")["JobId"] == array
    cluster.hurry(f"{array}_2")
    cluster.wait_for(f"{array}_2", "COMPLETED")
    cluster.wait_for(f"{array}_1", "COMPLETED")
    tasks = [cluster.job(f"{array}_{task}") for task in range(3)]
    assert [task["Restarts"] for task in tasks] == ["0", "0", "1"]
    assert [task["ExcNodeList"] for task in tasks] == ["(null)", "(null)", leave_out or "(null)"]
    logs = [(tmp_path / f"array-{task}.log").read_text() for task in range(3)]
    assert logs[:2] == ["start 0\n"] * 2
    assert f"start 0\n{array}_2\n" in logs[2]
    assert logs[2].endswith("start 1\n")
