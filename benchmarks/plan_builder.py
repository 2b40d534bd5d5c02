"""Compare the plan builder with the compiled helpers of megatron-core, in one run.

    pip install -c constraints.txt -e '.[benchmark]'
    python benchmarks/plan_builder.py --whole 1e9

Prints, for both sides alternately on one thread: ns per sample of the blend for 2 to 4,096 tasks,
for this builder also where rates change, and of the sample index of one corpus. Then, for a whole
plan of the given number of samples and 100 tasks, built with all cores: seconds, bytes per sample,
peak memory, and the time that Ctrl-C takes.
Draws a plot. Exit code 2 if megatron-core is missing.
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
from megaphase.plan.rate_curves import integer_pieces, piece_bounds
from megaphase.plan.stream import Stream
from megaphase.plan.task_documents import DOCUMENTS_PER_CALL
from megaphase.utils.errors import EXIT_WRONG_INPUT

matplotlib.use("Agg")

BLENDED_TASKS = (2, 16, 64, 100, 256, 1024, 4096)
BLENDED_SAMPLES = 1 << 21
MOST_TASKS = 65_535  # of which only this builder's blend is measured: the other takes minutes
SEQ_LEN = 2048
MEAN_DOCUMENT = 1000
WHOLE_TASKS = 100
WHOLE_DOCUMENTS = 100_000_000
TURNS = 5


@dataclass(frozen=True)
class Pair:
    """The seconds of each turn of both sides."""

    megaphase: list[float]
    megatron: list[float]

    @property
    def ratio(self) -> float:
        """How many times faster this builder is: the median over the turns."""
        return statistics.median(b / a for a, b in zip(self.megaphase, self.megatron, strict=True))


def take_turns(megaphase: Callable[[], object], megatron: Callable[[], object], turns: int) -> Pair:
    """Run both sides alternately, after an unmeasured run that touches the memory."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + 1):
        for side, work in enumerate((megaphase, megatron)):
            began = time.perf_counter()
            work()
            if turn > 0:
                seconds[side].append(time.perf_counter() - began)
    return Pair(*seconds)


def log_normal_rates(tasks: int) -> np.ndarray:
    """Return rates of the tasks, float64 [tasks]."""
    shares = np.random.default_rng(tasks).lognormal(0, 1, tasks)
    rates: np.ndarray = shares / shares.sum()
    return rates


