"""Compare the training throughput of Megaphase's engine with Hugging Face's Llama in a plain loop.

Same shape, same batch, same threads, in one run. Every side has its own processes and is measured
together with the plain loop: the two take single steps in turn (on a GPU a few), so that changes of
the machine's speed affect both. A GPU holds one of them at a time; the other's tensors are in the
machine's memory meanwhile. Before that, one process checks that both models have the same number
of parameters and give the same loss for the same weights.

    python benchmarks/train_throughput.py --precision fp32
    python benchmarks/train_throughput.py --preset gpt-1.3b --seq-len 4096 --batch 8 --micro 2

Prints each side's tokens/s, its fraction of the best matrix products on this machine and of the
GPU's data sheet (MFU), its peak memory, and the ratios to the plain loop. Exit code 2 if
transformers is missing. The allocator is the same for all sides; to see the cost of page faults,
run it with MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ set to 1073741824 (glibc then keeps
freed memory).
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from llama import hugging_face_llama, llama_weights
from machine import Machine, measure_machine
from scipy.stats import binom
from throughput_sides import LlamaLoop, MegaphaseEngine, Settings, Side, begin, prepare

from megaphase.distributed.initialization import Initializer
from megaphase.distributed.process_grid import start_process_grid
from megaphase.estimate.gpu_specs import card_of_device
from megaphase.model.gpt import GPT
from megaphase.model.parameters import parameter_count, train_flops_per_token
from megaphase.model.presets import PRESETS
from megaphase.utils.errors import EXIT_WRONG_INPUT, InputError
from megaphase.utils.process_lifetime import ends_with_this_process

LARGEST_LOSS_DIFFERENCE = 1e-4  # nats, fp32
WARM_UP_STEPS = 2
# Bytes per parameter of an fp32 AdamW step: the norm reads the gradient; the update reads
# parameter, gradient and two moments, and writes parameter and moments.
OPTIMIZER_BYTES = 4 + 16 + 12


def check_same_model(settings: Settings) -> tuple[int, float]:
    """Return the model's parameters, and the largest difference of a token's loss between the two.

    Raises:
        SystemExit: the models differ, so the comparison would be meaningless.
    """
    prepare(settings)
    # Larger weights than at the start of training, with which every loss would be near log(vocab).
    shape = dataclasses.replace(settings.shape(), init_std=0.05)
    device = torch.device(settings.device)
    megaphase = GPT(shape, Initializer(1, torch.float32), start_process_grid(1)).to(device)
    peer = hugging_face_llama(shape).to(device)
    counts = [sum(p.numel() for p in model.parameters()) for model in (megaphase, peer)]
    if counts[0] != counts[1]:
        raise SystemExit(f"not the same model: {counts[0]:,} and {counts[1]:,} parameters")
    peer.load_state_dict(llama_weights(megaphase, shape))
    batch = settings.batches()[0]
    inputs, targets = batch.inputs[:1].to(device), batch.targets[:1].to(device)
    with torch.no_grad():
        _, megaphase_losses = megaphase(inputs, targets)
        peer_logits = peer(inputs).logits
    peer_losses = F.cross_entropy(peer_logits.flatten(0, 1), targets.flatten(), reduction="none")
    difference = float((megaphase_losses.flatten() - peer_losses).abs().max())
    if not difference <= LARGEST_LOSS_DIFFERENCE:
        raise SystemExit(f"not the same model: losses of the same token differ by {difference:.2g}")
    return counts[0], difference


def machine_of(settings: Settings) -> Machine:
    """Measure the machine with the settings' threads."""
    prepare(settings)
    return measure_machine(torch.device(settings.device), settings.dtype)


