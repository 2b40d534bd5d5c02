"""Compare reading planned samples with megatron-core's GPTDataset, over the same corpora, in one
run; and measure the cost of verifying tokens when they are first read.

    pip install -c constraints.txt -e '.[benchmark]'
    python benchmarks/plan_reading.py
    python benchmarks/plan_reading.py --megaphase-only   without GPTDataset

All sides deliver batches of int64 tensors; they take turns, each in a new process: cold, with every
file dropped from the page cache, and warm, with all files read before. GPTDataset runs as in
Megatron-LM without loader processes (a blended data set behind torch's DataLoader, no attention
mask), and also with two, as many as this machine has cores. Every round opens the plan again, so
that all tokens are read for the first time, and verified. Exit code 2 if megatron-core is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from synthetic_corpora import TOKENIZER, document_lengths, open_spec, write_corpus, write_run_file

from megaphase.plan import _builder
from megaphase.utils.errors import EXIT_WRONG_INPUT

TASKS = 8
BATCH = 256
MEAN_DOCUMENT = 1000
SEED = 1
STREAM = _builder.Stream


def prepare(folder: Path, tokens: int, seq_len: int, steps: int) -> Path:
    """Write corpora with Zipf sizes, and a run file that uses them."""
    sizes = 1 / np.arange(1, TASKS + 1)
    return prepare_tasks(folder, tokens * sizes / sizes.sum(), seq_len, steps)


def prepare_tasks(folder: Path, tokens: Sequence[float], seq_len: int, steps: int) -> Path:
    """Write a corpus of so many tokens for each task, and a run file that uses them."""
    names = [f"task{number}" for number in range(len(tokens))]
    for seed, (name, of_task) in enumerate(zip(names, tokens, strict=True)):
        size = of_task / MEAN_DOCUMENT
        lengths = document_lengths(int(size), MEAN_DOCUMENT, seed)
        write_corpus(folder / name, lengths, seed, with_tokens=True)
    mixture = {"temperature": 3.3}
    phase = {"name": "joint", "steps": steps, "mixture": mixture}
    return write_run_file(folder, names, seq_len=seq_len, batch=BATCH, phases=[phase])


def megaphase_batches(run_file: Path, workers: int) -> Iterator[Any]:
    """Yield the steps of the plan as the training loop reads them."""
    from megaphase.plan.build import ensure_built
    from megaphase.plan.dataset import StepReader
    from megaphase.plan.plan import Plan

    config, spec = open_spec(run_file)
    plan = Plan(spec, ensure_built(spec, config.output))
    reader = StepReader(plan, 0, rank=0, ranks=1, pad_token_id=TOKENIZER.eod)
    return reader.steps(0, plan.phases[0].steps)


def unchecked_batches(run_file: Path, workers: int) -> Iterator[Any]:
    """Like `megaphase_batches`, without verification."""

    class Unchecked(STREAM):
        def __init__(self, *arguments: Any) -> None:
            *others, _blocks, _vocab_size, _bos = arguments
            super().__init__(*others)

    _builder.Stream = Unchecked  # type: ignore[misc]
    return megaphase_batches(run_file, workers)


def megatron_batches(run_file: Path, workers: int) -> Iterator[Any]:
    """Yield the same number of samples at the same rates from Megatron's blended data set."""
    warnings.simplefilter("ignore")
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from torch import distributed
    from torch.utils.data import DataLoader

    from megaphase.plan.build import ensure_built
    from megaphase.plan.plan import Plan

    if not distributed.is_initialized():  # the data set asks for its rank
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    config, spec = open_spec(run_file)
    [phase] = Plan(spec, ensure_built(spec, config.output)).phases
    tokenizer = SimpleNamespace(
        eod=TOKENIZER.eod, pad=-1, unique_identifiers={"class": "none"}, vocab_size=32000
    )
    dataset = BlendedMegatronDatasetBuilder(
        GPTDataset,
        [phase.samples, 0, 0],
        lambda: True,
        GPTDatasetConfig(
            random_seed=SEED,
            sequence_length=spec.seq_len,
            blend=([str(task.corpus) for task in config.tasks.values()], phase.rates),
            split="1,0,0",
            path_to_cache=str(run_file.parent / "cache"),
            tokenizer=tokenizer,  # type: ignore[arg-type]
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        ),
    ).build()[0]
    return iter(DataLoader(dataset, batch_size=BATCH, num_workers=workers))


