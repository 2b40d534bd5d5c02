"""Simulate the time of a training step on one H100, without a GPU.

    python benchmarks/step_simulation.py                          gpt-1.3b, ZeRO 1, 4 × 4 × 2,048
    python benchmarks/step_simulation.py --micro 8 --accumulation 2 --kernels-by-time 15
    python benchmarks/step_simulation.py --preset gpt-125m --measure-host

A rehearsal (docs/rehearsal.md) of the run's own engine counts the kernels of a step with their
bytes and FLOPs. The host launches them one after the other at the cost of each; the device follows,
and computes each at the roofline of the card: products at a rate that cuBLAS reaches, attention at
that of its backend, all else at what memory gives. So it says which part of a step bounds it and
what a change is worth, and not what a real GPU will measure. Nothing is sent to other GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from typing import Any

from megaphase.rehearsal.fake_device import install_fake_device, missing_for_rehearsal
from megaphase.rehearsal.recording import Collective, HostCopy, Kernel, Recording, Wait
from megaphase.utils.errors import EXIT_WRONG_INPUT, InputError

DATA_SHEET_FLOPS = 989.5e12  # bf16, dense
STEPS = 4  # simulated is the last
PRODUCTS = ("mm", "addmm", "bmm", "addmm_", "baddbmm")


@dataclass(frozen=True)
class Card:
    """What an H100 SXM reaches, which is less than its data sheet says.

    products: FLOP/s. memory: bytes/s. attention_forward, attention_backward: FLOP/s of a causal
    head of 128, without what lies above the diagonal. smallest: seconds of a kernel of any size.
    """

    products: float = 620e12
    memory: float = 0.85 * 3.35e12
    attention_forward: float = 480e12
    attention_backward: float = 380e12
    smallest: float = 2.2e-6


@dataclass(frozen=True)
class Host:
    """Seconds that the host needs; `operator` and `formula` as host_costs.py measured them.

    operator: from one kernel to the next, with all of Python, autograd and DeepSpeed between them
    formula: more, for a function that torch.compile made
    wait: to wake up after the device is done
    """

    operator: float = 13e-6
    formula: float = 21e-6
    launch: float = 4e-6
    collective: float = 30e-6
    wait: float = 15e-6


@dataclass
class Simulated:
    """Seconds of a step. busy: of the device; host: if it never had to wait."""

    seconds: float
    busy: float
    host: float
    kernels: int
    by_kind: dict[str, float]
    by_name: dict[str, tuple[int, float]]


def kind_of(kernel: Kernel) -> str:
    if kernel.name in PRODUCTS:
        return "products"
    if "attention" in kernel.name or "varlen" in kernel.name:
        return "attention"
    return "formulas" if kernel.name.startswith("fused:") else "other"


def device_seconds(kernel: Kernel, card: Card, attention_flops: float) -> float:
    """attention_flops: of the forward pass of one block."""
    moved = (kernel.read + kernel.written) / card.memory
    kind = kind_of(kernel)
    if kind == "products":
        return max(kernel.flops / card.products, moved, card.smallest)
    if kind == "attention":
        backward = "backward" in kernel.name
        flops = attention_flops * (2.5 if backward else 1)
        rate = card.attention_backward if backward else card.attention_forward
        return max(flops / rate, moved, card.smallest)
    return max(moved, card.smallest)


def host_seconds(kernel: Kernel, host: Host) -> float:
    formula = host.formula if kind_of(kernel) == "formulas" else 0.0
    return host.operator + formula + host.launch


def simulate(recording: Recording, card: Card, host: Host, attention_flops: float) -> Simulated:
    """Run the events of a step, in their order, on a host and a device with one stream."""
    at_host = at_device = busy = alone = 0.0
    by_kind: defaultdict[str, float] = defaultdict(float)
    by_name: dict[str, tuple[int, float]] = {}
    for event in recording.events:
        if isinstance(event, Kernel):
            cost, seconds = host_seconds(event, host), device_seconds(event, card, attention_flops)
            at_host += cost
            alone += cost
            at_device = max(at_device, at_host) + seconds
            busy += seconds
            by_kind[kind_of(event)] += seconds
            number, sum_ = by_name.get(event.name, (0, 0.0))
            by_name[event.name] = number + 1, sum_ + seconds
        elif isinstance(event, Wait):
            at_host = max(at_host, at_device) + host.wait
        elif isinstance(event, Collective | HostCopy):
            at_host += host.collective
            alone += host.collective
    kernels = sum(number for number, _ in by_name.values())
    return Simulated(max(at_host, at_device), busy, alone, kernels, dict(by_kind), by_name)


def rehearsed(asked: argparse.Namespace) -> tuple[Recording, int, Any]:
    """Rehearse a step alone on a GPU: its events, its tokens and the model's shape."""
    os.environ.update(
        WORLD_SIZE="1", RANK="0", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1"
    )
    install_fake_device()
    from gpu_parts.setups import Case

    from megaphase.rehearsal.rank import Rank

    case = Case(
        {"preset": asked.preset, "activation_checkpointing": asked.checkpointing},
        seq_len=asked.seq_len, micro=asked.micro, accumulation=asked.accumulation,
    ).with_changes(parallel={"zero": asked.zero}, parts={"kernels": asked.kernels})  # fmt: skip
    rank = Rank(case.config(), case.vocab, 1, 0)
    if not rank.train(STEPS):
        raise SystemExit("the optimizer did not step")
    tokens = asked.micro * asked.accumulation * asked.seq_len
    return rank.gpu.recording, tokens, case.shape()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="gpt-1.3b")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches of a step")
    parser.add_argument("--zero", type=int, default=1)
    parser.add_argument("--kernels", choices=("compile", "eager"), default="compile")
    parser.add_argument("--checkpointing", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--product-tflops", type=float, default=Card.products / 1e12)
    parser.add_argument("--measure-host", action="store_true", help="time this machine's host")
    parser.add_argument("--kernels-by-time", type=int, default=0, help="so many of them")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if missing := missing_for_rehearsal():
        raise InputError("", f"a rehearsal needs {missing}", "install it")
    host = measured_host() if asked.measure_host else Host()
    card = replace(Card(), products=asked.product_tflops * 1e12)
    recording, tokens, shape = rehearsed(asked)
    from megaphase.model.parameters import train_flops_per_token

    attention = 4 * asked.micro * shape.seq_len**2 * shape.attention_width * 0.5
    found = simulate(recording, card, host, attention)
    mfu = train_flops_per_token(shape) * tokens / found.seconds / DATA_SHEET_FLOPS
    waits = [f"{wait.kind} at {wait.place}" for wait in recording.waits]
    if asked.json:
        result = asdict(found) | {"mfu": mfu, "waits": waits, "host_costs": asdict(host)}
        print(json.dumps(result | {"simulated": vars(asked), "card": asdict(card)}, indent=1))
        return
    kinds = ", ".join(f"{kind} {1e3 * s:.1f}" for kind, s in sorted(found.by_kind.items()))
    print(
        f"simulated: {1e3 * found.seconds:.1f} ms a step, MFU {mfu:.3f}; device busy "
        f"{1e3 * found.busy:.1f} ms ({kinds}), host {1e3 * found.host:.1f} ms for "
        f"{found.kernels:,} kernels, {len(waits)} waits"
    )
    largest = sorted(found.by_name.items(), key=lambda each: -each[1][1])
    for name, (number, seconds) in largest[: asked.kernels_by_time]:
        print(f"  {1e3 * seconds:8.2f} ms  {number:6,} × {name}")


def measured_host() -> Host:
    """The costs of this machine, by host_costs.py; those that need a GPU as they are assumed."""
    command = [sys.executable, os.path.join(os.path.dirname(__file__), "host_costs.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return replace(Host(), **json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_WRONG_INPUT)
