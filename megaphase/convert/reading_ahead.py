"""Let the disk read a checkpoint while slow packages are imported; torch is not."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from megaphase.checkpoint.names import find_checkpoint
from megaphase.checkpoint.state import MANIFEST_FILE
from megaphase.utils.errors import InputError, RunError
from megaphase.utils.remote_files import is_url

_PIECE_BYTES = 1 << 24
_SHARE_OF_MEMORY = 8  # one of so many parts of the memory may be filled


@contextmanager
def reading_ahead(text: str) -> Iterator[None]:
    """While the block runs, read the beginnings of the files of a local checkpoint, RUN@NAME or a
    path, into the page cache; faults are left to those who read the files after that."""
    ended = threading.Event()
    reader = threading.Thread(target=_read, args=(text, ended), daemon=True)
    reader.start()
    try:
        yield
    finally:
        ended.set()
        reader.join()


def _read(text: str, ended: threading.Event) -> None:
    if is_url(text):
        return
    with suppress(OSError, ValueError, TypeError, AttributeError, KeyError, InputError, RunError):
        folder = find_checkpoint(text)
        files = json.loads((folder / MANIFEST_FILE).read_text())["files"]
        _read_in_turns([folder / name for name in files if (folder / name).is_file()], ended)


def _read_in_turns(files: list[Path], ended: threading.Event) -> None:
    """Read the first piece of each file, then the second ones: that is how they are converted."""
    left = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _SHARE_OF_MEMORY
    with ExitStack() as opened:
        descriptors = [os.open(file, os.O_RDONLY | os.O_NONBLOCK) for file in files]
        for descriptor in descriptors:
            opened.callback(os.close, descriptor)
        sizes = [os.fstat(descriptor).st_size for descriptor in descriptors]
        asked: tuple[int, int] | None = None
        for begin in range(0, max(sizes, default=0), _PIECE_BYTES):
            for descriptor, size in zip(descriptors, sizes, strict=True):
                length = min(_PIECE_BYTES, size - begin)
                if length <= 0:
                    continue
                os.posix_fadvise(descriptor, begin, length, os.POSIX_FADV_WILLNEED)
                if asked is not None:
                    os.pread(asked[0], 1, asked[1])  # waits for the piece before
                asked, left = (descriptor, begin + length - 1), left - length
                if ended.is_set() or left <= 0:
                    return