SIDES: dict[str, tuple[Callable[[Path, int], Iterator[Any]], int]] = {
    "megaphase": (megaphase_batches, 0),
    "megaphase, unchecked": (unchecked_batches, 0),
    "GPTDataset": (megatron_batches, 0),
    "GPTDataset, 2 loader processes": (megatron_batches, 2),
}


def read_all(side: str, run_file: Path, rounds: int) -> tuple[float, float, int]:
    """Return seconds and CPU seconds of the last round, without opening; samples per round."""
    make, workers = SIDES[side]
    seconds = processor = 0.0
    samples = 0
    for _ in range(rounds):
        batches = make(run_file, workers)
        began, processor_began = time.perf_counter(), time.process_time()
        samples = 0
        for batch in batches:
            samples += len(batch["tokens"] if isinstance(batch, dict) else batch)
        seconds = time.perf_counter() - began
        processor = time.process_time() - processor_began
    return seconds, processor, samples


def measure(side: str, run_file: Path, rounds: int) -> tuple[float, float, int]:
    """Run `read_all` in a separate process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(read_all, side, run_file, rounds).result()


def drop_from_page_cache(folder: Path) -> None:
    """Flush every file and drop its pages, so that the next reader reads from disk."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(run_file: Path, sides: list[str], turns: int, *, cold: bool) -> None:
    """Print samples per second of each side, the ratio of Megaphase to it, and CPU time.

    CPU time does not include loader processes. It varies less than the wall-clock time on a machine
    with other work.
    """
    rates: dict[str, list[float]] = {side: [] for side in sides}
    processor: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(turns):
        # The order rotates, so that no side always follows the same one.
        for side in sides[turn % len(sides) :] + sides[: turn % len(sides)]:
            if cold:
                drop_from_page_cache(run_file.parent)
            # A first, unmeasured round reads everything into the page cache.
            seconds, used, samples = measure(side, run_file, 1 if cold else 2)
            rates[side].append(samples / seconds)
            processor[side].append(used / samples)
    megaphase_rates = rates["megaphase"]
    for side, side_rates in rates.items():
        ratio = statistics.median(a / b for a, b in zip(megaphase_rates, side_rates, strict=True))
        print(
            f"  {side:32} {statistics.median(side_rates):>12,.0f} samples/s  ratio {ratio:.2f}  "
            f"{statistics.median(processor[side]) * 1e6:.2f} µs of CPU time per sample"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=float, default=1e9, help="tokens of all corpora")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--warm-steps", type=int, default=200)
    parser.add_argument("--cold-steps", type=int, default=40)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="temporary folder for the corpora")
    parser.add_argument("--megaphase-only", action="store_true", help="leave out GPTDataset")
    options = parser.parse_args()
    sides = [name for name in SIDES if not (options.megaphase_only and "GPTDataset" in name)]
    if not options.megaphase_only and importlib.util.find_spec("megatron") is None:
        print("megatron-core is missing: pip install -c constraints.txt -e '.[benchmark]'")
        return EXIT_WRONG_INPUT
    for cold, steps in ((False, options.warm_steps), (True, options.cold_steps)):
        if steps == 0:
            continue
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            run_file = prepare(Path(name), int(options.tokens), options.seq_len, steps)
            for side in sides:
                measure(side, run_file, 1)  # builds the index
            print(
                f"{'cold' if cold else 'warm'} files, {steps * BATCH:,} samples of "
                f"{options.seq_len:,} tokens, {TASKS} tasks, {options.tokens:,.0f} tokens in all",
                flush=True,
            )
            compare(run_file, sides, options.turns, cold=cold)
    return 0


if __name__ == "__main__":
    sys.exit(main())
