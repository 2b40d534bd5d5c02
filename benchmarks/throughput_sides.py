"""The sides of train_throughput.py: each runs optimizer steps in separate processes."""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from llama import hugging_face_llama
from moved_away import MovedAway
from torch import nn

from megaphase.config.run import RunConfig
from megaphase.distributed.process_grid import start_process_grid
from megaphase.launch.local import free_port, rank_environment
from megaphase.model.presets import build_shape
from megaphase.model.shape import GPTShape
from megaphase.plan.dataset import Batch
from megaphase.training.engine import Engine
from megaphase.utils.process_lifetime import end_with_parent, ends_with_this_process

LEARNING_RATE = 1e-4
BATCHES = 4  # different batches, used in turn
LEAVE, COME_BACK, ENDED = "leave", "come back", "ended"


@dataclass(frozen=True)
class Settings:
    """The settings of all sides."""

    preset: str
    vocab: int
    seq_len: int
    batch: int
    micro: int
    kv_heads: int | None
    threads: int
    precision: str
    device: str
    checkpointing: str
    layers: int | None = None  # instead of the preset's

    def run_config(self, kernels: str = "eager", **parallel: Any) -> RunConfig:
        """Return the run configuration; parallel: keys of that section, with ZeRO 0 by default."""
        model = {"preset": self.preset, "vocab": self.vocab, "seq_len": self.seq_len}
        model["activation_checkpointing"] = self.checkpointing
        if self.kv_heads:
            model["kv_heads"] = self.kv_heads
        if self.layers:
            model["layers"] = self.layers
        phase = {
            "name": "only",
            "steps": 1,
            "mixture": {"rates": {"text": 1.0}},
            "learning_rate": {"peak": LEARNING_RATE},
        }
        return RunConfig.model_validate(
            {
                "output": "none",
                "tokenizer": "none",
                "tasks": {"text": {"corpus": "none"}},
                "model": model,
                "parallel": {"zero": 0} | parallel,
                "precision": self.precision,
                "parts": {"kernels": kernels},
                "batch": {"samples": self.batch, "micro": self.micro},
                "phases": [phase],
            }
        )

    def shape(self) -> GPTShape:
        return build_shape(self.run_config(), self.vocab)

    def batches(self) -> list[Batch]:
        """Return random tokens, the same on all sides."""
        generator = torch.Generator().manual_seed(0)
        size = (self.batch, self.seq_len + 1)
        rows = [torch.randint(0, self.vocab, size, generator=generator) for _ in range(BATCHES)]
        tasks = torch.zeros(self.batch, dtype=torch.int64)
        return [Batch(r[:, :-1].contiguous(), r[:, 1:].contiguous(), tasks) for r in rows]

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.seq_len


Step = Callable[[Batch], float]


@dataclass(frozen=True)
class MegaphaseEngine:
    """Megaphase's engine, in tensor × data processes, which share the threads."""

    zero: int
    kernels: str
    tensor: int = 1
    data: int = 1
    keep_gathered: float = 0.0

    @property
    def name(self) -> str:
        words = [f"megaphase ZeRO {self.zero}", self.kernels]
        if self.keep_gathered > 0:
            words.append(f"keep_gathered {self.keep_gathered:g}")
        if self.processes > 1:
            words.append(f"tensor {self.tensor} × data {self.data}")
        return ", ".join(words)

    @property
    def processes(self) -> int:
        return self.tensor * self.data

    def step(self, settings: Settings) -> Step:
        """Return a function that runs one optimizer step as `megaphase train` and returns the
        loss."""
        config = settings.run_config(
            self.kernels, zero=self.zero, tensor=self.tensor, keep_gathered=self.keep_gathered
        )
        engine = Engine(config, settings.shape(), start_process_grid(self.tensor), tasks=1)
        share = settings.batch // self.data
        first = engine.grid.data_rank * share

        def step(batch: Batch) -> float:
            return engine.train_step(batch[first : first + share], LEARNING_RATE).losses.mean

        return step


