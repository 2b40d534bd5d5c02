"""Saves a run's state asynchronously: a step waits only for a copy in memory.

A save has two parts, each in its own thread: every rank writes its shard; when all have, rank 0
publishes the checkpoint and removes old ones. In between, all ranks agree, between two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megaphase.checkpoint.parameters import Kinds, Shard, index_json, shard_file
from megaphase.checkpoint.store import CheckpointStore
from megaphase.checkpoint.tensor_file import file_bytes, write_tensors
from megaphase.checkpoint.upload import Uploader
from megaphase.distributed.control_group import ControlGroup
from megaphase.distributed.sharding import ParameterLayout
from megaphase.utils.errors import RunError


class SaveStatus(IntEnum):
    """The status of this rank's part of a save; of several ranks' statuses, the largest counts."""

    DONE = 0
    AT_WORK = 1
    FAILED = 2


@dataclass(frozen=True)
class Snapshot:
    """The data that one rank has to write.

    Attributes:
        tensors: this rank's pieces by name; views that the next step may change.
        kinds, layouts, tensor_size: see megaphase.checkpoint.parameters.
    """

    tensors: Iterator[tuple[str, Tensor]]
    shard: Shard
    kinds: Kinds
    layouts: Mapping[str, ParameterLayout]
    tensor_size: int


@dataclass(frozen=True)
class _Save:
    name: str
    snapshot: Snapshot
    state: Mapping[str, Any]
    best: Mapping[str, str]
    sound_step: int | None


class Saver:
    """Runs one save at a time; every method but `status` is called by all ranks."""

    def __init__(
        self,
        store: CheckpointStore,
        control_group: ControlGroup,
        *,
        keep: int,
        asynchronous: bool,
        say: Callable[[str], object],
        note: Callable[[str], object] = lambda name: None,
        uploader: Uploader | None = None,
    ) -> None:
        """
        Args:
                keep: how many of the newest checkpoints are kept.
                asynchronous: whether `save` returns before the checkpoint is written.
                say: called on rank 0 with a sentence about every published checkpoint.
                note: called on all ranks with the name of every published checkpoint.
                uploader: of rank 0, if checkpoints are uploaded.
        """
        self._store, self._control_group, self._keep = store, control_group, keep
        self._asynchronous, self._say, self._note = asynchronous, say, note
        self._uploader = uploader
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._buffers: dict[str, Tensor] = {}
        self._save: _Save | None = None
        self._work: Future[Any] | None = None
        self._written = False

    def save(
        self,
        name: str,
        snapshot: Snapshot,
        state: Mapping[str, Any],
        best: Mapping[str, str],
        sound_step: int | None = None,
    ) -> None:
        """Start a save, after the previous one has finished.

        state: the content of state.json; rank 0's is written. best: link names of the best
            weights, each
        with the name of its checkpoint. sound_step: see CheckpointStore.prune.

        Raises:
            RunError: on all ranks; this checkpoint or the previous one could not be written.
        """
        self.finish()
        copies = host_copies(snapshot.tensors, self._buffers)
        if self._asynchronous:
            self._buffers.update(copies)
        try:
            needed = sum(self._control_group.gather(file_bytes(copies)))
            aside = self._store.begin(name, needed)
        except RunError as error:
            raise self._with_last_checkpoint(error) from None
        self._save, self._written = _Save(name, snapshot, state, best, sound_step), False
        path = aside / shard_file(self._control_group.rank)
        self._work = self._thread.submit(write_tensors, path, copies)
        if not self._asynchronous:
            self.finish()

    @property
    def status(self) -> SaveStatus:
        """The current status of this rank."""
        if self._work is None:
            return SaveStatus.DONE
        if not self._work.done():
            return SaveStatus.AT_WORK
        return SaveStatus.FAILED if self._work.exception() else SaveStatus.DONE

    def advance(self, agreed: int) -> None:
        """Start the next part when all ranks have finished one; `agreed`: the largest status.

        Raises:
            RunError: on all ranks; one of them could not write its part.
        """
        if self._save is None or agreed == SaveStatus.AT_WORK:
            return
        if agreed == SaveStatus.FAILED:
            self._abort()
        elif not self._written:
            self._written = True
            self._begin_to_publish()
        else:
            if self._control_group.rank == 0:
                self._say(f"checkpoint: {self._store.folder / self._save.name}")
            self._note(self._save.name)
            self._save = self._work = None

    def finish(self) -> None:
        """Wait until the current save has been published; see `advance`."""
        while self._save is not None:
            if self._work is not None:
                self._work.exception()  # waits
            self.advance(self._control_group.largest(self.status)[0])

    def _begin_to_publish(self) -> None:
        save = self._save
        assert save is not None
        assert self._work is not None
        facts = self._control_group.gather((self._work.result(), save.snapshot.shard))
        self._work = None
        if self._control_group.rank == 0:
            self._work = self._thread.submit(self._publish, save, facts)

    def _publish(self, save: _Save, facts: list[tuple[dict[str, Any], Shard]]) -> None:
        by_file = {shard_file(rank): fact for rank, fact in enumerate(facts)}
        shards = {file: shard for file, (_, shard) in by_file.items()}
        snapshot = save.snapshot
        index = index_json(snapshot.tensor_size, snapshot.kinds, snapshot.layouts, shards)
        files = {file: described for file, (described, _) in by_file.items()}
        self._store.publish(save.name, index, save.state, files)
        for alias, name in save.best.items():
            if name == save.name:
                self._store.link(alias, name)
        if self._uploader is None:
            self._store.prune(self._keep, save.best, save.name, save.sound_step)
            return
        with self._uploader.holding() as uploading:
            self._store.prune(self._keep, save.best, save.name, save.sound_step, uploading)
        self._uploader.add(save.name)

    def _abort(self) -> None:
        save, work = self._save, self._work
        assert save is not None
        # Wait for the thread, so that it no longer writes into the directory that is removed now.
        fault = work.exception() if work is not None else None
        faults = self._control_group.gather(None if fault is None else _describe(fault))
        self._save = self._work = None
        self._control_group.on_first_rank(partial(self._store.discard, save.name))
        rank, first = next((r, f) for r, f in enumerate(faults) if f is not None)
        folder = self._store.folder / save.name
        raise self._with_last_checkpoint(
            RunError(f"{folder}: rank {rank} could not write: {first}")
        )

    def _with_last_checkpoint(self, error: RunError) -> RunError:
        newest = self._store.newest_name()
        left = "there is no earlier checkpoint"
        if newest is not None:
            left = f"earlier checkpoints are untouched: the same command resumes from {newest}"
        return RunError(f"{error}; {left}")


def host_copies(
    tensors: Iterator[tuple[str, Tensor]], buffers: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Copy tensors to CPU memory, into `buffers` where one fits.

    Copies from a GPU are pinned, so that they run at the speed of the bus.
    """
    copies = {}
    for name, tensor in tensors:
        buffer = buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape:
            pinned = tensor.device.type == "cuda"
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        copies[name] = buffer.copy_(tensor.detach(), non_blocking=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copies


def _describe(fault: BaseException) -> str:
    return fault.strerror or str(fault) if isinstance(fault, OSError) else repr(fault)
