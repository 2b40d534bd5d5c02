"""Compare tokenizing with bare sentencepiece and a preprocessor like Megatron-LM's, in one run.

    pip install -c constraints.txt -e '.[benchmark]'
    python benchmarks/tokenizing.py --corpora ../shared/corpora

The texts of FOLDER/*.jsonl.gz, in any languages, are repeated up to --megabytes. Three sides take
turns, each in new processes:

- the lower bound: `SentencePieceProcessor.encode` in a bare loop over texts in memory, in as many
  processes at once as there are workers, before and after the others;
- a `multiprocessing.Pool` that encodes a document at a time and whose main process writes with
  megatron-core's IndexedDatasetBuilder, as Megatron-LM's tools/preprocess_data.py does;
- `megaphase data tokenize`, from text file to corpus.

MB are 10^6 bytes of the documents' UTF-8 text; the start of processes is included for both tools. A
worker's speed is also given per CPU second of the workers, which other work on the machine changes
less, without the start of each (about half a second). It also prints the largest memory of a
worker, and the speed of verifying compared with `cat` of the same files.

Then both backends, sentencepiece and `tokenizers` (a byte-level BPE of the same size), each beside
its library. On one core, a bare loop that parses the JSON lines and encodes a text at a time takes
turns with the work of one worker, a chunk of the file each, in CPU seconds. On all cores, the
library's batches take turns with `megaphase data tokenize`, whose start is part of its seconds.
`--backends` measures only these. Exit code 2 if megatron-core, without that option, or the corpora
are missing.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import multiprocessing
import os
import pickle
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import sentencepiece

from megaphase.tokenizer import MODEL_NAME, TOKENIZER_JSON_NAME
from megaphase.utils.errors import EXIT_WRONG_INPUT

ROUNDS = 5
VOCAB_SIZE = 16_000
FLOOR_BYTES = 40e6


Result = TypeVar("Result")


class Speed(NamedTuple):
    """Bytes per second of all workers together and per CPU second; largest memory of a worker."""

    wall: float
    core: float
    memory: float


class Usage(NamedTuple):
    """A side's seconds, CPU seconds of all workers, and largest memory of one of them in bytes."""

    seconds: float
    core_seconds: float
    memory: float


def prepare(corpora: list[Path], folder: Path, megabytes: int) -> tuple[Path, Path, int]:
    """Make a tokenizer and a file with the repeated text; return both and the size of the text."""
    from megaphase.data_tools.tokenizers.train import train_tokenizer

    inputs = {path.name.split(".")[0]: [path] for path in corpora}
    train_tokenizer(inputs, folder / "tok", vocab_size=VOCAB_SIZE)
    lines = []
    for path in corpora:
        with gzip.open(path, "rb") as file:
            lines += file.readlines()
    once = sum(len(json.loads(line)["text"].encode()) for line in lines)
    repeats = max(round(megabytes * 1e6 / once), 1)
    with open(folder / "text.jsonl", "wb") as file:
        for _ in range(repeats):
            file.writelines(lines)
    return folder / "tok", folder / "text.jsonl", once * repeats


def floor_speed(model: Path, text: Path, start: Barrier) -> float:
    """Return bytes per CPU second of a bare loop over the texts."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    texts, size = [], 0
    with open(text, "rb") as file:
        for line in file:
            texts.append(json.loads(line)["text"])
            size += len(texts[-1].encode())
            if size > FLOOR_BYTES:
                break
    start.wait()
    began = time.process_time()
    for each in texts:
        processor.encode(each)
    return size / (time.process_time() - began)


def floor(model: Path, text: Path, processes: int) -> float:
    """Return the mean speed of `processes` concurrent bare loops."""
    with multiprocessing.Manager() as manager:
        start = manager.Barrier(processes)
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            runs = [pool.submit(floor_speed, model, text, start) for _ in range(processes)]
            return statistics.mean(run.result() for run in runs)


class MegatronEncoder:
    """A worker's handling of a line in Megatron-LM's preprocess_data."""

    processor: Any

    def __init__(self, model: str, eod: int) -> None:
        self.model, self.eod = model, eod

    def initializer(self) -> None:
        """Load the tokenizer once in every worker."""
        MegatronEncoder.processor = sentencepiece.SentencePieceProcessor(model_file=self.model)

    def encode(self, line: str) -> tuple[dict[str, list[int]], dict[str, list[int]], int]:
        """Return token ids and lengths by key, and the line's length."""
        tokens = MegatronEncoder.processor.encode_as_ids(json.loads(line)["text"])
        tokens.append(self.eod)
        return {"text": tokens}, {"text": [len(tokens)]}, len(line)


