"""Compare the memory that `megaphase plan` estimates with the memory that training really takes.

Each case trains a small model in real processes (over gloo, on the CPU) with the run's own engine.
The measure is the largest resident memory of a process over whole optimizer steps, minus its memory
before the engine is built: the kernel counts pages that were written to, and glibc is told to
return freed memory at once, so this is the memory of tensors and buffers. A tiny engine is trained
first, so libraries, threads and process groups do not count.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megaphase.config.run import RunConfig
from megaphase.distributed.all_ranks import process_group
from megaphase.distributed.process_grid import start_process_grid
from megaphase.estimate.memory import MemoryEstimate, estimate
from megaphase.estimate.setup import setup_of
from megaphase.launch.local import free_port, rank_environment
from megaphase.model.presets import build_shape
from megaphase.model.shape import GPTShape
from megaphase.plan.dataset import Batch
from megaphase.training.engine import Engine

# glibc: map every tensor separately, and unmap it when it is freed.
MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}
STEPS = 2
DOCUMENT_TOKENS = 8
RANK_TIMEOUT_SECONDS = 300
TOLERANCE = 0.1

MODELS: dict[str, dict[str, Any]] = {
    "weights": {"seq_len": 64, "layers": 4, "hidden": 384, "heads": 6, "ffn": 1024, "vocab": 8000},
    "activations": {
        "seq_len": 256,
        "layers": 6,
        "hidden": 256,
        "heads": 4,
        "ffn": 704,
        "vocab": 2000,
    },
    "logits": {"seq_len": 256, "layers": 2, "hidden": 128, "heads": 4, "ffn": 384, "vocab": 32000},
    "tiny": {"seq_len": 16, "layers": 1, "hidden": 32, "heads": 4, "ffn": 48, "vocab": 64},
}
MICRO = {"weights": 1, "activations": 8, "logits": 8, "tiny": 1}
GPT2 = {"norm": "layernorm", "activation": "gelu", "position": "learned", "bias": True}


@dataclass(frozen=True)
class Case:
    """One layout of one of the MODELS; a step has `accumulation` micro-batches.

    masked: rows contain documents that are masked from each other.
    """

    model: str
    zero: int
    precision: str
    tensor: int = 1
    data: int = 1
    sequence: bool = False
    accumulation: int = 1
    masked: bool = False
    kernels: str = "eager"
    keep_gathered: float = 0.0
    changes: dict[str, Any] = field(default_factory=dict)
    quick: bool = False

    @property
    def processes(self) -> int:
        return self.tensor * self.data

    @property
    def name(self) -> str:
        """All settings of the case, in one line."""
        words = [f"{self.model}, {self.precision}, tensor {self.tensor} × data {self.data}"]
        words += [f"ZeRO {self.zero}"]
        words += ["sequence"] * self.sequence
        words += ["masked"] * self.masked
        words += ["compiled"] * (self.kernels == "compile")
        words += [f"{self.accumulation} micro-batches"] * (self.accumulation > 1)
        words += [f"keep_gathered {self.keep_gathered}"] * (self.keep_gathered > 0)
        changes = [f"{key} {value}" for key, value in self.changes.items()]
        words += ["GPT-2's layers"] if self.changes == GPT2 else changes
        return ", ".join(words)

    def config(self, model: str) -> RunConfig:
        """Return the run configuration; `model` is the case's own, or the tiny one."""
        micro = MICRO[model]
        changes = self.changes if model == self.model else {}
        mixture = {"rates": {"all": 1.0}}
        parallel = {"tensor": self.tensor, "sequence": self.sequence, "zero": self.zero}
        return RunConfig.model_validate(
            {
                "output": "run",
                "tokenizer": "tok",
                "tasks": {"all": {"corpus": "all", "attend_across_documents": not self.masked}},
                "model": MODELS[model] | changes,
                "parallel": parallel | {"keep_gathered": self.keep_gathered},
                "precision": self.precision,
                "parts": {"kernels": self.kernels},
                "batch": {"samples": micro * self.data * self.accumulation, "micro": micro},
                "phases": [
                    {"name": "one", "steps": 1, "mixture": mixture, "learning_rate": {"peak": 1e-3}}
                ],
            }
        )


