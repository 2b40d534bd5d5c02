"""The plan's builder beside the compiled helpers of megatron-core, in one run.

    pip install -c constraints.txt -e '.[benchmark]'
    python benchmarks/plan_builder.py --whole 1e9

Prints, for both sides and in turns on one thread: ns a sample of the blend for 16 to 4,096 tasks
and of the sample index of one corpus; then, for a whole plan of so many samples and 100 tasks built
with all cores, seconds, bytes a sample, peak memory, and how long Ctrl-C takes; and draws a plot.
Exit code 2 where megatron-core is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from synthetic_corpora import document_lengths, open_spec, write_corpus, write_run_file

from megaphase.corpus import Corpus
from megaphase.plan import _builder
from megaphase.plan.build import ensure_built, plan_folder
from megaphase.plan.index import block_size, builder_threads
from megaphase.plan.stream import DOCUMENTS_PER_CALL, Stream
from megaphase.utils.errors import EXIT_WRONG_INPUT

matplotlib.use("Agg")

BLENDED_TASKS = (16, 64, 256, 1024, 4096)
BLENDED_SAMPLES = 1 << 21
SEQ_LEN = 2048
MEAN_DOCUMENT = 1000
WHOLE_TASKS = 100
WHOLE_DOCUMENTS = 100_000_000
TURNS = 5


@dataclass(frozen=True)
class Pair:
    """Seconds of each turn of both sides."""

    ours: list[float]
    theirs: list[float]

    @property
    def ratio(self) -> float:
        """How many times quicker this builder is: the median over the turns."""
        return statistics.median(b / a for a, b in zip(self.ours, self.theirs, strict=True))


def take_turns(ours: Callable[[], object], theirs: Callable[[], object], turns: int) -> Pair:
    """Run both sides alternately, once unmeasured so that memory has been touched."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + 1):
        for side, work in enumerate((ours, theirs)):
            began = time.perf_counter()
            work()
            if turn > 0:
                seconds[side].append(time.perf_counter() - began)
    return Pair(*seconds)


