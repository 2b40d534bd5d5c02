"""Copy a folder past the page cache, one file after the other: the floor of a conversion.

    python benchmarks/direct_copy.py SOURCE NEW_FOLDER

Two threads read and write at once; nobody looks at the bytes. Linux, with O_DIRECT.
"""

from __future__ import annotations

import argparse
import mmap
import os
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

BLOCK_BYTES, BUFFERS, BUFFER_BYTES = 4096, 4, 1 << 22


def copy_file(source: Path, target: Path, free: SimpleQueue[mmap.mmap]) -> None:
    """Copy one file with the free buffers."""
    size = source.stat().st_size
    full: SimpleQueue[tuple[int, mmap.mmap]] = SimpleQueue()
    reading = os.open(source, os.O_RDONLY | os.O_DIRECT)
    writing = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o666)

    def read() -> None:
        for offset in range(0, size, BUFFER_BYTES):
            buffer = free.get()
            os.preadv(reading, [buffer], offset)
            full.put((offset, buffer))

    reader = Thread(target=read)
    reader.start()
    for _ in range(0, size, BUFFER_BYTES):
        offset, buffer = full.get()
        blocks = -(-min(BUFFER_BYTES, size - offset) // BLOCK_BYTES)
        os.pwrite(writing, memoryview(buffer)[: blocks * BLOCK_BYTES], offset)
        free.put(buffer)
    reader.join()
    os.truncate(writing, size)
    os.fsync(writing)
    os.close(reading)
    os.close(writing)


def main() -> None:
    """Copy every file of a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("target", type=Path, metavar="NEW_FOLDER")
    options = parser.parse_args()
    source, target = options.source, options.target
    free: SimpleQueue[mmap.mmap] = SimpleQueue()
    for _ in range(BUFFERS):
        free.put(mmap.mmap(-1, BUFFER_BYTES))
    for path in sorted(source.rglob("*")):
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            copy_file(path, place, free)


if __name__ == "__main__":
    main()
