"""`origin.json`: the checkpoint from which a run started; only this module reads and writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from megaphase.checkpoint.names import newest_state
from megaphase.plan.position import StreamPosition
from megaphase.utils.errors import InputError
from megaphase.utils.files import atomic_write_json, os_errors_named, read_hashed_json, with_hash
from megaphase.utils.run_files import ORIGIN_FILE


class StreamRecord(NamedTuple):
    """What determined the samples of a task in an earlier run.

    Attributes:
        fingerprint: see PlanSpec.stream_fingerprints_at.
        seq_len: the length of the samples of this fingerprint; None if it is not known.
        bos: see PlanSpec.
    """

    fingerprint: str
    seq_len: int | None
    bos: int | None


@dataclass(frozen=True)
class RunOrigin:
    """The start of a branch; for a run that is not a branch, no steps and no samples.

    Attributes:
        step: steps of the runs before this one.
        used: samples of each task that they have used.
        segments: of the tasks of which they have used samples of other lengths than that of the
            `model` section of this run.
        tokens: training tokens of these steps.
        source: the checkpoint as the user named it.
        checkpoint: its folder.
        streams: of the tasks of the earlier runs, also of those that this run does not have.
    """

    step: int = 0
    used: Mapping[str, int] = field(default_factory=dict)
    tokens: int | None = None
    source: str | None = None
    checkpoint: Path | None = None
    segments: Mapping[str, StreamPosition] = field(default_factory=dict)
    streams: Mapping[str, StreamRecord] = field(default_factory=dict)

    @property
    def positions(self) -> Mapping[str, int | StreamPosition]:
        """The positions of the streams, see `plan_spec`."""
        return {**self.used, **self.segments}

    def to_json(self) -> dict[str, Any]:
        """Return it for `origin.json` and for the state of every checkpoint of the run."""
        segments = {task: position.to_json() for task, position in self.segments.items()}
        return {
            "source": self.source,
            "checkpoint": str(self.checkpoint),
            "step": self.step,
            "tokens": self.tokens,
            "used": dict(self.used),
            **({"segments": segments} if segments else {}),
            **({"streams": records_as_json(self.streams)} if self.streams else {}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return the origin from the result of `to_json`.

        Raises KeyError, TypeError, ValueError or AttributeError if it is not one.
        """
        step, used, checkpoint = value["step"], value["used"], value.get("checkpoint")
        if not all(type(number) is int for number in (step, *used.values())):
            raise TypeError("a count is no integer")
        folder = None if checkpoint is None else Path(checkpoint)
        segments = read_segments(value.get("segments", {}))
        streams = read_records(value.get("streams", {}))
        source, tokens = value.get("source"), value.get("tokens")
        return cls(step, dict(used), tokens, source, folder, segments, streams)


def records_as_json(records: Mapping[str, StreamRecord]) -> dict[str, dict[str, Any]]:
    """Return the records of streams for `origin.json` or a checkpoint's state."""
    return {task: record._asdict() for task, record in records.items()}


def read_records(value: Mapping[str, Any]) -> dict[str, StreamRecord]:
    """Return the records from the result of `records_as_json`.

    Raises TypeError or AttributeError if they are none.
    """
    return {task: StreamRecord(**record) for task, record in value.items()}


def read_segments(value: Mapping[str, Any]) -> dict[str, StreamPosition]:
    """Return positions from those that `origin.json` or a checkpoint's state holds.

    Raises TypeError, ValueError or AttributeError if they are none.
    """
    return {task: StreamPosition.from_json(each) for task, each in value.items()}


def read_origin(run_dir: Path) -> RunOrigin:
    """Return where the run in a directory starts, whether or not it is a branch or has begun.

    Raises:
        InputError: the file is damaged.
    """
    return recorded_origin(run_dir) or RunOrigin()


def recorded_origin(run_dir: Path) -> RunOrigin | None:
    """Return the origin from `origin.json` or, if lost, from the newest checkpoint; else None.

    Raises:
        InputError: the file is damaged.
    """
    path = run_dir / ORIGIN_FILE
    try:
        try:
            return RunOrigin.from_json(read_hashed_json(path))
        except (FileNotFoundError, NotADirectoryError):
            history = (newest_state(run_dir) or {}).get("history")
            found = history.get("origin") if isinstance(history, dict) else None
            return None if found is None else RunOrigin.from_json(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            path, "is damaged or cannot be read", "restore it or branch into another output"
        ) from None


def write_origin(run_dir: Path, origin: RunOrigin) -> None:
    """Record where a run starts, so that it can resume without `--from`."""
    with os_errors_named(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        atomic_write_json(run_dir / ORIGIN_FILE, with_hash(origin.to_json()))
