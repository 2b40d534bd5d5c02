"""Helpers for the tests of text, tokenizers and corpora."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from itertools import chain, pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

from megaphase.data_tools.synthetic.languages import write_languages
from megaphase.data_tools.tokenizers.train import train_tokenizer

CORPORA = Path(__file__).resolve().parents[3] / "shared" / "corpora"
VOCAB_SIZE = 700
CORPUS_FILES = [
    "en.bin",
    "en.blocks",
    "en.hash",
    "en.ids",
    "en.idx",
    "en.json",
    "en.sources",
    "en.sum",
]
LIMIT_SECONDS = 300.0  # far more than needed, for a loaded machine


def make_tokenizer(
    directory: Path,
    *,
    seed: int = 3,
    vocab_size: int = VOCAB_SIZE,
    library: Literal["sentencepiece", "tokenizers"] = "sentencepiece",
) -> Path:
    """Train a small tokenizer on two synthetic languages; two of its tags are named."""
    text = write_languages(directory / "text", seed=seed, languages={"aa": 40_000, "bb": 20_000})
    out = directory / "tok"
    inputs = {name: [path] for name, path in text.items()}
    train_tokenizer(
        inputs, out, vocab_size=vocab_size, library=library, tags=("fr", "hi"), reserved_tags=3
    )
    return out


def write_jsonl(path: Path, texts: Iterable[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": 1, key: text}) + "\n" for text in texts))
    return path


def megatron_index(
    code: int, sequence_lengths: list[int], itemsize: int, document_indices: list[int]
) -> bytes:
    """Return an .idx file in Megatron-LM's format, written one number after the other."""
    data = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    data += struct.pack("<Q", len(sequence_lengths)) + struct.pack("<Q", len(document_indices))
    for length in sequence_lengths:
        data += struct.pack("<i", length)
    offset = 0
    for length in sequence_lengths:
        data += struct.pack("<q", offset)
        offset += length * itemsize
    for index in document_indices:
        data += struct.pack("<q", index)
    return data


def megatron_documents(prefix: Path) -> list[list[int]]:
    """Read .bin and .idx in Megatron-LM's format, one number after the other."""
    data = Path(f"{prefix}.idx").read_bytes()
    tokens = Path(f"{prefix}.bin").read_bytes()
    assert data[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, boundaries = struct.unpack("<QBQQ", data[9:34])
    assert version == 1
    position = 34
    lengths = struct.unpack_from(f"<{sequences}i", data, position)
    position += 4 * sequences
    offsets = struct.unpack_from(f"<{sequences}q", data, position)
    position += 8 * sequences
    indices = struct.unpack_from(f"<{boundaries}q", data, position)
    assert position + 8 * boundaries == len(data)
    letter = {8: "H", 4: "i"}[code]
    read = [
        list(struct.unpack_from(f"<{length}{letter}", tokens, offset))
        for length, offset in zip(lengths, offsets, strict=True)
    ]
    return [list(chain(*read[start:end])) for start, end in pairwise(indices)]


def files_of(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def corpus_bytes(prefix: Path) -> dict[str, bytes]:
    endings = (".bin", ".idx", ".hash", ".sum", ".blocks", ".json", ".sources", ".ids")
    paths = {end: Path(f"{prefix}{end}") for end in endings}
    return {end: path.read_bytes() for end, path in paths.items() if path.exists()}


def rewrite_manifest(prefix: Path, **changes: object) -> None:
    """Replace fields of a manifest and update its hash."""
    path = Path(f"{prefix}.json")
    manifest = {**json.loads(path.read_text()), **changes}
    del manifest["hash"]
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["hash"] = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    path.write_text(json.dumps(manifest))


def rehash(prefix: Path, *suffixes: str) -> None:
    """Update a manifest to the current files with these suffixes, or all files."""
    files = json.loads(Path(f"{prefix}.json").read_text())["files"]
    for suffix in suffixes or files:
        data = Path(f"{prefix}{suffix}").read_bytes()
        files[suffix] = {"bytes": len(data), "hash": xxhash.xxh3_128_hexdigest(data)}
    rewrite_manifest(prefix, files=files)


def edit_bytes(path: Path, position: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(position, 0 if position >= 0 else 2)
        file.write(data)


def tokens_of(prefix: Path, dtype: str = "<u2") -> np.ndarray:
    return np.fromfile(f"{prefix}.bin", dtype=dtype)


def start_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Run `code` in its own process group, to which Ctrl-C can be sent without stopping the
    tests."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell makes its background jobs ignore the signal, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def children_of(pid: int) -> list[int]:
    """Return the processes started by the main thread of a process."""
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def is_running(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def wait_until(condition: Callable[[], object], seconds: float = LIMIT_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