CASES = [
    Case("weights", 0, "fp32", quick=True),
    Case("weights", 1, "fp32"),
    Case("weights", 3, "fp32"),
    Case("weights", 0, "bf16"),
    Case("weights", 1, "bf16", accumulation=2),
    Case("weights", 2, "bf16"),
    Case("weights", 3, "bf16"),
    Case("activations", 0, "fp32"),
    Case("activations", 0, "fp32", accumulation=2),
    Case("activations", 0, "bf16"),
    Case("activations", 3, "fp32"),
    Case("activations", 3, "bf16"),
    Case("activations", 3, "fp32", changes={"activation_checkpointing": "full"}),
    Case("activations", 3, "bf16", changes={"activation_checkpointing": "full"}),
    Case("activations", 0, "fp32", changes={"activation_checkpointing": "selective"}),
    Case("activations", 0, "fp32", kernels="compile"),
    Case("logits", 0, "fp32", kernels="compile"),
    Case("activations", 0, "fp32", changes=GPT2),
    Case("activations", 3, "bf16", changes=GPT2),
    Case("activations", 0, "fp32", changes={"kv_heads": 2}),
    Case("activations", 0, "fp32", masked=True),
    Case("activations", 3, "bf16", masked=True, changes={"kv_heads": 2}),
    Case("logits", 0, "fp32"),
    Case("logits", 0, "bf16"),
    Case("logits", 3, "bf16"),
    Case("logits", 3, "fp32", changes={"tied_embeddings": True}),
    Case("weights", 0, "fp32", tensor=2),
    Case("weights", 3, "bf16", tensor=2),
    Case("activations", 0, "fp32", tensor=2),
    Case("activations", 0, "fp32", tensor=2, sequence=True),
    Case("activations", 3, "bf16", tensor=2, sequence=True, quick=True),
    Case(
        "activations",
        3,
        "bf16",
        tensor=2,
        sequence=True,
        changes={"activation_checkpointing": "full"},
    ),
    Case("logits", 3, "bf16", tensor=2),
    Case("weights", 0, "fp32", data=2),
    Case("weights", 1, "fp32", data=2),
    Case("weights", 2, "fp32", data=2, accumulation=2),
    Case("weights", 3, "fp32", data=2),
    Case("weights", 0, "bf16", data=2),
    Case("weights", 1, "bf16", data=2, accumulation=2),
    Case("weights", 2, "bf16", data=2),
    Case("weights", 2, "bf16", data=2, accumulation=2),
    Case("weights", 3, "bf16", data=2, accumulation=2, quick=True),
    Case("activations", 1, "bf16", data=2),
    Case("activations", 2, "fp32", data=2),
    Case("activations", 3, "fp32", data=2),
    Case("activations", 3, "bf16", data=2),
    Case("weights", 3, "fp32", data=2, keep_gathered=0.6),
    Case("weights", 3, "fp32", data=2, keep_gathered=1.0),
    Case("weights", 3, "bf16", data=2, accumulation=2, keep_gathered=0.6),
    Case("weights", 3, "bf16", data=2, accumulation=2, keep_gathered=1.0),
    Case("activations", 3, "fp32", data=2, keep_gathered=1.0),
]


def resident_bytes(field_name: str) -> int:
    """Return a figure of this process in bytes: VmRSS (current) or VmHWM (largest since reset)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field_name:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"the kernel does not tell {field_name}")


def reset_most_resident() -> None:
    """Reset VmHWM to the current resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


def random_batch(case: Case, config: RunConfig, shape: GPTShape) -> Batch:
    """Return a batch of random tokens, on which the memory does not depend."""
    rows = config.phase_batch(0).samples // case.data
    tokens = torch.randint(shape.vocab, (rows, shape.seq_len + 1))
    tasks = torch.zeros(rows, dtype=torch.int64)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if not case.masked:
        return Batch(inputs, targets, tasks)
    documents = (torch.arange(shape.seq_len) // DOCUMENT_TOKENS).expand_as(inputs)
    return Batch(inputs, targets, tasks, documents)


def train(case: Case, model: str) -> int:
    """Return the largest memory that training took on this rank after the first step, in bytes."""
    config = case.config(model)
    shape = build_shape(config, MODELS[model]["vocab"])
    grid = start_process_grid(case.tensor)
    batch = random_batch(case, config, shape)
    before = resident_bytes("VmRSS")
    engine = Engine(config, shape, grid, 1)
    engine.train_step(batch, 1e-3)
    reset_most_resident()
    for _ in range(STEPS):
        engine.train_step(batch, 1e-3)
    return resident_bytes("VmHWM") - before


def serve(number: int) -> None:
    """Run one rank of a case: print the bytes of the rank that needed most."""
    torch.set_num_threads(1)
    with process_group():
        train(CASES[number], "tiny")
        gc.collect()
        found = torch.tensor(train(CASES[number], CASES[number].model))
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        if dist.get_rank() == 0:
            print(int(found))


def measure(number: int) -> int:
    """Return the bytes that a case takes on the rank that needs most, using new processes."""
    port, processes = free_port(), CASES[number].processes
    argv = [sys.executable, __file__, "--serve", str(number)]
    ranks = []
    for rank in range(processes):
        environment = os.environ | MALLOC | rank_environment(rank, processes, port)
        ranks.append(
            subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    try:
        said = [process.communicate(timeout=RANK_TIMEOUT_SECONDS) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, (_, error) in zip(ranks, said, strict=True):
        if process.returncode:
            raise SystemExit(f"{CASES[number].name}: a rank failed\n{error.decode()}")
    return int(said[0][0].split()[-1])


def estimated(case: Case) -> MemoryEstimate:
    """Return the estimate of `megaphase plan` for the CPU."""
    config = case.config(case.model)
    shape = build_shape(config, MODELS[case.model]["vocab"])
    return estimate(setup_of(config, shape, case.processes, "cpu"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="only a few cases")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--json", action="store_true", help="one JSON object per case")
    asked = parser.parse_args()
    if asked.serve is not None:
        serve(asked.serve)
        return 0
    chosen = [
        (i, case)
        for i, case in enumerate(CASES)
        if asked.only in case.name and (case.quick or not asked.quick)
    ]
    if not asked.json:
        print(f"{'case':82}{'estimated':>12}{'measured':>12}{'ratio':>8}  moment")
    worst = 0.0
    for i, case in chosen:
        found, measured = estimated(case), measure(i)
        ratio = found.total / measured
        worst = max(worst, abs(ratio - 1))
        if asked.json:
            row = {"case": case.name, "estimated": found.total, "measured": measured}
            print(json.dumps(row | {"moment": found.moment}), flush=True)
        else:
            sizes = f"{found.total / 1e6:>9,.1f} MB{measured / 1e6:>9,.1f} MB{ratio:>8.3f}"
            print(f"{case.name:82}{sizes}  {found.moment}", flush=True)
    if not asked.json:
        print(f"{len(chosen)} cases, the largest error is {worst:.1%}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
