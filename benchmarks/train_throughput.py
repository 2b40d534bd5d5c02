"""Training throughput of megaphase's engine beside Hugging Face's Llama in a plain torch loop.

Same shape, same weights' types, same batch, same threads, in one run. Every side lives in a process
of its own; the sides take turns, a few steps each, so that a change of the machine's speed meets
all of them. Before that, one process checks that both models have as many parameters and give the
same loss for the same weights.

    python benchmarks/train_throughput.py --preset gpt-3m --threads 2

Prints tokens/s of each side, the floor that arithmetic and memory set on this machine, and last the
ratios. Exit code 2 where transformers is missing. The allocator is left as it is for all sides; to
see what page faults cost them, run it with MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ set to
1073741824 (glibc then keeps freed memory).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from llama import hugging_face_llama, llama_weights
from machine import Machine, measure_machine
from torch import nn

from megaphase.config import RunConfig
from megaphase.errors import EXIT_WRONG_INPUT, InputError
from megaphase.model.gpt import GPT
from megaphase.model.presets import PRESETS, build_shape
from megaphase.model.shape import GPTShape
from megaphase.parallel.rng import Initializer
from megaphase.parallel.topology import start
from megaphase.plan.dataset import Batch
from megaphase.training.engine import Engine

LEARNING_RATE = 1e-4
BATCHES = 4  # different ones, used in turn
LARGEST_LOSS_DIFFERENCE = 1e-4  # nats, fp32
SIDES = {"megaphase ZeRO 0": 0, "megaphase ZeRO 3": 3}
PEER = "HF Llama"

# Bytes of an fp32 AdamW step a parameter: the norm reads the gradient; the update reads parameter,
# gradient and two moments, and writes parameter and moments.
OPTIMIZER_BYTES = 4 + 16 + 12


@dataclass(frozen=True)
class Settings:
    """What both sides are told."""

    preset: str
    vocab: int
    seq_len: int
    batch: int
    micro: int
    kv_heads: int | None
    threads: int
    precision: str
    device: str

    def run_config(self, zero: int) -> RunConfig:
        """The run file that this benchmark stands for."""
        model = {"preset": self.preset, "vocab": self.vocab, "seq_len": self.seq_len}
        if self.kv_heads:
            model["kv_heads"] = self.kv_heads
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
                "parallel": {"zero": zero},
                "precision": self.precision,
                "batch": {"samples": self.batch, "micro": self.micro},
                "phases": [phase],
            }
        )

    def shape(self) -> GPTShape:
        return build_shape(self.run_config(0), self.vocab)

    def batches(self) -> list[Batch]:
        """Random tokens, the same on all sides."""
        generator = torch.Generator().manual_seed(0)
        size = (self.batch, self.seq_len + 1)
        rows = [torch.randint(0, self.vocab, size, generator=generator) for _ in range(BATCHES)]
        tasks = torch.zeros(self.batch, dtype=torch.int64)
        return [Batch(r[:, :-1].contiguous(), r[:, 1:].contiguous(), tasks) for r in rows]

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.seq_len


Step = Callable[[Batch], float]


def our_step(settings: Settings, zero: int) -> Step:
    """One optimizer step of the engine, as `megaphase train` takes it; returns the loss."""
    engine = Engine(settings.run_config(zero), settings.shape(), start(1), tasks=1)
    return lambda batch: engine.train_step(batch, LEARNING_RATE).losses.mean


def peer_step(settings: Settings) -> Step:
    """The same step as a plain torch loop writes it: accumulation, clipping, fused AdamW."""
    device = torch.device(settings.device)
    defaults = settings.run_config(0).optimizer
    model = hugging_face_llama(settings.shape()).to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=LEARNING_RATE,
        betas=defaults.betas,
        eps=defaults.eps,
        weight_decay=defaults.weight_decay,
        fused=True,
    )
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")

    def step(batch: Batch) -> float:
        total = torch.zeros((), device=device)
        for micro in batch.split(settings.micro):
            with bf16:
                logits = model(micro.inputs.to(device)).logits
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


def serve_steps(name: str, settings: Settings, orders: Connection) -> None:
    """A side's process: for every number of steps that comes in, their seconds go out."""
    prepare(settings)
    step = our_step(settings, SIDES[name]) if name in SIDES else peer_step(settings)
    batches = settings.batches()
    taken = 0
    while (steps := receive(orders)) is not None:
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            step(batches[taken % BATCHES])  # the loss it returns has waited for the device
            seconds.append(time.perf_counter() - began)
            taken += 1
        orders.send(seconds)


