"""The rows of `metrics.jsonl` that a tracker does not have yet."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from megaphase.callbacks.trackers.tracker import Position, Record
from megaphase.utils.metrics_rows import parse_row

# Events that tell of one start of the run: a later start does not repeat them.
_OF_A_START = ("resume", "metrics_damaged")
_STEP = re.compile(rb'{"step": (\d+),')


@dataclass
class UnrecordedRows:
    """Reads a growing file from its beginning, and gives the rows after a position.

    Rows that are recorded already are passed over: those before the checkpoint from which the run
    resumes, and those of steps after it, which are trained again.

    Attributes:
        recorded: how far the run is recorded; None if nothing is.
        kept: bytes that the file had before this start of the run wrote to it.
        read: bytes that have been read.
    """

    path: Path
    recorded: Position | None
    kept: int
    read: int = 0
    _at: Position = field(default=Position(-1, 0), init=False)

    def next(self, most: int) -> list[Record]:
        """The next rows, at most so many; none where the file has no more for now."""
        found: list[Record] = []
        with open(self.path, "rb") as file:
            file.seek(self.read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                is_new = self.read >= self.kept
                self.read += len(line)
                record = self._record(line, is_new=is_new)
                if record is not None:
                    found.append(record)
                    if len(found) == most:
                        break
        return found

    def _record(self, line: bytes, *, is_new: bool) -> Record | None:
        """The line's row, if it is not recorded; is_new: whether this start of the run wrote it."""
        if not is_new and self._is_of_an_earlier_step(line):
            return None
        row = parse_row(line)
        if row is None:
            return None
        if row["step"] != self._at.step:
            self._at = Position(row["step"], 0)
        if row.get("event") in _OF_A_START:
            if self._is_recorded() and not is_new:
                return None
            return Record(row, max(self._at, self.recorded or self._at), self.read)
        self._at = Position(row["step"], self._at.rows + 1)
        return None if self._is_recorded() else Record(row, self._at, self.read)

    def _is_recorded(self) -> bool:
        return self.recorded is not None and self._at <= self.recorded

    def _is_of_an_earlier_step(self, line: bytes) -> bool:
        """Whether the line need not be parsed, which would take seconds in a long run."""
        step = _STEP.match(line)
        return step is not None and self.recorded is not None and int(step[1]) < self.recorded.step
