"""Corpora of any size without text: random document lengths, and random tokens or none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import yaml

from megaphase.config.load import load_run_file
from megaphase.config.run import RunConfig
from megaphase.corpus.batch import checksums
from megaphase.corpus.block_sums import BlockSums
from megaphase.corpus.format import HASH_DTYPE, SUM_DTYPE, write_index
from megaphase.corpus.manifest import BLOCKS_SUFFIX, DATA_SUFFIXES, Manifest
from megaphase.plan.spec import PlanSpec, plan_spec
from megaphase.utils.files import describe_file

TOKENIZER = SimpleNamespace(fingerprint="synthetic", eod=0, adds_bos=False, vocab_size=1 << 16)
VOCAB_SIZE = 32_000
TOKEN_DTYPE = np.dtype("<u2")
CHUNK_TOKENS = 1 << 24


def document_lengths(documents: int, mean: float, seed: int) -> np.ndarray:
    """Return log-normal lengths, many short and a few very long as in web text; int32
    [documents]."""
    lengths = np.random.default_rng(seed).lognormal(0, 1, documents)
    return np.maximum(lengths * (mean / np.exp(0.5)), 1).astype(np.int32)


def write_corpus(prefix: Path, lengths: np.ndarray, seed: int, *, with_tokens: bool) -> None:
    """Write the files of a corpus.

    Without tokens the .bin is a sparse file of the right size, there are no checksums, and it
    cannot be read.
    """
    random = np.random.default_rng(seed)
    suffixes = (*DATA_SUFFIXES, BLOCKS_SUFFIX) if with_tokens else DATA_SUFFIXES
    paths = {suffix: prefix.with_name(prefix.name + suffix) for suffix in suffixes}
    tokens = int(lengths.sum(dtype=np.int64))
    with open(paths[".idx"], "wb") as file:
        write_index(file.write, TOKEN_DTYPE, lengths)
    hashes = random.integers(0, 2**64, len(lengths), dtype=np.uint64).astype(HASH_DTYPE)
    hashes.tofile(paths[".hash"])
    with open(paths[".sum"], "wb") as file:
        file.truncate(len(lengths) * SUM_DTYPE.itemsize)
    with open(paths[".bin"], "wb") as file:
        for first in range(0, tokens if with_tokens else 0, CHUNK_TOKENS):
            size = min(CHUNK_TOKENS, tokens - first)
            random.integers(1, VOCAB_SIZE, size, dtype=TOKEN_DTYPE).tofile(file)
        file.truncate(tokens * TOKEN_DTYPE.itemsize)
    if with_tokens:
        _write_checksums(paths, lengths, hashes)
    # The hash of a large .bin is only used by `data verify`.
    files = {suffix: describe_file(path) for suffix, path in paths.items() if suffix != ".bin"}
    files[".bin"] = {"bytes": tokens * TOKEN_DTYPE.itemsize, "hash": f"synthetic {seed}"}
    manifest = Manifest(
        dtype=TOKEN_DTYPE.name,
        documents=len(lengths),
        tokens=tokens,
        text_bytes=4 * tokens,
        vocab_size=VOCAB_SIZE,
        eod=TOKENIZER.eod,
        tokenizer_hash=TOKENIZER.fingerprint,
        files=files,  # type: ignore[arg-type]
        sources=[],
    )
    manifest.write(prefix)


def _write_checksums(paths: dict[str, Path], lengths: np.ndarray, hashes: np.ndarray) -> None:
    tokens = np.memmap(paths[".bin"], TOKEN_DTYPE, "r")
    sums = np.zeros(len(lengths), SUM_DTYPE)
    sums["checksum"] = checksums(tokens, lengths, hashes, sums["text_bytes"])
    sums.tofile(paths[".sum"])
    blocks = BlockSums()
    with open(paths[BLOCKS_SUFFIX], "wb") as file:
        blocks.add(np.asarray(tokens).view(np.uint8)).tofile(file)
        blocks.end().tofile(file)


def write_run_file(
    folder: Path, tasks: list[str], *, seq_len: int, batch: int, phases: list[dict]
) -> Path:
    """Write a run file over corpora in `folder`; each phase has a name, steps and a mixture."""
    run = {
        "output": "run",
        "tokenizer": "none",
        "tasks": {task: {"corpus": task} for task in tasks},
        "model": {"preset": "gpt-125m", "seq_len": seq_len},
        "batch": {"samples": batch},
        "phases": [phase | {"learning_rate": {"peak": 1e-4}} for phase in phases],
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def open_spec(run_file: Path) -> tuple[RunConfig, PlanSpec]:
    """Return the run configuration and its plan specification."""
    config = load_run_file(run_file)
    return config, plan_spec(config, TOKENIZER)  # type: ignore[arg-type]
