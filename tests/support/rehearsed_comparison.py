"""`python -m rehearsed_comparison`: one comparison of parameters' copies on the fake GPU.

Reads as JSON {"run": a run file, "vocab", "processes"}; writes {"waits", "collectives"} of the
first rank, see `Rank.report`.
"""

from __future__ import annotations

import json
import os
import sys

from megaphase.rehearsal.fake_device import install_fake_device


def main() -> None:
    """Read a case from standard input; write the answer to standard output."""
    case = json.loads(sys.stdin.read())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    install_fake_device()
    os.environ.update(
        WORLD_SIZE=str(case["processes"]), RANK="0", LOCAL_RANK="0",
        MASTER_ADDR="localhost", MASTER_PORT="1",
    )  # fmt: skip
    from megaphase.config.run import RunConfig
    from megaphase.distributed.control_group import ControlGroup
    from megaphase.rehearsal.rank import Rank
    from megaphase.training.replica_check import ReplicaCheck

    config = RunConfig.model_validate(case["run"])
    rank = Rank(config, case["vocab"], case["processes"], 0)
    with rank.gpu:
        replicas = ReplicaCheck(config, rank.engine.module, rank.grid, ControlGroup())

    def compare() -> None:
        replicas.begin(config.faults.compare_copies_steps)
        replicas.has_found(config.faults.compare_copies_steps)

    rank._recorded(compare)
    report = rank.report()
    json.dump({name: report[name] for name in ("waits", "collectives")}, answers)
    answers.close()


if __name__ == "__main__":
    main()
