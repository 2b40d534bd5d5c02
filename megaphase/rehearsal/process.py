"""`python -m megaphase.rehearsal.process`: rehearses the cases that are written to its input.

Each line is a case, as JSON: {"run": the run file, "path": its file, for messages, "vocab",
"processes", "rank", "actions": names of Rank's methods}. For each, a line comes back: {"reports":
one for each action, "estimates", "applied", "optimizer_steps"}, {"wrong_input": the fields of an
InputError} or {"error": the last line of a traceback, "traceback"}. A case runs in a fork of this
process, because it changes torch and DeepSpeed.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from megaphase.rehearsal.fake_device import install_fake_device
from megaphase.utils.errors import InputError
from megaphase.utils.process_lifetime import end_with_parent, ends_with_this_process

ACTIONS = ("train", "evaluate", "save", "load", "reset")


def main() -> None:
    end_with_parent()
    install_fake_device()
    # Slow, and the same for all cases.
    import megaphase.rehearsal.rank  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    for line in sys.stdin:
        answers.write(f"{_in_a_fork(json.loads(line))}\n")
        answers.flush()


def _in_a_fork(case: dict[str, Any]) -> str:
    read, write = os.pipe()
    os.environ |= ends_with_this_process()
    child = os.fork()
    if child == 0:
        end_with_parent()
        os.close(read)
        with os.fdopen(write, "w") as out:
            try:
                answer = _rehearse(case)
            except InputError as error:
                answer = {"wrong_input": [error.where, error.problem, error.remedy]}
            except Exception as error:
                text = traceback.format_exception_only(error)[-1].strip()
                answer = {"error": text, "traceback": traceback.format_exc()}
            out.write(json.dumps(answer))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer_pipe:
        text = answer_pipe.read()
    os.waitpid(child, 0)
    return text or json.dumps({"error": "the process was killed", "traceback": ""})


def _rehearse(case: dict[str, Any]) -> dict[str, Any]:
    from megaphase.config.run import RunConfig
    from megaphase.rehearsal.rank import Rank

    os.environ.update(
        WORLD_SIZE=str(case["processes"]), RANK=str(case["rank"]), LOCAL_RANK="0",
        MASTER_ADDR="localhost", MASTER_PORT="1",
    )  # fmt: skip
    config = RunConfig.model_validate(case["run"])
    config._path = Path(case.get("path", config._path))
    rank = Rank(config, case["vocab"], case["processes"], case["rank"])
    reports, applied = {}, True
    for action in case["actions"]:
        result = getattr(rank, action)()
        if action == "train":
            applied = applied and result
        reports[action] = rank.report()
    return {
        "reports": reports,
        "estimates": rank.estimates(),
        "applied": applied,
        "optimizer_steps": rank.optimizer_steps(),
        "blocks": rank.shape.layers,
    }


if __name__ == "__main__":
    main()