def receive(connection: Connection) -> Any:
    """The next message; None once the other end is closed or gone."""
    try:
        return connection.recv()
    except EOFError:
        return None


def prepare(settings: Settings) -> None:
    """The threads and the device that the settings ask for."""
    torch.set_num_threads(settings.threads)
    torch.set_float32_matmul_precision("highest")


class Side:
    """One side of the comparison in its own process."""

    def __init__(self, name: str, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._orders, theirs = context.Pipe()
        self._process = context.Process(
            target=serve_steps, args=(name, settings, theirs), daemon=True
        )
        self._process.start()
        theirs.close()

    def take_steps(self, steps: int) -> list[float]:
        """Seconds of each of `steps` optimizer steps."""
        self._orders.send(steps)
        seconds = receive(self._orders)
        if seconds is None:
            raise SystemExit(f"{self.name}: its process failed; see above")
        return seconds

    def stop(self) -> None:
        self._orders.close()
        self._process.join()


def check_same_model(settings: Settings) -> tuple[int, float]:
    """Parameters of the model, and the largest difference of a token's loss between the two.

    Raises:
        SystemExit: they are not the same model, so that the comparison would mean nothing.
    """
    prepare(settings)
    # Larger weights than those that training starts from: with them every loss is near log(vocab).
    shape = dataclasses.replace(settings.shape(), init_std=0.05)
    device = torch.device(settings.device)
    ours = GPT(shape, Initializer(1, torch.float32), start(1)).to(device)
    peer = hugging_face_llama(shape).to(device)
    counts = [sum(p.numel() for p in model.parameters()) for model in (ours, peer)]
    if counts[0] != counts[1]:
        raise SystemExit(f"not the same model: {counts[0]:,} and {counts[1]:,} parameters")
    peer.load_state_dict(llama_weights(ours, shape))
    batch = settings.batches()[0]
    inputs, targets = batch.inputs[:2].to(device), batch.targets[:2].to(device)
    with torch.no_grad():
        our_losses = ours(inputs, targets)
        peer_logits = peer(inputs).logits
    peer_losses = F.cross_entropy(peer_logits.flatten(0, 1), targets.flatten(), reduction="none")
    difference = float((our_losses.flatten() - peer_losses).abs().max())
    if not difference <= LARGEST_LOSS_DIFFERENCE:
        raise SystemExit(f"not the same model: losses of the same token differ by {difference:.2g}")
    return counts[0], difference


def machine_of(settings: Settings) -> Machine:
    """What this machine can do with the settings' threads."""
    prepare(settings)
    bf16 = settings.precision == "bf16"
    return measure_machine(torch.device(settings.device), torch.bfloat16 if bf16 else torch.float32)


def in_own_process(work: Callable[[Settings], Any], settings: Settings) -> Any:
    """What `work` returns; it leaves nothing behind in this process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, (settings,))


def measure_sides(settings: Settings, steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of an optimizer step (median of a round) for each side, round by round.

    In every round each side has one turn; its first step, which finds cold caches and sleeping
    threads, is not counted.
    """
    sides = [Side(name, settings) for name in (*SIDES, PEER)]
    try:
        for side in sides:
            side.take_steps(2)
        seconds: dict[str, list[float]] = {side.name: [] for side in sides}
        for i in range(rounds):
            first = i % len(sides)
            for side in sides[first:] + sides[:first]:
                seconds[side.name].append(statistics.median(side.take_steps(steps + 1)[1:]))
    finally:
        for side in sides:
            side.stop()
    return seconds


def report(settings: Settings, machine: Machine, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Everything that was measured, with the floor and the ratios."""
    shape = settings.shape()
    step_flops = shape.train_flops_per_token() * settings.tokens_per_step
    step_bytes = OPTIMIZER_BYTES * shape.parameters()
    floor = step_flops / machine.matmul_flops + step_bytes / machine.memory_bytes_per_second
    sides = {
        name: {
            "step_seconds": statistics.median(times),
            "step_seconds_min": min(times),
            "step_seconds_max": max(times),
            "tokens_per_second": settings.tokens_per_step / statistics.median(times),
            "over_floor": statistics.median(times) / floor,
        }
        for name, times in seconds.items()
    }
    ratios = {
        name: [p / o for o, p in zip(seconds[name], seconds[PEER], strict=True)] for name in SIDES
    }
    return {
        "settings": dataclasses.asdict(settings),
        "machine": dataclasses.asdict(machine),
        "floor": {
            "step_seconds": floor,
            "flops": step_flops,
            "optimizer_bytes": step_bytes,
            "tokens_per_second": settings.tokens_per_step / floor,
        },
        "sides": sides,
        "ratios": {
            name: {"median": statistics.median(r), "min": min(r), "max": max(r)}
            for name, r in ratios.items()
        },
    }


def print_report(result: dict[str, Any]) -> None:
    machine, floor = result["machine"], result["floor"]
    print(
        f"machine: matrix products {machine['matmul_flops'] / 1e9:,.0f} GFLOP/s, "
        f"memory {machine['memory_bytes_per_second'] / 1e9:.1f} GB/s"
    )
    print(
        f"floor:   {floor['flops'] / 1e9:,.0f} GFLOP and "
        f"{floor['optimizer_bytes'] / 1e6:,.0f} MB of optimizer state a step = "
        f"{floor['step_seconds'] * 1e3:,.1f} ms = {floor['tokens_per_second']:,.0f} tokens/s"
    )
    print(f"\n{'':18}{'ms a step':>12}{'min - max':>22}{'tokens/s':>12}{'over floor':>12}")
    for name, side in result["sides"].items():
        spread = f"{side['step_seconds_min'] * 1e3:,.1f} - {side['step_seconds_max'] * 1e3:,.1f}"
        print(
            f"{name:18}{side['step_seconds'] * 1e3:>12,.1f}{spread:>22}"
            f"{side['tokens_per_second']:>12,.0f}{side['over_floor']:>11.2f}×"
        )
    print("\nthroughput as a multiple of the plain torch loop's, median (min - max) of the rounds")
    for name, ratio in result["ratios"].items():
        print(f"{name:18}{ratio['median']:.3f} ({ratio['min']:.3f} - {ratio['max']:.3f})")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="gpt-3m")
    parser.add_argument("--vocab", type=int, default=8000)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16, help="samples of an optimizer step")
    parser.add_argument("--micro", type=int, default=8, help="samples of a forward pass")
    parser.add_argument("--kv-heads", type=int, help="fewer than heads: grouped-query attention")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--steps", type=int, default=4, help="counted steps of a turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    return parser.parse_args()


def choose_device(asked: str) -> str:
    """The device for all sides, which take a GPU wherever they see one."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise InputError("--device", "torch sees no GPU", "use --device cpu")
    if asked == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def main() -> int:
    asked = parse_arguments()
    if importlib.util.find_spec("transformers") is None:
        raise InputError("", "transformers is not installed", "pip install 'megaphase[benchmark]'")
    if asked.batch % asked.micro:
        raise InputError("--micro", f"{asked.micro} does not divide --batch {asked.batch}")
    names = ("preset", "vocab", "seq_len", "batch", "micro", "kv_heads", "threads", "precision")
    device = choose_device(asked.device)
    settings = Settings(**{name: getattr(asked, name) for name in names}, device=device)
    parameters, difference = in_own_process(check_same_model, settings)
    before = in_own_process(machine_of, settings)
    seconds = measure_sides(settings, asked.steps, asked.rounds)
    machine = before.best(in_own_process(machine_of, settings))
    result = report(settings, machine, seconds)
    result["same_model"] = {"parameters": parameters, "loss_difference": difference}
    if asked.json:
        print(json.dumps(result, indent=2))
        return 0
    print(
        f"{settings.preset}, {parameters:,} parameters in both, "
        f"a token's losses differ by {difference:.0e}; "
        f"vocabulary {settings.vocab:,}, batch {settings.batch} × {settings.seq_len} tokens, "
        f"micro {settings.micro}, {settings.precision}, {settings.device}, "
        f"{settings.threads} threads, torch {torch.__version__}"
    )
    print_report(result)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_WRONG_INPUT)