def in_own_process(work: Callable[[Settings], Any], settings: Settings) -> Any:
    """Run `work` in a separate process and return its result."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, begin, (ends_with_this_process(),)) as pool:
        return pool.apply(work, (settings,))


class Turns:
    """Sides that take turns, of which one at a time has its tensors on the GPU."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._sides: list[Side] = []
        self._present: Side | None = None

    def start(self, kind: MegaphaseEngine | LlamaLoop) -> Side:
        """Start a side's processes and let it warm up."""
        self._make_room()
        self._present = side = Side(kind, self._settings)
        self._sides.append(side)
        side.take_steps(WARM_UP_STEPS)
        return side

    def take(self, side: Side, steps: int) -> float:
        """Return a side's seconds per step: the median of a turn.

        On a GPU a first step more, after which nothing has to be moved, is not counted.
        """
        uncounted = int(self._settings.device == "cuda")
        if self._present is not side:
            self._make_room()
            self._present = side
            if uncounted:
                side.come_back()
        return statistics.median(side.take_steps(steps + uncounted)[uncounted:])

    def stop(self, side: Side) -> None:
        self._sides.remove(side)
        side.stop()
        if self._present is side:
            self._present = None

    def kill(self) -> None:
        for side in self._sides:
            side.kill()

    def _make_room(self) -> None:
        if self._present is not None and self._settings.device == "cuda":
            self._present.leave()
        self._present = None


@dataclass
class Pair:
    """Seconds per step of a side and of the peer in its rounds; the side's peak memory."""

    seconds: list[float]
    peer_seconds: list[float]
    peak_bytes: int


def measure_sides(
    kinds: list[MegaphaseEngine | LlamaLoop], settings: Settings, steps: int, rounds: int
) -> dict[str, Pair]:
    """Measure each side together with the peer, which is the first plain loop.

    In every round of a side both have one turn. Not more than two sides are in memory at a time,
    and not more than one in a GPU's.
    """
    turns, found = Turns(settings), {}
    first = next(kind for kind in kinds if isinstance(kind, LlamaLoop))
    try:
        peer = turns.start(first)
        for kind in kinds:
            if kind is first:
                continue
            side = turns.start(kind)
            pair = Pair([], [], 0)
            for i in range(rounds):
                for each in (side, peer) if i % 2 == 0 else (peer, side):
                    seconds = pair.seconds if each is side else pair.peer_seconds
                    seconds.append(turns.take(each, steps))
            pair.peak_bytes = side.peak_bytes
            found[side.name] = pair
            turns.stop(side)
        alone = [turns.take(peer, steps) for _ in range(0 if found else rounds)]
        of_peer = alone + [each for pair in found.values() for each in pair.peer_seconds]
        found[peer.name] = Pair(of_peer, of_peer, peer.peak_bytes)
        turns.stop(peer)
    except BaseException:
        turns.kill()
        raise
    return found


def report(
    settings: Settings,
    machine: Machine,
    pairs: dict[str, Pair],
    kinds: list[MegaphaseEngine | LlamaLoop],
) -> dict[str, Any]:
    """Return all measurements with the lower bound and the ratios."""
    shape = settings.shape()
    peer = next(kind.name for kind in kinds if isinstance(kind, LlamaLoop))
    gpus = {kind.name: kind.processes for kind in kinds}
    step_flops = train_flops_per_token(shape) * settings.tokens_per_step
    step_bytes = OPTIMIZER_BYTES * parameter_count(shape)
    peak = _card_flops(settings)
    floor = step_flops / machine.matmul_flops + step_bytes / machine.memory_bytes_per_second
    sides = {
        name: {
            "step_seconds": (median := statistics.median(pair.seconds)),
            "step_seconds_min": min(pair.seconds),
            "step_seconds_max": max(pair.seconds),
            "tokens_per_second": settings.tokens_per_step / median,
            "of_matmul_ceiling": step_flops / median / machine.matmul_flops,
            "mfu": peak and step_flops / median / (peak * gpus[name]),
            "peak_bytes": pair.peak_bytes,
            "ratio": _ratio(pair.peer_seconds, pair.seconds),
        }
        for name, pair in pairs.items()
    }
    return {
        "settings": dataclasses.asdict(settings),
        "torch": torch.__version__,
        "machine": dataclasses.asdict(machine),
        "floor": {
            "step_seconds": floor,
            "flops": step_flops,
            "optimizer_bytes": step_bytes,
            "tokens_per_second": settings.tokens_per_step / floor,
        },
        "peer": peer,
        "sides": sides,
    }


