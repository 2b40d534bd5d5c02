"""Read `metrics.jsonl`, even if a part of it is missing or was altered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import from_json

Row = dict[str, Any]
MOST_STEPS = (1 << 63) - 1  # a larger number is damage
Steps = tuple[int, int]  # the first and the last step of a range, both included

_TAIL_BYTES = 1 << 18
_BLOCK_BYTES = 1 << 16


class MetricsLine(NamedTuple):
    """A complete line of the file, which ends with a newline.

    Attributes:
        end: position in the file at which the line ends, in bytes.
        row: the parsed row; None if it is not a row of metrics.
    """

    end: int
    row: Row | None


def read_lines(path: Path, containing: Sequence[bytes] = ()) -> Iterator[MetricsLine]:
    """Yield the complete lines of the file, without a half-written last one.

    containing: skip lines that contain none of these byte strings, to save parsing them.

    Raises OSError if the file cannot be read.
    """
    end = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            block += file.readline()
            if containing and not any(part in block for part in containing):
                end += len(block)
                continue
            *lines, incomplete = block.split(b"\n")
            for line in lines:
                end += len(line) + 1
                if not containing or any(part in line for part in containing):
                    yield MetricsLine(end, parse_row(line))
            if incomplete:
                return


def last_rows(path: Path) -> list[Row]:
    """Return the last rows of a file that may be long, and may end with an incomplete line."""
    return list(rows_from_end(path))[::-1]


def rows_from_end(path: Path) -> Iterator[Row]:
    """Likewise, the newest first; each is parsed when it is asked for."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_BYTES))
        lines = file.read().split(b"\n")
    for line in reversed(lines[1 if size > _TAIL_BYTES else 0 : -1]):
        if (row := parse_row(line)) is not None:
            yield row


def parse_row(line: bytes) -> Row | None:
    """Return a row of training, validation or benchmarks, or an event; None for any other line."""
    try:
        row = from_json(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or type(step := row.get("step")) is not int:
        return None
    if not 0 <= step <= MOST_STEPS:
        return None
    return row if "loss" in row or not is_training(row) else None


def is_training(row: Row) -> bool:
    """Return whether this is the row of an optimizer step."""
    return not ("event" in row or "validation" in row or "benchmarks" in row)


def missing_steps(found: Iterable[int], first: int, last: int) -> list[Steps]:
    """Return the ranges of steps from `first` to `last` that are not in `found`."""
    holes, expected = [], first
    for step in sorted({step for step in found if first <= step <= last} | {last + 1}):
        if step > expected:
            holes.append((expected, step - 1))
        expected = step + 1
    return holes


def steps_in_words(holes: Sequence[Steps], at_most: int = 5) -> str:
    """Format ranges such as `steps 3 to 7 and 9`, or `no steps` if there are none."""
    if not holes:
        return "no steps"
    parts = [f"{a:,}" if a == b else f"{a:,} to {b:,}" for a, b in holes[:at_most]]
    if len(holes) > at_most:
        parts.append(f"{len(holes) - at_most:,} more ranges")
    joined = f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]
    return f"{'step' if joined.isdigit() else 'steps'} {joined}"
