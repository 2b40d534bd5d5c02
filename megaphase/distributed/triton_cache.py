"""The folder in which Triton keeps compiled kernels."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from megaphase.distributed.dist_env import local_rank


def use_local_triton_cache() -> None:
    """Let Triton keep kernels on this machine, those of each local rank in a folder of their own,
    unless TRITON_CACHE_DIR says otherwise.

    Its default is in the home directory, which on a cluster is a network file system where the
    processes of all nodes would write and read the same files at once.
    """
    folder = Path(tempfile.gettempdir(), f"megaphase-kernels-{os.getuid()}", str(local_rank()))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder))
