"""Measure the gain of `parallel.overlap`: steps with and without it, alternating, in one run.

    python benchmarks/overlap.py --tensor 2
    python benchmarks/overlap.py --tensor 2 --sequence

One engine takes all steps, so that both sides have the same weights, memory and processes. Prints
the median time per step of each side, and the median and quartiles of the ratios of neighbouring
steps. On a machine with GPUs every process has one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from throughput_sides import LEARNING_RATE, Settings, begin, prepare

from megaphase.distributed.process_grid import start_process_grid
from megaphase.launch.local import free_port, rank_environment
from megaphase.model.gpt import GPT
from megaphase.training.engine import Engine
from megaphase.utils.process_lifetime import ends_with_this_process

WARM_UP_PAIRS = 2


def serve(
    settings: Settings,
    tensor: int,
    sequence: bool,
    pairs: int,
    environment: dict[str, str],
    answer: Connection,
) -> None:
    """Run one of the processes: its seconds with and without overlap, pair by pair."""
    begin(environment)
    prepare(settings, tensor)
    config = settings.run_config(tensor=tensor, sequence=sequence)
    engine = Engine(config, settings.shape(), start_process_grid(tensor), tasks=1)
    model, batch = engine.module, settings.batches()[0]
    assert isinstance(model, GPT)

    def seconds(overlap: bool) -> float:
        model.overlap = overlap
        dist.barrier()
        began = time.perf_counter()
        engine.train_step(batch, LEARNING_RATE)
        return time.perf_counter() - began

    found = [(seconds(True), seconds(False)) for _ in range(WARM_UP_PAIRS + pairs)]
    answer.send(found[WARM_UP_PAIRS:])


def measure(
    settings: Settings, tensor: int, sequence: bool, pairs: int
) -> list[tuple[float, float]]:
    """Return the slowest process's seconds per step with and without overlap, pair by pair."""
    context = multiprocessing.get_context("spawn")
    port = free_port()
    ends = []
    for rank in range(tensor):
        own_end, worker_end = context.Pipe(duplex=False)
        environment = rank_environment(rank, tensor, port) | ends_with_this_process()
        arguments = (settings, tensor, sequence, pairs, environment, worker_end)
        context.Process(target=serve, args=arguments, daemon=True).start()
        worker_end.close()
        ends.append(own_end)
    ranks = [end.recv() for end in ends]
    return [(max(a for a, _ in pair), max(b for _, b in pair)) for pair in zip(*ranks, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="gpt-14m")
    parser.add_argument("--vocab", type=int, default=16_000)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--checkpointing", default="none")
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--sequence", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=8, help="pairs of compared steps; at least 2")
    options = parser.parse_args()
    if options.pairs < 2:
        parser.error("--pairs: at least 2, for quartiles")
    settings = Settings(
        preset=options.preset,
        vocab=options.vocab,
        seq_len=options.seq_len,
        batch=options.batch,
        micro=options.micro,
        kv_heads=None,
        threads=options.threads,
        precision=options.precision,
        device="cuda" if torch.cuda.is_available() else "cpu",
        checkpointing=options.checkpointing,
    )
    found = measure(settings, options.tensor, options.sequence, options.pairs)
    for name, times in zip(("overlap", "no overlap"), zip(*found, strict=True), strict=True):
        print(f"{name:10}  {1000 * statistics.median(times):8.1f} ms per step")
    low, ratio, high = statistics.quantiles([without / with_ for with_, without in found], n=4)
    print(f"{ratio:.3f} times as fast with overlap (quartiles {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
