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
_RANK_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?((?:_\d{3,})*)")
_EARLIER_RANK_FILE = "model_rng.pt"  # what it once was beside a distributed optimizer
_CHUNK = re.compile(r"model(\d+)")
_LEGACY_MODEL = "language_model"
_EXTRA_STATE = "_extra_state"  # of layers of Transformer Engine that compute in fp8
_OLDEST_VERSION = 2.0
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def iteration_folder(source: Path) -> Path:
    """Return the folder of one iteration: `source`, or the newest in the folder of --save.

    Raises:
        InputError: there is none.
    """
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


def rank_files(folder: Path) -> list[list[Path]]:
    """Return the files of all ranks: those of a tensor-parallel rank by pipeline stage.

    folder: of one iteration.

    Raises:
        InputError: one is missing, or the checkpoint has another format.
    """
    found = list(filter(None, (_RANK_FOLDER.fullmatch(path.name) for path in folder.iterdir())))
    if not found:
        raise InputError(
            folder, f"has no {rank_folder(0)}", "give the folder that Megatron-LM saved to"
        )
    staged = {match[2] is not None for match in found}
    if len(staged) > 1:
        raise InputError(
            folder, "has ranks with and without pipeline stages", "use another checkpoint"
        )
    if any(match[3] for match in found):
        raise InputError(
            folder, "is cut by expert parallelism", "only models without experts are converted"
        )
    ranks, stages = ({match[place] for match in found} for place in (1, 2))
    return [
        [_rank_file(folder / rank_folder(rank, stage)) for stage in _numbers(stages)]
        for rank in range(len(ranks))
    ]


def _numbers(stages: set[str | None]) -> list[int | None]:
    return [None] if stages == {None} else list(range(len(stages)))


class RankFile:
    """The file of one rank: a tensor-parallel rank's part of a pipeline stage.

    Attributes:
        args: of the run.
        iteration: after which it was written.
        chunks: of consecutive layers, more than one with virtual pipeline stages: tensors by the
            names in Megatron Core, where every chunk counts its layers from 0; they stay in the
            file until read.
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
        models = _chunks(state)
        if not models or not all(isinstance(each, Mapping) for each in models):
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
        self.chunks = [_weights(model, path) for model in models]


def _chunks(state: Mapping[str, Any]) -> list[Any]:
    """The values of `model`, or of `model0`, `model1` and so on."""
    if "model" in state:
        return [state["model"]]
    matches = (_CHUNK.fullmatch(name) for name in state if isinstance(name, str))
    numbers = sorted(int(match[1]) for match in matches if match)
    return [state.get(f"model{number}") for number in range(len(numbers))]


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
        if not isinstance(value, Tensor) or value.dtype not in DTYPES:
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
