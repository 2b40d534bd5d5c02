"""Find and open the files of a Megatron-LM checkpoint; read their tensors by current names."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaphase.convert.megatron.names import (
    RANK_FILE,
    RELEASE,
    TRACKER_FILE,
    current_name,
    rank_folder,
)
from megaphase.convert.safe_torch_load import load_pickle
from megaphase.utils.errors import InputError
from megaphase.utils.files import read_file

OTHER_CHECKPOINT = "use another checkpoint"
_RANK_FOLDER = re.compile(r"mp_rank_\d{2,}")
_STAGE_FOLDER = re.compile(r"mp_rank_\d{2,}(_\d{3})+")
_EARLIER_RANK_FILE = "model_rng.pt"  # what it once was beside a distributed optimizer
_DISTRIBUTED = ("metadata.json", ".metadata", "common.pt")
_LEGACY_MODEL = "language_model"
_EXTRA_STATE = "_extra_state"  # of layers of Transformer Engine that compute in fp8
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST_VERSION = 2.0


def rank_files(source: Path) -> list[Path]:
    """Return the files of all tensor-parallel ranks, in order.

    source: the folder of --save, or a folder iter_… or release in it.

    Raises:
        InputError: one is missing, or the checkpoint has another format.
    """
    folder = _iteration_folder(source)
    names = {path.name for path in folder.iterdir()}
    if any(map(_STAGE_FOLDER.fullmatch, names)):
        raise pipelined(folder)
    ranks = sorted(filter(_RANK_FOLDER.fullmatch, names))
    if not ranks:
        if names.intersection(_DISTRIBUTED):
            raise InputError(
                folder,
                "is a distributed checkpoint (--ckpt-format torch_dist or the like)",
                "let Megatron-LM save it again with --ckpt-convert-format torch",
            )
        raise InputError(
            folder, f"has no {rank_folder(0)}", "give the folder that Megatron-LM saved to"
        )
    return [_rank_file(folder / rank_folder(rank)) for rank in range(len(ranks))]


class RankFile:
    """The file of one tensor-parallel rank.

    Attributes:
        args: of the run.
        iteration: after which it was written.
        tensors: by the names in Megatron Core; they stay in the file until read.
    """

    def __init__(self, path: Path, *, trust_pickle: bool) -> None:
        """
        Raises:
            InputError: the file is damaged, or is not that of a rank.
        """
        self.path = path
        state = load_pickle(path, trust=trust_pickle)
        if not isinstance(state, dict) or not isinstance(state.get("args"), Namespace):
            raise InputError(path, "has no args, which tell what model it is", OTHER_CHECKPOINT)
        if "model0" in state:
            raise pipelined(path)
        if not isinstance(state.get("model"), dict):
            raise InputError(path, "has no model", OTHER_CHECKPOINT)
        version = state.get("checkpoint_version", 0)
        if not isinstance(version, int | float) or version < _OLDEST_VERSION:
            raise InputError(
                path,
                f"has the checkpoint_version {version}, where queries, keys and values lie "
                "otherwise",
                "load and save it with a later Megatron-LM",
            )
        self.args: Namespace = state["args"]
        self.iteration = state.get("iteration", 0)
        self.tensors = _weights(state["model"], path)


def pipelined(where: Path) -> InputError:
    """Return the error for a model that is split into pipeline stages, or experts over ranks."""
    return InputError(
        where,
        "is cut by pipeline or expert parallelism",
        "let Megatron-LM save it with --pipeline-model-parallel-size 1",
    )


def _iteration_folder(source: Path) -> Path:
    if not source.is_dir():
        raise InputError(source, "is no folder", "give the folder that Megatron-LM saved to")
    tracker = source / TRACKER_FILE
    if not tracker.exists():
        return source
    try:
        newest = read_file(tracker).decode().strip()
    except (OSError, UnicodeDecodeError):
        newest = ""
    if newest != RELEASE and not newest.isdecimal():
        raise InputError(tracker, "names no iteration", "give the folder of one, iter_…")
    folder = source / (newest if newest == RELEASE else f"iter_{int(newest):07d}")
    if not folder.is_dir():
        raise InputError(folder, f"is missing, though {TRACKER_FILE} names it", OTHER_CHECKPOINT)
    return folder


def _rank_file(folder: Path) -> Path:
    for name in (RANK_FILE, _EARLIER_RANK_FILE):
        if (folder / name).is_file():
            return folder / name
    raise InputError(folder / RANK_FILE, "is missing", OTHER_CHECKPOINT)


def _weights(model: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for stored_name, value in _flattened(model):
        if stored_name.rpartition(".")[2].startswith(_EXTRA_STATE):
            continue
        name = current_name(stored_name) if _LEGACY_MODEL in model else stored_name
        if not isinstance(value, Tensor) or value.dtype not in _DTYPES:
            what = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise InputError(path, f"{name} is {what}, not a weight", OTHER_CHECKPOINT)
        if name in found:
            raise InputError(path, f"has {name} twice, by two names", OTHER_CHECKPOINT)
        found[name] = value
    return found


def _flattened(model: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in model.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