def run_megatron(tok: Path, text: Path, out: Path, workers: int) -> None:
    """The loop of Megatron-LM's tools/preprocess_data.py."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    encoder = MegatronEncoder(str(tok / "tokenizer.model"), 0)
    builder = IndexedDatasetBuilder(f"{out}.bin", dtype=DType.optimal_dtype(VOCAB_SIZE))
    with (
        open(text, encoding="utf-8") as lines,
        multiprocessing.Pool(workers, initializer=encoder.initializer) as pool,
    ):
        for tokens, lengths, _ in pool.imap(encoder.encode, lines, 32):
            builder.add_document(tokens["text"], lengths["text"])
    builder.finalize(f"{out}.idx")


def run_megaphase(tok: Path, text: Path, out: Path, workers: int) -> None:
    """`megaphase data tokenize`."""
    from megaphase.data_tools.tokenization.tokenize import tokenize

    tokenize([text], tok, out, workers=workers, overwrite=True)


def speed_of(size: int, start: Usage, whole: Usage, workers: int) -> Speed:
    """Return a side's speed on `size` bytes; `start` is the usage of starting one worker."""
    core_seconds = whole.core_seconds - workers * start.core_seconds
    return Speed(size / whole.seconds, size / core_seconds, whole.memory)


def run_alone(side: Callable[..., None], *arguments: Any) -> Usage:
    """Run a side in a separate process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(os.getpid).result()
        began = time.perf_counter()
        used = pool.submit(run_and_measure, side, *arguments).result()
        return Usage(time.perf_counter() - began, *used)


def run_and_measure(side: Callable[..., None], *arguments: Any) -> tuple[float, float]:
    """Run a side; return its children's CPU seconds and the largest memory of one in bytes."""
    side(*arguments)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def command_seconds(command: list[str]) -> float:
    """Return the seconds that a command takes."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def measure(folder: Path, corpora: list[Path], megabytes: int, workers: int) -> None:
    """Print one line per round, and the medians."""
    tok, text, size = prepare(corpora, folder, megabytes)
    print(f"{size / 1e6:.0f} MB of text, {len(corpora)} languages, {workers} workers; MB/s:")
    print(f"{'together':>33}   {'a core-second of the workers':>42}")
    names = ("Pool", "megaphase", "ratio", "floor", "Pool", "megaphase", "/ floor")
    print(" ".join(f"{name:>10}" for name in names))
    line = folder / "line.jsonl"
    line.write_text('{"text": "one"}\n')
    rows, memory = [], 0.0
    for _ in range(ROUNDS):
        before = floor(tok / "tokenizer.model", text, workers)
        sides = []
        for side, out in (
            (run_megatron, folder / "megatron"),
            (run_megaphase, folder / "megaphase"),
        ):
            start = run_alone(side, tok, line, out, 1)
            sides.append(speed_of(size, start, run_alone(side, tok, text, out, workers), workers))
        megatron, megaphase = sides
        bare = (before + floor(tok / "tokenizer.model", text, workers)) / 2
        memory = max(memory, megaphase.memory)
        speeds = (megatron.wall, megaphase.wall, bare, megatron.core, megaphase.core)
        rows.append(speeds)
        print_row(*speeds, megaphase.wall / megatron.wall, megaphase.core / bare)
    together = statistics.median(row[1] / row[0] for row in rows)
    a_core = statistics.median(row[4] / row[2] for row in rows)
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    print_row(*medians, together, a_core)
    print(f"most memory of a worker: {memory / 1e6:.0f} MB")
    compare_bytes(folder)
    compare_verify(folder)


class Bare(NamedTuple):
    """A library's own encoding of the lines of a file, as it is called in a process."""

    library: str
    tok: Path
    text: Path

    def encoder(self) -> Any:
        """Return the library's tokenizer."""
        if self.library == "sentencepiece":
            return sentencepiece.SentencePieceProcessor(model_file=str(self.tok / MODEL_NAME))
        import tokenizers

        return tokenizers.Tokenizer.from_file(str(self.tok / TOKENIZER_JSON_NAME))

    def paired(self) -> tuple[float, float]:
        """Encode each chunk of the file with a bare loop over its lines and as a worker of `data
        tokenize` does, in turns; return the CPU seconds of both."""
        from megaphase.data_tools.text import Reading, read_chunks
        from megaphase.data_tools.tokenization.chunk_encoder import ChunkEncoder
        from megaphase.tokenizer import Tokenizer

        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        encoder = self.encoder()
        worker = ChunkEncoder(Tokenizer.load(self.tok), Reading())
        bare = own = 0.0
        for chunk in read_chunks(self.text, Reading()):
            began = time.process_time()
            for line in chunk.data.splitlines():
                ids = encoder.encode(json.loads(line)["text"])
                ids = ids if self.library == "sentencepiece" else ids.ids
            between = time.process_time()
            pickle.dumps(worker((0, chunk)))  # sent to the process that writes
            bare += between - began
            own += time.process_time() - between
        return bare, own

    def batches(self) -> Usage:
        """Parse all lines, then encode batches of 1,000 with threads on all cores."""
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        encoder = self.encoder()
        lines = self.text.read_bytes().splitlines()
        began, core_began = time.perf_counter(), time.process_time()
        for first in range(0, len(lines), 1000):
            texts = [json.loads(line)["text"] for line in lines[first : first + 1000]]
            if self.library == "sentencepiece":
                encoder.encode(texts, num_threads=len(os.sched_getaffinity(0)))
            else:
                [each.ids for each in encoder.encode_batch(texts)]
        return Usage(time.perf_counter() - began, time.process_time() - core_began, 0.0)


