"""The output of a conversion: a new folder that is published atomically."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megaphase.utils.errors import InputError, RunError
from megaphase.utils.files import directory_written_aside, os_errors_named, remove_abandoned


@contextmanager
def new_folder(out: Path, needed_bytes: int) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `out` when the block ends without an error.

    Raises:
        InputError: `out` exists already, or cannot be created.
        RunError: it cannot be written, or the disk has too little space.
    """
    if out.exists() or out.is_symlink():
        raise InputError(out, "exists already", "choose another --out, or remove it")
    remove_abandoned(out)
    with os_errors_named(out), directory_written_aside(out) as aside:
        free = shutil.disk_usage(aside).free
        if needed_bytes > free:
            raise RunError(
                f"{out}: {needed_bytes / 1e9:,.3f} GB are needed, the disk has {free / 1e9:,.3f} "
                "GB left"
            )
        yield aside
