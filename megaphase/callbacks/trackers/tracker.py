"""The protocol of trackers: services such as W&B and MLflow that show runs beside each other.

A tracker is a class with three methods and a config class; see docs/trackers.md. It gets the rows
of metrics.jsonl from a thread of its own (`feed.py`), so it may be slow, raise and hang.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import Field

from megaphase.config.fields import Section
from megaphase.utils.metrics_rows import Row


class Position(NamedTuple):
    """How far a run is recorded: `rows` rows of `step`, and all rows of the steps before.

    Events that differ between two starts of a run, such as `resume`, do not count.
    """

    step: int
    rows: int


@dataclass(frozen=True)
class Record:
    """A row of metrics.jsonl.

    Attributes:
        position: of the run, once the row is recorded.
        end: where its line ends in metrics.jsonl, in bytes.
    """

    row: Row
    position: Position
    end: int

    @property
    def step(self) -> int:
        step: int = self.row["step"]
        return step

    @property
    def event(self) -> str | None:
        """The name of the event; None for a training step and a validation."""
        return self.row.get("event")


@dataclass(frozen=True)
class TrackedRun:
    """A run as a tracker sees it.

    Attributes:
        name: of the run directory.
        folder: for the tracker's own files, in the run directory; it exists.
        settings: the run file with every default, as in run.json.
        id: of the run at the tracker, as its first `open` gave it; None before.
        parent: likewise of the run from whose checkpoint this one branches; None if this run is no
            branch, or the other one has no such tracker.
        branched_from: that checkpoint's folder; None if this run is no branch.
        wait_seconds: how long `close` may take.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    id: str | None = None
    parent: str | None = None
    branched_from: Path | None = None
    wait_seconds: float = 30.0


@dataclass(frozen=True)
class Opened:
    """What `Tracker.open` has found.

    Attributes:
        id: of the run at the tracker, by which later starts find it again.
        position: how far the run is recorded there; None if nothing is.
        place: where a person finds it, for the terminal.
    """

    id: str
    position: Position | None
    place: str


class Tracker(ABC):
    """Records a run at a service. All methods but `abandon` are called by one thread of its own.

    They may raise any exception: what failed is tried again, and in the end dropped and counted.
    """

    @abstractmethod
    def open(self) -> Opened:
        """Begin the run at the service or, where it has one with `TrackedRun.id`, resume it."""

    @abstractmethod
    def write(self, records: Sequence[Record]) -> int:
        """Record the first of the records, or as many of the following as one request takes.

        Returns how many. The service has to know the position of the last one, as `open` gives it
        to a later start.
        """

    @abstractmethod
    def close(self, error: BaseException | None) -> None:
        """Flush, and end the run; error: with which it ended, if with one."""

    def abandon(self) -> None:  # noqa: B027  # most have nothing to do
        """Give up, since the thread hangs; called by the main thread, which must not wait."""


class Fault(NamedTuple):
    """Why a tracker's section cannot be used; key: in the section."""

    key: str
    problem: str
    remedy: str


class TrackerConfig(Section):
    """The section of a tracker in `logging`; a run whose run file has none is not tracked by it."""

    PACKAGE: ClassVar[str | None] = None
    """The package that the tracker imports, which the extra of the same name installs."""

    wait_seconds: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """How long the end of the run waits for the tracker, in seconds. Records that it has not taken
    by then are dropped, and recorded when the run is started again."""

    @classmethod
    def missing_package(cls) -> str | None:
        """The name of the package, if it is not installed."""
        missing = cls.PACKAGE is not None and find_spec(cls.PACKAGE) is None
        return cls.PACKAGE if missing else None

    def find_fault(self) -> Fault | None:
        """Return what the tracker would refuse for good, found without importing its package."""
        return None

    def target(self) -> dict[str, str | None]:
        """Where runs are recorded; a run that is started again with another target begins anew."""
        return {}

    def build(self, run: TrackedRun) -> Tracker:
        """Make the tracker, in its thread; import its package here and nowhere else."""
        raise NotImplementedError
