"""How many workers one process can feed: tokenizing with workers that only sleep.

    python benchmarks/tokenizing_scale.py --corpora FOLDER [--plot PNG]

The process that cuts the text, sends it to the workers and writes what they return is that of
`megaphase data tokenize`, corpus and all. The workers are threads of two other processes; each
sleeps for the time in which a core tokenizes its chunk (--speed) and returns tokens for it that
were made before. It prints the MB of text that the process handles in a second, and in a second of
its processor time, which is its speed on a core of its own. The texts are those of
FOLDER/*.jsonl.gz; a plain file is read by the workers.

Before that, for each kind of file: how fast chunks are read, in MB of text for a core-second, by
the libraries alone and as `data tokenize` does it.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import zstandard

from megaphase.corpus import CorpusWriter, DocumentBatch
from megaphase.corpus.format import HASH_DTYPE
from megaphase.corpus.origins import Origins
from megaphase.data_tools import ordered_pool
from megaphase.data_tools.corpora.encoded import EncodedDocuments
from megaphase.data_tools.text import (
    Reading,
    TextChunk,
    TextRange,
    can_be_ranged,
    ranges_of,
    read_chunks,
)
from megaphase.data_tools.text.prefetch import prefetched
from megaphase.data_tools.tokenization.chunk_encoder import EncodedChunk
from megaphase.utils.errors import EXIT_WRONG_INPUT
from megaphase.utils.plot_style import plot_style

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SECONDS, ROUNDS = 3.0, 3
DOCUMENT_BYTES, BYTES_A_TOKEN = 3000, 4.2
HOSTS = 2


def write_texts(corpora: list[Path], folder: Path, megabytes: int) -> dict[str, Path]:
    """Write the same text plain and compressed; return the files by kind."""
    lines = b"".join(gzip.decompress(path.read_bytes()) for path in corpora)
    data = (lines * (megabytes * 10**6 // len(lines) + 1))[: megabytes * 10**6]
    data = data[: data.rfind(b"\n") + 1]
    kinds = {"plain": "text.jsonl", "gzip": "text.jsonl.gz", "zstd": "text.jsonl.zst"}
    files = {kind: folder / name for kind, name in kinds.items()}
    files["plain"].write_bytes(data)
    files["gzip"].write_bytes(gzip.compress(data, 6))
    files["zstd"].write_bytes(zstandard.compress(data))
    return files


def core_speed(read: Callable[[], int]) -> float:
    """Return the MB for a core-second, the median of some rounds; read: returns bytes."""
    speeds = []
    for _ in range(ROUNDS):
        began = time.process_time()
        size = read()
        speeds.append(size / (time.process_time() - began) / 1e6)
    return statistics.median(speeds)


def plain_bytes(path: Path) -> int:
    """Read a file to its end."""
    with open(path, "rb", buffering=0) as file:
        return sum(map(len, iter(lambda: file.read(1 << 18), b"")))


def gzip_bytes(path: Path, gzip_file: Callable[..., Any]) -> int:
    """Decompress a file with a library's own reader."""
    with gzip_file(path, "rb") as file:
        return sum(map(len, iter(lambda: file.read(1 << 18), b"")))


def zstd_bytes(path: Path) -> int:
    """Decompress a file with zstandard's own reader."""
    with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        return sum(map(len, iter(lambda: stream.read(1 << 18), b"")))


def compare_reading(files: dict[str, Path]) -> None:
    """Print the speed of reading each kind of file."""
    from isal import igzip

    libraries = {
        "plain": {"read": lambda: plain_bytes(files["plain"])},
        "gzip": {
            "zlib": lambda: gzip_bytes(files["gzip"], gzip.open),
            "isal": lambda: gzip_bytes(files["gzip"], igzip.open),
        },
        "zstd": {"zstandard": lambda: zstd_bytes(files["zstd"])},
    }
    for kind, path in files.items():
        alone = "  ".join(f"{n} {core_speed(read):,.0f}" for n, read in libraries[kind].items())
        chunks = core_speed(
            lambda path=path: sum(len(each.data) for each in read_chunks(path, Reading()))
        )
        print(f"{kind:6} MB for a core-second: {alone}  chunks {chunks:,.0f}", flush=True)


class SleepingWorker:
    """Replaces a worker process of the ordered pool: a thread of a host process."""

    hosts: list[Connection]
    number = itertools.count()

    def __init__(self, speed: float, with_children: bool) -> None:
        self.pipe, worker_end = multiprocessing.Pipe()
        self.hosts[next(self.number) % HOSTS].send((worker_end, speed))
        worker_end.close()
        self.process, self.items = self, 0

    def terminate(self) -> None:
        """End the thread, which receives nothing any more."""
        self.pipe.close()

    def join(self) -> None:
        """Do not wait: the thread ends by itself."""


def host_workers(control: Connection) -> None:
    """Run a thread for each worker until the other side closes the connection."""
    with suppress(EOFError):
        while True:
            worker = threading.Thread(target=sleep_and_answer, args=control.recv(), daemon=True)
            worker.start()


