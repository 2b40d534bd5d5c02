"""Seconds that the host needs for an operator of a training step, and for a compiled formula.

With real tensors on the CPU, so small that computing them costs nothing; what a GPU adds is the
launch. Prints one JSON object, in seconds, for step_simulation.py.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from gpu_parts.setups import TINY, Case, with_engine
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megaphase.ops.kernels import Kernels

ROUNDS, REPEATS = 40, 50
LAYERS = 8


class Counter(TorchDispatchMode):
    """Counts the operators that are not views."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        is_view = any(each.alias_info is not None for each in func._schema.returns)
        self.number += not (is_view and not func._schema.is_mutable)
        return func(*args, **(kwargs or {}))


def best(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Seconds of one call in the quickest of many rounds: other processes only add to it."""
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        times.append((time.perf_counter() - began) / repeats)
    return min(times)


def gate(x: Tensor) -> Tensor:
    return torch.nn.functional.silu(x) * x


def operator_seconds() -> float:
    """Of all that an engine's step does in Python and C++, divided among its operators."""
    case = Case({**TINY, "layers": LAYERS}, seq_len=16, vocab=64, micro=1, accumulation=4)
    sections = {"parts": {"kernels": "eager"}, "": {"precision": "fp32"}}
    case, batch = case.with_changes(**sections), case.batch()

    def measure(engine: object) -> float:
        def step() -> None:
            engine.train_step(batch, 1e-3, 1)  # type: ignore[attr-defined]

        step()
        seconds = best(step, repeats=1)
        with Counter() as counter:
            step()
        return seconds / counter.number

    return with_engine(case, measure)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    operator = operator_seconds()
    compiled, small = Kernels(compiled=True).of(gate), torch.ones(8, 8)
    compiled(small)
    found = {"operator": operator, "formula": best(lambda: compiled(small))}
    print(json.dumps({name: round(seconds, 8) for name, seconds in found.items()}))


if __name__ == "__main__":
    main()