def _card_flops(settings: Settings) -> float | None:
    """Return the GPU's bf16 FLOP/s by its data sheet; None for fp32, the CPU and unknown GPUs."""
    if settings.device != "cuda" or settings.precision != "bf16":
        return None
    card = card_of_device(torch.cuda.get_device_name())
    return None if card is None else card.peak_tflops * 1e12


def _ratio(peer_seconds: list[float], megaphase: list[float]) -> dict[str, Any]:
    """Return how many times as fast Megaphase is, by round: the median, its 95 % interval from the
    order of the ratios (their range, if they are fewer than six), and the quartiles."""
    ratios = sorted(t / o for t, o in zip(peer_seconds, megaphase, strict=True))
    count = len(ratios)
    place = max(int(binom.ppf(0.025, count, 0.5)) - 1, 0)
    lower, upper = np.quantile(ratios, [0.25, 0.75])
    return {
        "median": statistics.median(ratios),
        "low": ratios[place],
        "high": ratios[count - 1 - place],
        "quartiles": [float(lower), float(upper)],
    }


def print_report(result: dict[str, Any]) -> None:
    machine, floor = result["machine"], result["floor"]
    print(
        f"machine: matrix products {machine['matmul_flops'] / 1e9:,.0f} GFLOP/s, "
        f"memory {machine['memory_bytes_per_second'] / 1e9:.1f} GB/s"
    )
    print(
        f"bound:   {floor['flops'] / 1e9:,.0f} GFLOP and "
        f"{floor['optimizer_bytes'] / 1e6:,.0f} MB of optimizer state per step = "
        f"{floor['step_seconds'] * 1e3:,.1f} ms = {floor['tokens_per_second']:,.0f} tokens/s"
    )
    print(
        f"\nratio: tokens/s as a multiple of {result['peer']}, median [95 % interval] (quartiles)"
    )
    width = max(map(len, result["sides"]))
    heads = ("ms per step", "tokens/s", "of matmul ceiling", "MFU", "peak GB")
    print(f"\n{'':{width}}" + "".join(f"{head:>19}" for head in heads) + "  ratio")
    for name, side in result["sides"].items():
        ratio, mfu = side["ratio"], "-" if side["mfu"] is None else f"{side['mfu']:.3f}"
        print(
            f"{name:{width}}{side['step_seconds'] * 1e3:>19,.1f}"
            f"{side['tokens_per_second']:>19,.0f}{side['of_matmul_ceiling']:>19.2f}"
            f"{mfu:>19}"
            f"{side['peak_bytes'] / 1e9:>19.2f}"
            f"  {ratio['median']:.3f} [{ratio['low']:.3f}-{ratio['high']:.3f}]"
            " ({:.3f}-{:.3f})".format(*ratio["quartiles"])
        )