def in_new_process(call: Callable[[], Result]) -> Result:
    """Call in a separate process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call).result()


def compare_backends(folder: Path, corpora: list[Path], megabytes: int, workers: int) -> None:
    """Print one line per backend and round, and the medians of the ratios."""
    from megaphase.data_tools.tokenizers.train import train_tokenizer

    tok, text, size = prepare(corpora, folder, megabytes)
    inputs = {path.name.split(".")[0]: [path] for path in corpora}
    byte_level = folder / "byte-level"
    train_tokenizer(inputs, byte_level, vocab_size=VOCAB_SIZE, library="tokenizers")
    print(f"{size / 1e6:.0f} MB of text; MB/s, for a core-second, and for a second with all cores:")
    both = ("batches", f"{workers} workers", "ratio")
    names = ("backend", "bare loop", "a worker", "ratio", *both, *both)
    print(" ".join(f"{name:>13}" for name in names))
    line = folder / "line.jsonl"
    line.write_text('{"text": "one"}\n')
    for library, path in (("sentencepiece", tok), ("tokenizers", byte_level)):
        rows: list[tuple[float, ...]] = []
        bare = Bare(library, path, text)
        for _ in range(ROUNDS):
            loop, worker = (size / seconds for seconds in in_new_process(bare.paired))
            start = run_alone(run_megaphase, path, line, folder / "line", 1)
            batches = in_new_process(bare.batches)
            many = run_alone(run_megaphase, path, text, folder / "many", workers)
            both = size / batches.core_seconds, speed_of(size, start, many, workers).core
            together = size / batches.seconds, size / many.seconds
            rows.append(
                tuple(part for a, b in ((loop, worker), both, together) for part in (a, b, b / a))
            )
            print_backend(library, rows[-1])
        print_backend("median", tuple(statistics.median(it) for it in zip(*rows, strict=True)))


def print_backend(name: str, row: Sequence[float]) -> None:
    """Print one line of the table: three times two speeds and their ratio."""
    values = [f"{value:.2f}" if i % 3 == 2 else f"{value / 1e6:.2f}" for i, value in enumerate(row)]
    print(" ".join(f"{value:>13}" for value in (name, *values)), flush=True)


def print_row(*row: float) -> None:
    """Print one line of the table: five speeds and the two ratios."""
    speeds = [f"{value / 1e6:10.1f}" for value in row[:5]]
    ratios = [f"{value:10.2f}" for value in row[5:]]
    print(" ".join([*speeds[:2], ratios[0], *speeds[2:], ratios[1]]), flush=True)


def compare_bytes(folder: Path) -> None:
    """Check that both sides have written the same tokens."""
    same = (folder / "megaphase.bin").read_bytes() == (folder / "megatron.bin").read_bytes()
    print(f"tokens of both sides: {'the same' if same else 'DIFFERENT'}")


def compare_verify(folder: Path) -> None:
    """Measure `data verify`, without its start, compared with `cat` of the same files."""
    from megaphase.data_tools.corpora.verify import verify_corpus

    files = [str(folder / f"megaphase{suffix}") for suffix in (".bin", ".idx", ".hash", ".sum")]
    size = sum(os.path.getsize(file) for file in files)
    for _ in range(ROUNDS):
        cat = command_seconds(["sh", "-c", 'cat "$@" | cat > /dev/null', "sh", *files])
        began = time.perf_counter()
        verify_corpus(folder / "megaphase")
        seconds = time.perf_counter() - began
        print(
            f"verify {size / 1e6 / seconds:,.0f} MB/s, cat {size / 1e6 / cat:,.0f} MB/s, "
            f"ratio {cat / seconds:.2f}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpora", type=Path, required=True, help="a folder of *.jsonl.gz")
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--backends", action="store_true", help="without Megatron-LM's")
    arguments = parser.parse_args()
    corpora = sorted(arguments.corpora.glob("*.jsonl.gz"))
    with_megatron = importlib.util.find_spec("megatron") is not None
    if not corpora or not (with_megatron or arguments.backends):
        missing = "megatron-core" if corpora else f"{arguments.corpora}/*.jsonl.gz"
        print(f"{missing} is missing: see the top of this file", file=sys.stderr)
        return EXIT_WRONG_INPUT
    names = ["sentencepiece", "tokenizers", *([] if arguments.backends else ["megatron-core"])]
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {versions}")
    if not arguments.backends:
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), corpora, arguments.megabytes, arguments.workers)
    with tempfile.TemporaryDirectory() as folder:
        compare_backends(Path(folder), corpora, arguments.megabytes, arguments.workers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
