"""Cases of the rehearsal: run files for the fake GPU, and their reports."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from megaphase.rehearsal.fake_device import missing_for_rehearsal

VOCAB, PROCESSES, LAYERS = 50_304, 16, 3
ALL_ACTIONS = ("train", "evaluate", "save", "load", "reset")

needs_compiler = pytest.mark.skipif(
    missing_for_rehearsal() is not None, reason=f"needs {missing_for_rehearsal()}"
)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs the package triton"
)


def run_file(
    *,
    micro: int = 4,
    micro_batches: int = 2,
    documents: bool = False,
    processes: int = PROCESSES,
    precision: str = "bf16",
    kernels: str = "compile",
    optimizer: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    average: dict[str, Any] | None = None,
    faults: dict[str, Any] | None = None,
    **parallel: Any,
) -> dict[str, Any]:
    """A run of three blocks of the 1.3 billion parameters' shape."""
    data = processes // parallel.get("tensor", 1)
    sizes = {"preset": "gpt-1.3b", "layers": LAYERS, "seq_len": 2048, "vocab": VOCAB}
    task = {"attend_across_documents": not documents}
    return {
        "seed": 1,
        "output": "run",
        "tokenizer": "tok",
        "tasks": {name: {"corpus": name, **task} for name in ("big", "small")},
        "model": sizes | (model or {}),
        "parallel": parallel,
        "precision": precision,
        "parts": {"kernels": kernels},
        "batch": {"samples": micro * micro_batches * data, "micro": micro},
        "optimizer": optimizer or {},
        "faults": faults or {},
        "phases": [
            {
                "name": "only",
                "steps": 1,
                "mixture": {"rates": {"big": 1.0}},
                "learning_rate": {"peak": 1e-3},
                **({"average": average} if average else {}),
            }
        ],
    }


def rehearse(
    run: dict[str, Any],
    *,
    processes: int = PROCESSES,
    rank: int = 0,
    actions: tuple[str, ...] = ("train",),
) -> dict[str, Any]:
    """The answer of `megaphase.rehearsal.process` to a case."""
    case = {"run": run, "vocab": VOCAB, "processes": processes, "rank": rank, "actions": actions}
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(f"{json.dumps(case)}\n")
    server.stdin.flush()
    answer: dict[str, Any] = json.loads(server.stdout.readline())
    assert "error" not in answer, answer["traceback"]
    return answer


@functools.cache
def _server() -> subprocess.Popen[str]:
    """One process imports torch and DeepSpeed for all cases."""
    command = [sys.executable, "-W", "ignore", "-m", "megaphase.rehearsal.process"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.kill)
    return server


def waits(report: dict[str, Any]) -> Counter[str]:
    """Waits of the host by their file in the package or in DeepSpeed, without lines."""
    found: Counter[str] = Counter()
    for wait in report["waits"]:
        innermost = wait["place"].split(" < ")[0].rpartition(":")[0]
        found[f"{wait['kind']}, {innermost}"] += wait["count"]
    return found


def sent(report: dict[str, Any], group: str) -> float:
    """Bytes that the rank sends to a group."""
    found = (each for each in report["collectives"] if each["group"] == group)
    return sum(each["sent"] * each["count"] for each in found)
