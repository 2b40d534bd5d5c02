"""Open and verify a Megaphase checkpoint as the source of a conversion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megaphase.checkpoint.fetch import remedy_for_damage
from megaphase.checkpoint.names import find_checkpoint
from megaphase.checkpoint.parameters import INDEX_FILE, StoredParameters
from megaphase.checkpoint.state import AVERAGE, MANIFEST_FILE, STATE_FILE, check_format, read_state
from megaphase.model.parameters import parameter_layouts
from megaphase.model.shape import GPTShape
from megaphase.utils.errors import InputError
from megaphase.utils.files import file_damage, folder_bytes, read_json

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Advance = Callable[[int], object]


@dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    Attributes:
        state: its state.json.
        shape: of its model; options that do not affect the weights have their defaults.
        weights: its parameters and moments.
    """

    folder: Path
    state: dict[str, Any]
    shape: GPTShape
    weights: StoredParameters

    @property
    def nbytes(self) -> int:
        """Size of its files in bytes."""
        return folder_bytes(self.folder)

    def dtype(self, asked: Precision | None) -> torch.dtype:
        """Return the dtype for its weights: the requested one, or the run's."""
        own: Precision = "bf16" if self.state.get("precision") == "bf16" else "fp32"
        return _DTYPES[asked or own]


def open_source(text: str, *, average: bool = False) -> Source:
    """Open the checkpoint that a user names by RUN@NAME or a path.

    average: its weights are those of the average that it holds, and it has no moments.

    Raises:
        InputError: there is none, it is of another version, or its shards are inconsistent.
    """
    folder = find_checkpoint(text)
    try:
        state = read_state(folder)
        check_format(folder, state)
        shape = GPTShape.from_architecture(state["model"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            folder / STATE_FILE, "is damaged, or of another version", "use another checkpoint"
        ) from None
    _check_index(folder)
    weights = StoredParameters(folder)
    weights.check(parameter_layouts(shape, weights.tensor_size))
    weights.check_pieces()
    if average:
        weights = weights.of_average()
        state = state_of_weights(state)
    return Source(folder, state, shape, weights)


def _check_index(folder: Path) -> None:
    """Raise InputError if the index of the shards is not the one that was saved: it is used before
    all files are verified. Without a manifest it cannot be known."""
    if not (folder / MANIFEST_FILE).exists():
        return
    path, described = folder / INDEX_FILE, files_in_manifest(folder).get(INDEX_FILE)
    found = "is not in the manifest" if described is None else file_damage(path, described)
    if found is not None:
        raise InputError(path, found, remedy_for_damage(folder))


def state_of_weights(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a checkpoint as that of its weights alone."""
    return {k: v for k, v in state.items() if k != AVERAGE} | {"optimizer_steps": 0}


def files_in_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and hash of every file of a checkpoint from its manifest.

    Raises:
        InputError: the manifest is missing or damaged.
    """
    path = folder / MANIFEST_FILE
    try:
        files = read_json(path)["files"]
        return {name: {"bytes": f["bytes"], "hash": f["hash"]} for name, f in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(path, "is missing or damaged", "use another checkpoint") from None


def verify_checkpoint(folder: Path, *, workers: int, advance: Advance = lambda count: None) -> int:
    """Compare every file of a checkpoint with its manifest; return their number.

    advance: called with the number of bytes of every chunk read, from several threads.

    Raises:
        InputError: names the first file that is missing, truncated or altered.
    """
    files = files_in_manifest(folder)

    def damage(name: str) -> str | None:
        return file_damage(folder / name, files[name], advance)

    with ThreadPoolExecutor(workers, thread_name_prefix="verifier") as pool:
        for name, found in zip(files, pool.map(damage, files), strict=True):
            if found is not None:
                pool.shutdown(cancel_futures=True)
                raise InputError(folder / name, found, remedy_for_damage(folder))
    return len(files)