def blend_pair(tasks: int) -> Pair:
    """Both builders' blend of the same log-normal rates."""
    from megatron.core.datasets import helpers_cpp

    shares = np.random.default_rng(tasks).lognormal(0, 1, tasks)
    shares /= shares.sum()
    weights = [int(share * 2**60) + 1 for share in shares]
    block = block_size(tasks)
    order = np.zeros(BLENDED_SAMPLES, np.uint16)
    counts = np.zeros((-(-BLENDED_SAMPLES // block), tasks), np.int64)
    their_order = np.zeros(BLENDED_SAMPLES, np.int16)
    their_numbers = np.zeros(BLENDED_SAMPLES, np.int64)
    return take_turns(
        lambda: _builder.DeadlineBlend(weights).fill(order, counts, block),
        lambda: helpers_cpp.build_blending_indices(
            their_order, their_numbers, shares, tasks, BLENDED_SAMPLES, False
        ),
        TURNS,
    )


def sample_index_pair(folder: Path, documents: int) -> tuple[Pair, Pair, int]:
    """(index alone, with the shuffles that Megatron's needs, samples) for one epoch of one corpus.

    This builder's index needs no other arrays: its shuffles are computed when a sample is read.
    """
    from megatron.core.datasets import helpers

    lengths = document_lengths(documents, MEAN_DOCUMENT, seed=1)
    write_corpus(folder / "one", lengths, seed=1, with_tokens=False)
    corpus = Corpus.open(folder / "one")
    stream = Stream("one", corpus, seed=1, seq_len=SEQ_LEN, fraction=0.0, held_out=False)
    starts = np.zeros((stream.samples_per_epoch, 2), stream.start_dtype)
    tokens = int(lengths.sum(dtype=np.int64))
    random = np.random.RandomState(1)
    shuffled = np.arange(documents, dtype=np.int32)
    random.shuffle(shuffled)

    def ours() -> None:
        walk, done = stream.walk(0), 0
        while done < len(starts):
            done += walk.fill(starts[done:], DOCUMENTS_PER_CALL)

    def theirs() -> np.ndarray:
        return helpers.build_sample_idx(lengths, shuffled, SEQ_LEN, 1, tokens)

    def theirs_with_shuffles() -> None:
        order = np.arange(documents, dtype=np.int32)
        random.shuffle(order)
        samples = helpers.build_sample_idx(lengths, order, SEQ_LEN, 1, tokens)
        random.shuffle(np.arange(len(samples) - 1, dtype=np.uint32))

    return (
        take_turns(ours, theirs, 3),
        take_turns(ours, theirs_with_shuffles, 1),
        stream.samples_per_epoch,
    )


def prepare_whole(folder: Path, samples: int) -> Path:
    """A run file of two phases over 100 corpora with Zipf sizes; the files have no tokens."""
    sizes = 1 / np.arange(1, WHOLE_TASKS + 1)
    sizes = np.maximum(sizes / sizes.sum() * min(WHOLE_DOCUMENTS, samples // 4), 100)
    names = [f"task{number:03}" for number in range(WHOLE_TASKS)]
    for seed, (name, size) in enumerate(zip(names, sizes, strict=True)):
        lengths = document_lengths(int(size), MEAN_DOCUMENT, seed)
        write_corpus(folder / name, lengths, seed, with_tokens=False)
    steps = samples // 1000
    phases = [
        {"name": "pretrain", "steps": steps * 8 // 10, "mixture": {"proportional": True}},
        {"name": "joint", "steps": steps - steps * 8 // 10, "mixture": {"temperature": 3.3}},
    ]
    return write_run_file(folder, names, seq_len=SEQ_LEN, batch=1000, phases=phases)


def build_whole(run_file: Path, interrupt_at: float) -> None:
    """The process that builds; it interrupts itself as Ctrl-C would once that part is done."""
    config, spec = open_spec(run_file)
    samples = sum(phase.steps for phase in spec.phases) * spec.samples_per_step
    done = {"blend of pretrain": 0, "blend of joint": 0, "sample index": 0}

    def progress(what: str, now: int, of: int) -> None:
        done[what] = now
        if sum(done.values()) > interrupt_at * 2 * samples:
            (config.output / "interrupted").write_text(str(time.time()))
            signal.raise_signal(signal.SIGINT)

    # A shell that starts a script in the background makes it deaf to Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        ensure_built(spec, config.output, progress=progress)


@dataclass(frozen=True)
class Watched:
    """What a process took: wall-clock seconds, and the most memory that it had at a time."""

    seconds: float
    anonymous_bytes: int
    mapped_bytes: int


def watch(run_file: Path, interrupt_at: float = 2.0) -> Watched:
    """Build in a process of its own and look at its memory every 20 ms."""
    process = multiprocessing.get_context("spawn").Process(
        target=build_whole, args=(run_file, interrupt_at)
    )
    began = time.perf_counter()
    process.start()
    anonymous = mapped = 0
    while process.is_alive():
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            break
        figures = dict(line.split(":", 1) for line in status.splitlines())
        anonymous = max(anonymous, _kilobytes(figures.get("RssAnon", "0 kB")))
        mapped = max(mapped, _kilobytes(figures.get("RssFile", "0 kB")))
        process.join(0.02)
    process.join()
    return Watched(time.perf_counter() - began, 1024 * anonymous, 1024 * mapped)


def _kilobytes(field: str) -> int:
    return int(field.split()[0])


def report_whole(folder: Path, samples: int) -> None:
    """Build a whole plan, check it again, and interrupt two builds of it."""
    print(f"\npreparing {WHOLE_TASKS} corpora ...", flush=True)
    run_file = prepare_whole(folder, samples)
    config, spec = open_spec(run_file)
    built = watch(run_file)
    index = plan_folder(config.output, spec)
    size = sum(path.stat().st_size for path in index.iterdir())
    samples = sum(phase.steps for phase in spec.phases) * spec.samples_per_step
    print(f"\nwhole plan: {samples:,} samples, {WHOLE_TASKS} tasks, {builder_threads()} threads")
    print(f"  built in {built.seconds:.1f} s, {built.seconds / samples * 1e9:.0f} ns a sample")
    print(f"  {size / samples:.2f} bytes a sample on disk ({size / 1e9:.2f} GB)")
    print(f"  peak memory {built.anonymous_bytes / 1e6:,.0f} MB anonymous, and pages of the")
    print(f"  mapped corpora {built.mapped_bytes / 1e6:,.0f} MB; of the output nothing is mapped")
    print(f"  floor: the disk writes these bytes in {size / disk_speed(folder):.1f} s")
    began = time.perf_counter()
    ensure_built(spec, config.output)
    print(f"  found whole again in {time.perf_counter() - began:.1f} s")
    for part in (0.25, 0.75):
        shutil.rmtree(index, ignore_errors=True)
        watch(run_file, interrupt_at=part)
        stopped = time.time() - float((config.output / "interrupted").read_text())
        began = time.perf_counter()
        while any(config.output.rglob("*.partial")):
            time.sleep(0.02)
        removed = stopped + time.perf_counter() - began
        print(
            f"  Ctrl-C at {part:.0%}: the process was gone after {stopped:.2f} s, what it had "
            f"written after {removed:.2f} s"
        )


def disk_speed(folder: Path) -> float:
    """Bytes a second that the disk takes when it has to keep them."""
    block = os.urandom(1 << 24)
    began = time.perf_counter()
    with open(folder / "speed", "wb") as file:
        for _ in range(64):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    speed = 64 * len(block) / (time.perf_counter() - began)
    (folder / "speed").unlink()
    return speed


def draw(pairs: dict[int, Pair], path: Path) -> None:
    """ns a sample of both blends over the number of tasks."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    for side, label in (("theirs", "megatron-core"), ("ours", "megaphase")):
        times = [_ns(getattr(pair, side)) for pair in pairs.values()]
        axes.plot(list(pairs), times, marker="o", label=label)
        for tasks, ns in zip(pairs, times, strict=True):
            axes.annotate(f"{ns:.0f}", (tasks, ns), (0, 7), textcoords="offset points", ha="center")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(pairs), [f"{tasks:,}" for tasks in pairs])
    axes.margins(y=0.15)
    axes.set_xlabel("tasks")
    axes.set_ylabel("ns a sample, one thread")
    axes.set_title("Building the blend")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _ns(seconds: list[float]) -> float:
    return statistics.median(seconds) / BLENDED_SAMPLES * 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--whole", type=float, default=2e7, help="samples of the whole plan")
    parser.add_argument("--documents", type=int, default=10_000_000, help="of the one corpus")
    parser.add_argument("--plot", type=Path, default=Path("plan-builder.png"))
    parser.add_argument("--folder", type=Path, help="where corpora and plan go, for a while")
    options = parser.parse_args()
    if importlib.util.find_spec("megatron") is None:
        print("megatron-core is missing: pip install -c constraints.txt -e '.[benchmark]'")
        return EXIT_WRONG_INPUT

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import megatron.core.datasets.helpers  # noqa: F401

    print(f"blend, one thread, {BLENDED_SAMPLES:,} samples, ns a sample (median of {TURNS})")
    print(f"{'tasks':>8} {'megaphase':>10} {'megatron':>10} {'ratio':>7}")
    pairs = {}
    for tasks in BLENDED_TASKS:
        pair = pairs[tasks] = blend_pair(tasks)
        print(f"{tasks:>8,} {_ns(pair.ours):>10.1f} {_ns(pair.theirs):>10.1f} {pair.ratio:>7.1f}")
    growth = _ns(pairs[BLENDED_TASKS[-1]].ours) / _ns(pairs[BLENDED_TASKS[0]].ours)
    print(
        f"from {BLENDED_TASKS[0]} to {BLENDED_TASKS[-1]:,} tasks megaphase grows {growth:.1f}-fold"
    )
    print("bytes a sample of the blend: megaphase 2 and at most 0.5, megatron 10")
    draw(pairs, options.plot)

    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        alone, with_shuffles, samples = sample_index_pair(folder, options.documents)
        print(f"\nsample index, one thread, {options.documents:,} documents, {samples:,} samples")
        for what, pair in (("index", alone), ("index and shuffles", with_shuffles)):
            ours, theirs = (
                statistics.median(side) / options.documents * 1e9
                for side in (pair.ours, pair.theirs)
            )
            print(f"  {what:18} ns a document: megaphase {ours:.1f}, megatron {theirs:.1f}, "
                  f"ratio {pair.ratio:.1f}")  # fmt: skip
        print("  bytes a sample: megaphase 8; megatron 8 or 16, 4 or 8 for the shuffle, and 4 or 8")
        print("  for every document and epoch")
        report_whole(folder, int(options.whole))
    return 0


if __name__ == "__main__":
    sys.exit(main())
