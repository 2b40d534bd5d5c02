"""Reads back the `.wandb` files of earlier starts of a run, which W&B cannot do while offline.

A file holds records of protocol buffers in the log format of LevelDB: blocks of 32 KiB with
fragments, each after a checksum (4 bytes), its length (2) and its type (1). A process that is
killed leaves a file whose newest rows are missing; they were never written.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_FILE_HEADER = b":W&B"
_FILE_HEADER_BYTES = 7
_BLOCK_BYTES = 32768
_FRAGMENT = struct.Struct("<IHB")
_WHOLE, _FIRST, _LAST = 1, 2, 4  # types of fragments; 3 is between a first and a last one


@dataclass(frozen=True)
class LastRow:
    """The newest history row of a run: W&B's own number of it, and some of its values."""

    number: int
    values: tuple[int, int]


def last_row(folder: Path, run_id: str, columns: tuple[str, str]) -> LastRow | None:
    """The newest row that has both columns, in any file of the run; None if there is none.

    Raises:
        ValueError: a file is of another format.
    """
    found: LastRow | None = None
    for path in folder.glob(f"wandb/*run-*-{run_id}/run-{run_id}.wandb"):
        for number, row in history_rows(path):
            if all(name in row for name in columns) and (found is None or number > found.number):
                first, second = (int(row[name]) for name in columns)
                found = LastRow(number, (first, second))
    return found


def history_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The whole history rows of a file that may be cut off, each with its number.

    Raises:
        ValueError: it is of another format.
    """
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
            yield record.history.step.num, row


def wandb_records(path: Path) -> Iterator[Any]:
    """All whole records of a file, as messages of `wandb.proto`.

    Raises:
        ValueError: it is of another format.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    with open(path, "rb") as file:
        header = file.read(_FILE_HEADER_BYTES)
        if header and not header.startswith(_FILE_HEADER):
            raise ValueError(f"{path} is of another format than that of wandb 0.31")
        for content in _log_records(file):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            try:
                record.ParseFromString(content)
            except DecodeError:
                raise ValueError(f"{path} is of another format than that of wandb 0.31") from None
            yield record


def _log_records(file: BinaryIO) -> Iterator[bytes]:
    parts: list[bytes] = []
    at = _FILE_HEADER_BYTES
    while True:
        left = _BLOCK_BYTES - at % _BLOCK_BYTES
        if left < _FRAGMENT.size:
            file.read(left)
            at += left
            continue
        header = file.read(_FRAGMENT.size)
        if len(header) < _FRAGMENT.size:
            return
        _, length, kind = _FRAGMENT.unpack(header)
        content = file.read(length)
        at += _FRAGMENT.size + length
        if len(content) < length or kind == 0:
            return
        if kind in (_WHOLE, _FIRST):
            parts = []
        parts.append(content)
        if kind in (_WHOLE, _LAST):
            yield b"".join(parts)
