"""A checkpoint store and a saver in one process, without an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaphase.checkpoint.parameters import Piece, Shard
from megaphase.checkpoint.saver import Saver, Snapshot
from megaphase.checkpoint.state import full_name
from megaphase.checkpoint.store import CheckpointStore
from megaphase.distributed.sharding import ParameterLayout


class Alone:
    """The control group of a single process."""

    rank, world_size = 0, 1

    def largest(self, *values: int) -> list[int]:
        return list(values)

    def gather(self, fact: Any) -> list[Any]:
        return [fact]

    def on_first_rank(self, action: Callable[[], Any]) -> Any:
        return action()


def make_store(folder: Path) -> CheckpointStore:
    return CheckpointStore(folder, Alone())  # type: ignore[arg-type]


def make_saver(folder: Path, *, keep: int = 3, asynchronous: bool = True) -> Saver:
    return Saver(
        make_store(folder),
        Alone(),  # type: ignore[arg-type]
        keep=keep,
        asynchronous=asynchronous,
        say=lambda text: None,
    )


def snapshot(weights: Tensor) -> Snapshot:
    size = len(weights)
    return Snapshot(
        iter([("weight/w", weights)]),
        Shard(0, {"w": Piece(0, size)}),
        ("weight",),
        {"w": ParameterLayout((size,), None, (size,))},
        1,
    )


def save(
    folder: Path, step: int, *, keep: int = 3, permanent: bool = False, sound: int | None = None
) -> None:
    saver = make_saver(folder, keep=keep)
    state = {"step": step, "permanent": permanent}
    saver.save(full_name(step), snapshot(torch.full((100,), float(step))), state, {}, sound)
    saver.finish()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