@dataclass(frozen=True)
class LlamaLoop:
    """Hugging Face's Llama in a plain torch loop."""

    compiled: bool

    @property
    def name(self) -> str:
        return "HF Llama, torch.compile" if self.compiled else "HF Llama"

    @property
    def processes(self) -> int:
        return 1

    def step(self, settings: Settings) -> Step:
        """Return the same step as in a plain loop: accumulation, clipping, fused AdamW.

        With bf16 everything is bf16, including weights and optimizer state, which is fastest.
        """
        device = torch.device(settings.device)
        defaults = settings.run_config().optimizer
        model = hugging_face_llama(settings.shape()).to(device, settings.dtype).train()
        if settings.checkpointing == "full":
            model.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=LEARNING_RATE,
            betas=defaults.betas,
            eps=defaults.eps,
            weight_decay=defaults.weight_decay,
            fused=True,
        )
        forward = torch.compile(model) if self.compiled else model

        def step(batch: Batch) -> float:
            total = torch.zeros((), device=device)
            for micro in batch.split(settings.micro):
                logits = forward(micro.inputs.to(device)).logits
                targets = micro.targets.to(device).flatten()
                loss = F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="sum")
                loss = loss / settings.tokens_per_step
                loss.backward()
                total += loss.detach()
            nn.utils.clip_grad_norm_(model.parameters(), defaults.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return float(total)

        return step


def prepare(settings: Settings, processes: int = 1) -> None:
    """Set the threads and the device of the settings."""
    torch.set_num_threads(max(1, settings.threads // processes))
    torch.set_float32_matmul_precision("highest")


def peak_bytes(device: str) -> int:
    """Return the peak memory of this process in bytes: of the GPU or, without one, resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def begin(environment: dict[str, str]) -> None:
    """Prepare a process of the benchmark before anything else; it may end with the benchmark."""
    os.environ.update(environment)
    end_with_parent()


def serve_steps(
    kind: MegaphaseEngine | LlamaLoop,
    settings: Settings,
    environment: dict[str, str],
    orders: Connection,
) -> None:
    """Run one of a side's processes: for each requested number of steps, send seconds and
    memory; for LEAVE and COME_BACK, move its tensors out of the GPU's memory and back."""
    begin(environment)
    prepare(settings, kind.processes)
    step, batches, taken = kind.step(settings), settings.batches(), 0
    moved = MovedAway()
    while (steps := receive(orders)) != ENDED:
        if steps in (LEAVE, COME_BACK):
            orders.send(moved.leave() if steps == LEAVE else moved.come_back())
            continue
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            step(batches[taken % BATCHES])  # the loss it returns has waited for the device
            seconds.append(time.perf_counter() - began)
            taken += 1
        orders.send((seconds, peak_bytes(settings.device)))


def receive(connection: Connection) -> Any:
    """Return the next message; ENDED once the other end is closed."""
    try:
        return connection.recv()
    except EOFError:
        return ENDED


class Side:
    """A running side of the comparison."""

    def __init__(self, kind: MegaphaseEngine | LlamaLoop, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self.name, self.peak_bytes = kind.name, 0
        self._orders, self._processes = [], []
        port = free_port()
        for rank in range(kind.processes):
            own_end, worker_end = context.Pipe()
            environment = rank_environment(rank, kind.processes, port) | ends_with_this_process()
            process = context.Process(
                target=serve_steps, args=(kind, settings, environment, worker_end), daemon=True
            )
            process.start()
            worker_end.close()
            self._orders.append(own_end)
            self._processes.append(process)

    def take_steps(self, steps: int) -> list[float]:
        """Return the seconds of each of `steps` optimizer steps."""
        answers = self._answers(steps)
        self.peak_bytes = max(peak for _, peak in answers)
        return [max(times) for times in zip(*(seconds for seconds, _ in answers), strict=True)]

    def leave(self) -> None:
        """Move its tensors out of the GPU's memory; no steps until it has come back."""
        self._answers(LEAVE)

    def come_back(self) -> None:
        self._answers(COME_BACK)

    def _answers(self, order: int | str) -> list[Any]:
        """What its processes answer."""
        for orders in self._orders:
            orders.send(order)
        answers = [receive(orders) for orders in self._orders]
        if ENDED in answers:
            raise SystemExit(f"{self.name}: its process failed; see above")
        return answers

    def stop(self) -> None:
        for orders in self._orders:
            orders.close()
        for process in self._processes:
            process.join()

    def kill(self) -> None:
        """Kill its processes at once, even during a step."""
        for process in self._processes:
            process.kill()