def draw(result: dict[str, Any], path: Path) -> None:
    """Plot bars of tokens/s, with the lower bound."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sides = result["sides"]
    speeds = [side["tokens_per_second"] for side in sides.values()]
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(sides) + 1.4), layout="constrained")
    colors = ["tab:blue" if name.startswith("megaphase") else "0.6" for name in sides]
    bars = axes.barh(list(sides), speeds, color=colors)
    axes.bar_label(bars, [f"{speed:,.0f}" for speed in speeds], padding=3)
    axes.axvline(result["floor"]["tokens_per_second"], color="black", linestyle="--")
    axes.invert_yaxis()
    settings = result["settings"]
    axes.set_xlabel("tokens/s; dashed: matrix products and optimizer at this machine's best")
    axes.set_title(
        f"{settings['preset']}, vocabulary {settings['vocab']:,}, "
        f"{settings['batch']} × {settings['seq_len']} tokens, {settings['precision']}, "
        f"{settings['device']}",
        loc="left",
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="gpt-14m")
    parser.add_argument("--vocab", type=int, default=16_000)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="samples per optimizer step")
    parser.add_argument("--micro", type=int, default=8, help="samples per forward pass")
    parser.add_argument("--kv-heads", type=int, help="fewer than heads: grouped-query attention")
    parser.add_argument("--checkpointing", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--steps", type=int, help="counted steps per turn; by default 1, on a GPU 4"
    )
    parser.add_argument("--rounds", type=int, default=40, help="turns of each of two sides")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--zero", type=int, nargs="*", default=[0, 3], help="ZeRO stages")
    parser.add_argument("--kernels", nargs="*", choices=("compile", "eager"), default=["compile"])
    parser.add_argument(
        "--layouts", nargs="*", default=["1x1"], help="Megaphase's tensor x data, such as 2x1"
    )
    parser.add_argument(
        "--keep-gathered", type=float, nargs="*", default=[0.0], help="keep_gathered with ZeRO 3"
    )
    parser.add_argument(
        "--peers", nargs="*", choices=("eager", "compile"), default=["eager", "compile"]
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--plot", type=Path, help="write a bar chart to this file")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    return parser.parse_args()


def choose_device(asked: str) -> str:
    """Return the device for all sides, which use a GPU if they see one."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise InputError("--device", "torch sees no GPU", "use --device cpu")
    if asked == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_sides(asked: argparse.Namespace) -> list[MegaphaseEngine | LlamaLoop]:
    """Return Megaphase's sides in the order of the options, then the peers."""
    megaphase = []
    for layout in asked.layouts:
        tensor, _, data = layout.partition("x")
        if not (tensor.isdecimal() and data.isdecimal()):
            raise InputError("--layouts", f"{layout} is not tensor x data", "such as 2x1")
        megaphase += [
            MegaphaseEngine(zero, kernels, int(tensor), int(data), kept)
            for kernels in asked.kernels
            for zero in asked.zero
            for kept in (asked.keep_gathered if zero == 3 else [0.0])
        ]
    peers = [LlamaLoop(compiled=peer == "compile") for peer in asked.peers]
    if not peers:
        raise InputError("--peers", "there is nothing to compare with", "name at least one")
    return [*megaphase, *peers]


def main() -> int:
    asked = parse_arguments()
    if importlib.util.find_spec("transformers") is None:
        raise InputError("", "transformers is not installed", "pip install 'megaphase[benchmark]'")
    kinds = choose_sides(asked)
    for data in {kind.data for kind in kinds if isinstance(kind, MegaphaseEngine)} or {1}:
        if asked.batch % (asked.micro * data):
            problem = f"{asked.micro} on {data} data-parallel ranks do not divide {asked.batch}"
            raise InputError("--micro", problem, "change --micro or --batch")
    device = choose_device(asked.device)
    names = [each.name for each in dataclasses.fields(Settings) if hasattr(asked, each.name)]
    names.remove("device")
    settings = Settings(**{name: getattr(asked, name) for name in names}, device=device)
    parameters, difference = in_own_process(check_same_model, settings)
    before = in_own_process(machine_of, settings)
    steps = asked.steps or (4 if device == "cuda" else 1)
    pairs = measure_sides(kinds, settings, steps, asked.rounds)
    machine = before.best(in_own_process(machine_of, settings))
    result = report(settings, machine, pairs, kinds)
    result["same_model"] = {"parameters": parameters, "loss_difference": difference}
    if asked.plot is not None:
        draw(result, asked.plot)
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