def blend_at_constant_rates(tasks: int) -> Callable[[], object]:
    """Return a function that makes this builder's blend."""
    weights = [int(share * 2**60) + 1 for share in log_normal_rates(tasks)]
    block = block_size(tasks)
    order = np.zeros(BLENDED_SAMPLES, np.uint16)
    counts = np.zeros((-(-BLENDED_SAMPLES // block), tasks), np.int64)
    return lambda: _builder.DeadlineBlend(weights).fill(order, counts, block)


def blend_pair(tasks: int) -> Pair:
    """Measure both builders' blends of the same log-normal rates."""
    from megatron.core.datasets import helpers_cpp

    shares = log_normal_rates(tasks)
    megatron_order = np.zeros(BLENDED_SAMPLES, np.int16)
    megatron_numbers = np.zeros(BLENDED_SAMPLES, np.int64)
    return take_turns(
        blend_at_constant_rates(tasks),
        lambda: helpers_cpp.build_blending_indices(
            megatron_order, megatron_numbers, shares, tasks, BLENDED_SAMPLES, False
        ),
        TURNS,
    )


def changing_blend_seconds(tasks: int) -> list[float]:
    """Measure this builder's blend of rates that change from `blend_pair`'s to their reverse."""
    shares = log_normal_rates(tasks)
    bounds = piece_bounds(BLENDED_SAMPLES, tasks)
    middles = ((bounds[:-1] + bounds[1:]) / 2 / BLENDED_SAMPLES)[:, np.newaxis]
    rates = shares + (shares[::-1] - shares) * middles
    weights, _ = integer_pieces(rates, bounds, np.zeros(tasks, np.int64), [])
    block = block_size(tasks)
    order = np.zeros(BLENDED_SAMPLES, np.uint16)
    counts = np.zeros((-(-BLENDED_SAMPLES // block), tasks), np.int64)
    seconds = []
    for _ in range(TURNS + 1):
        began = time.perf_counter()
        _builder.PiecewiseDeadlineBlend(bounds.astype(np.uint64), weights).fill(
            order, counts, block
        )
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def sample_index_pair(folder: Path, documents: int) -> tuple[Pair, Pair, int]:
    """Measure one epoch of one corpus: (index alone, index with Megatron's shuffles, samples).

    This builder's index needs no shuffle arrays: shuffles are computed when a sample is read.
    """
    from megatron.core.datasets import helpers

    lengths = document_lengths(documents, MEAN_DOCUMENT, seed=1)
    write_corpus(folder / "one", lengths, seed=1, with_tokens=False)
    corpus = Corpus.open(folder / "one")
    stream = Stream("one", corpus, seed=1, seq_len=SEQ_LEN, fraction=0.0)
    starts = np.zeros((stream.samples_per_epoch, 2), stream.start_dtype)
    tokens = int(lengths.sum(dtype=np.int64))
    random = np.random.RandomState(1)
    shuffled = np.arange(documents, dtype=np.int32)
    random.shuffle(shuffled)

    def megaphase() -> None:
        walk, done = stream.walk(0), 0
        while done < len(starts):
            done += walk.fill(starts[done:], DOCUMENTS_PER_CALL)

    def megatron() -> np.ndarray:
        return helpers.build_sample_idx(lengths, shuffled, SEQ_LEN, 1, tokens)

    def megatron_with_shuffles() -> None:
        order = np.arange(documents, dtype=np.int32)
        random.shuffle(order)
        samples = helpers.build_sample_idx(lengths, order, SEQ_LEN, 1, tokens)
        random.shuffle(np.arange(len(samples) - 1, dtype=np.uint32))

    return (
        take_turns(megaphase, megatron, 3),
        take_turns(megaphase, megatron_with_shuffles, 1),
        stream.samples_per_epoch,
    )


def prepare_whole(folder: Path, samples: int) -> Path:
    """Write a run file of two phases over 100 corpora with Zipf sizes, without tokens."""
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
    """Build in this process, and send it Ctrl-C when that part is done."""
    config, spec = open_spec(run_file)
    samples = sum(phase.samples for phase in spec.phases)
    done: dict[str, int] = {}

    def progress(what: str, now: int, of: int) -> None:
        done[what] = now
        if sum(done.values()) > interrupt_at * 2 * samples:  # of the blends and of the index
            (config.output / "interrupted").write_text(str(time.time()))
            signal.raise_signal(signal.SIGINT)

    # A shell that starts a script in the background makes it ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        ensure_built(spec, config.output, progress=progress)


@dataclass(frozen=True)
class Watched:
    """A process's wall-clock seconds and the largest memory that it had at a time."""

    seconds: float
    anonymous_bytes: int
    mapped_bytes: int


def watch(run_file: Path, interrupt_at: float = 2.0) -> Watched:
    """Build in a separate process and sample its memory every 20 ms."""
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
    """Build a whole plan, verify it again, and interrupt two builds of it."""
    print(f"\npreparing {WHOLE_TASKS} corpora ...", flush=True)
    run_file = prepare_whole(folder, samples)
    config, spec = open_spec(run_file)
    built = watch(run_file)
    index = plan_folder(config.output, spec)
    size = sum(path.stat().st_size for path in index.iterdir())
    samples = sum(phase.samples for phase in spec.phases)
    print(f"\nwhole plan: {samples:,} samples, {WHOLE_TASKS} tasks, {builder_threads()} threads")
    print(f"  built in {built.seconds:.1f} s, {built.seconds / samples * 1e9:.0f} ns per sample")
    print(f"  {size / samples:.2f} bytes per sample on disk ({size / 1e9:.2f} GB)")
    print(f"  peak memory {built.anonymous_bytes / 1e6:,.0f} MB anonymous, and pages of the")
    print(f"  mapped corpora {built.mapped_bytes / 1e6:,.0f} MB; the output is not mapped")
    print(f"  lower bound: the disk writes these bytes in {size / disk_speed(folder):.1f} s")
    began = time.perf_counter()
    ensure_built(spec, config.output)
    print(f"  verified again in {time.perf_counter() - began:.1f} s")
    for part in (0.25, 0.75):
        shutil.rmtree(index, ignore_errors=True)
        watch(run_file, interrupt_at=part)
        stopped = time.time() - float((config.output / "interrupted").read_text())
        began = time.perf_counter()
        while any(config.output.rglob("*.partial")):
            time.sleep(0.02)
        removed = stopped + time.perf_counter() - began
        print(
            f"  Ctrl-C at {part:.0%}: the process ended after {stopped:.2f} s, its output "
            f"was removed after {removed:.2f} s"
        )


def disk_speed(folder: Path) -> float:
    """Return the bytes per second that the disk writes durably."""
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
    """Plot ns per sample of both blends over the number of tasks."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    for side, label in (("megatron", "megatron-core"), ("megaphase", "megaphase")):
        times = [_ns(getattr(pair, side)) for pair in pairs.values()]
        axes.plot(list(pairs), times, marker="o", label=label)
        for tasks, ns in zip(pairs, times, strict=True):
            axes.annotate(f"{ns:.0f}", (tasks, ns), (0, 7), textcoords="offset points", ha="center")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(pairs), [f"{tasks:,}" for tasks in pairs])
    axes.margins(y=0.15)
    axes.set_xlabel("tasks")
    axes.set_ylabel("ns per sample, one thread")
    axes.set_title("Building the blend")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _ns(seconds: list[float]) -> float:
    return statistics.median(seconds) / BLENDED_SAMPLES * 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--whole", type=float, default=2e7, help="samples of the whole plan")
    parser.add_argument("--documents", type=int, default=10_000_000, help="documents of one corpus")
    parser.add_argument("--plot", type=Path, default=Path("plan-builder.png"))
    parser.add_argument("--folder", type=Path, help="temporary folder for corpora and plan")
    options = parser.parse_args()
    if importlib.util.find_spec("megatron") is None:
        print("megatron-core is missing: pip install -c constraints.txt -e '.[benchmark]'")
        return EXIT_WRONG_INPUT

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import megatron.core.datasets.helpers  # noqa: F401

    print(f"blend, one thread, {BLENDED_SAMPLES:,} samples, ns per sample (median of {TURNS})")
    print(f"{'tasks':>8} {'megaphase':>10} {'megatron':>10} {'ratio':>7} {'changing':>10}")
    pairs = {}
    for tasks in BLENDED_TASKS:
        pair = pairs[tasks] = blend_pair(tasks)
        figures = f"{_ns(pair.megaphase):>10.1f} {_ns(pair.megatron):>10.1f} {pair.ratio:>7.1f}"
        changing = statistics.median(changing_blend_seconds(tasks)) / BLENDED_SAMPLES * 1e9
        print(f"{tasks:>8,} {figures} {changing:>10.1f}")
    work, seconds = blend_at_constant_rates(MOST_TASKS), []
    for _ in range(TURNS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    print(f"{MOST_TASKS:>8,} {_ns(seconds):>10.1f}")
    growth = _ns(pairs[BLENDED_TASKS[-1]].megaphase) / _ns(pairs[BLENDED_TASKS[0]].megaphase)
    print(
        f"from {BLENDED_TASKS[0]} to {BLENDED_TASKS[-1]:,} tasks megaphase grows {growth:.1f}-fold"
    )
    print("bytes per sample of the blend: megaphase 2 and at most 0.5, megatron 10")
    draw(pairs, options.plot)

    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        alone, with_shuffles, samples = sample_index_pair(folder, options.documents)
        print(f"\nsample index, one thread, {options.documents:,} documents, {samples:,} samples")
        for what, pair in (("index", alone), ("index and shuffles", with_shuffles)):
            megaphase_ns, megatron_ns = (
                statistics.median(side) / options.documents * 1e9
                for side in (pair.megaphase, pair.megatron)
            )
            print(f"  {what:18} ns per document: megaphase {megaphase_ns:.1f}, "
                  f"megatron {megatron_ns:.1f}, "
                  f"ratio {pair.ratio:.1f}")  # fmt: skip
        print("  bytes per sample: megaphase 8; megatron 8 or 16, 4 or 8 for the shuffle, and")
        print("  4 or 8 for every document and epoch")
        report_whole(folder, int(options.whole))
    return 0


if __name__ == "__main__":
    sys.exit(main())