def sleep_and_answer(pipe: Connection, speed: float) -> None:
    """Answer every item after the time in which a core tokenizes its text; bytes a second."""
    items: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=take_items, args=(pipe, items), daemon=True).start()
    with suppress(OSError):
        while (entry := items.get()) is not None:
            number, file, chunk = entry
            time.sleep(len(chunk.data) / speed)
            encoded = documents(len(chunk.data))
            pipe.send((number, True, EncodedChunk(file, chunk.end, chunk.file_bytes, encoded)))


def take_items(pipe: Connection, items: SimpleQueue[Any]) -> None:
    """Receive items while one is worked on, and read the text of ranges."""
    with suppress(EOFError, OSError):
        while True:
            number, (file, item) = pipe.recv()
            chunk = item.chunk(Reading()) if isinstance(item, TextRange) else item
            items.put((number, file, chunk))
    items.put(None)


@cache
def documents(size: int) -> EncodedDocuments:
    """Return documents of so many bytes of text; of few sizes, since most chunks have one."""
    count = max(size // DOCUMENT_BYTES, 1)
    length = int(DOCUMENT_BYTES / BYTES_A_TOKEN)
    batch = DocumentBatch.of(
        np.zeros(count * length, np.uint16),
        np.full(count, length),
        np.zeros(count, HASH_DTYPE),
        [DOCUMENT_BYTES] * count,
        Origins.of([b""] * count, 0),
    )
    return EncodedDocuments(batch, 0)


def items_of(path: Path) -> Generator[tuple[int, TextChunk | TextRange], None, None]:
    """Yield the chunks of a file, or ranges of a plain one, again and again."""
    while True:
        found = ranges_of(path, 0, None) if can_be_ranged(path) else read_chunks(path, Reading())
        yield from ((0, each) for each in found)


class Handled(NamedTuple):
    """MB of text a second, and for each second of the feeding process's processor time."""

    wall: float
    core: float


def feed(path: Path, workers: int, speed: float, folder: Path) -> Handled:
    """Tokenize for some seconds with sleeping workers."""
    writer = CorpusWriter(
        folder / "corpus", tokenizer_hash="", vocab_size=16_000, eod=0, with_origins=True,
        overwrite=True,
    )  # fmt: skip
    items = prefetched(items_of(path), 4)
    # Without an annotation: the task is the speed, which SleepingWorker takes.
    mapped: Any = ordered_pool.ordered_map(speed, items, workers)  # type: ignore[arg-type]
    size = 0
    with writer, closing(items), closing(mapped) as encoded:
        for _ in range(workers):  # until all are at work
            writer.add_batch(next(encoded).documents.batch)
        began, core_began = time.perf_counter(), time.process_time()
        while time.perf_counter() - began < SECONDS:
            chunk = next(encoded)
            writer.add_batch(chunk.documents.batch)
            size += chunk.documents.batch.text_bytes
        seconds, core = time.perf_counter() - began, time.process_time() - core_began
    return Handled(size / seconds / 1e6, size / core / 1e6)


def simulate(
    files: dict[str, Path], speed: float, folder: Path, rounds: int
) -> dict[str, list[Handled]]:
    """Print and return what the process handles with each number of workers."""
    ordered_pool._Worker = SleepingWorker  # type: ignore[misc, assignment]
    found: dict[str, list[Handled]] = {}
    print(f"workers of {speed / 1e6:g} MB/s; MB/s of text (MB for a core-second of the process):")
    for kind, path in files.items():
        found[kind] = []
        for workers in WORKERS:
            each = [feed(path, workers, speed, folder) for _ in range(rounds)]
            found[kind].append(Handled(*map(statistics.median, zip(*each, strict=True))))
            wall, core = found[kind][-1]
            print(f"{kind:6} {workers:4}  {wall:7,.0f}  ({core:7,.0f})", flush=True)
    return found


def draw(found: dict[str, list[Handled]], speed: float, path: Path) -> None:
    """Plot the MB/s over the number of workers."""
    with plot_style():
        figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
        ideal = [workers * speed / 1e6 for workers in WORKERS]
        axes.plot(WORKERS, ideal, linestyle=":", color="gray", label="bound by the workers")
        for kind, handled in found.items():
            axes.plot(WORKERS, [each.wall for each in handled], marker="o", label=kind)
        axes.set(xlabel="workers that only sleep", ylabel="MB/s of text")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(WORKERS, [str(workers) for workers in WORKERS])
        axes.legend(frameon=False)
        figure.savefig(path, dpi=150)


def main() -> int:
    """Measure, and draw if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpora", type=Path, required=True, help="a folder of *.jsonl.gz")
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--speed", type=float, default=8.0, help="MB/s of a worker")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path, metavar="PNG")
    arguments = parser.parse_args()
    corpora = sorted(arguments.corpora.glob("*.jsonl.gz"))
    if not corpora:
        print(f"{arguments.corpora}/*.jsonl.gz is missing", file=sys.stderr)
        return EXIT_WRONG_INPUT
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_texts(corpora, folder, arguments.megabytes)
        compare_reading(files)
        spawn = multiprocessing.get_context("spawn")
        SleepingWorker.hosts = []
        for _ in range(HOSTS):
            own_end, host_end = spawn.Pipe()
            spawn.Process(target=host_workers, args=(host_end,), daemon=True).start()
            SleepingWorker.hosts.append(own_end)
        found = simulate(files, arguments.speed * 1e6, folder, arguments.rounds)
        if arguments.plot is not None:
            draw(found, arguments.speed * 1e6, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
