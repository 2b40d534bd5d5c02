"""Time of packing documents into samples by best fit, in processor time per document.

    python benchmarks/document_packing.py --documents 5000000

The lengths are log-normal with a mean of about 1,000 tokens, the median is 600.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import numpy as np

from megaphase.plan import _builder
from megaphase.plan.document_table import PACKING_WINDOW, PackedSource, filled_positions
from megaphase.plan.task_documents import DOCUMENTS_PER_CALL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=5_000_000)
    parser.add_argument("--seq-len", type=int, nargs="+", default=[4096, 32768])
    arguments = parser.parse_args()
    random = np.random.default_rng(1)
    lengths = random.lognormal(np.log(600), 1, arguments.documents).astype(np.int32) + 1
    hashes = np.arange(len(lengths), dtype=np.uint64)
    nothing = np.empty(0, np.uint16)
    offsets = np.cumsum(lengths, dtype=np.int64) * 2
    stream = _builder.Stream(nothing, offsets, lengths, hashes, 0, 2**64 - 1, 7, 8)
    tokens = int(lengths.sum(dtype=np.int64))

    def chunks() -> Iterator[np.ndarray]:
        walk = stream.part_walk(0, [(0, tokens)])
        while not walk.at_end:
            parts = np.empty((PACKING_WINDOW, 3), np.int64)
            yield parts[: walk.fill(parts, DOCUMENTS_PER_CALL)]

    began = time.process_time()
    read = sum(len(parts) for parts in chunks())
    per_document = 1e9 / len(lengths)
    print(f"reading the lengths in order: {(time.process_time() - began) * per_document:.0f} ns")
    assert read == len(lengths)
    for seq_len in arguments.seq_len:
        source = PackedSource("", "", seq_len, False, np.uint32, tokens, chunks)
        samples = filled = 0
        began = time.process_time()
        for parts, sizes in source.packed():
            samples += len(sizes)
            filled += filled_positions(parts, sizes, False)
        seconds = time.process_time() - began
        print(
            f"seq_len {seq_len:,}: {seconds * per_document:.0f} ns a document with it, "
            f"{samples:,} samples, padding {1 - filled / (samples * seq_len):.3%}"
        )


if __name__ == "__main__":
    main()
