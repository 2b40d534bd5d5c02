"""What a checkpoint says about itself, and what checkpoints are called; without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megaphase.errors import InputError
from megaphase.files import read_json

CHECKPOINT_FORMAT = 2
STATE_FILE = "state.json"
LATEST = "latest"
NAME = re.compile(r"(step|best)-(\d{8,})")


def full_name(step: int) -> str:
    """Of a checkpoint that a run can go on from."""
    return f"step-{step:08d}"


def best_name(step: int) -> str:
    """Of a checkpoint of weights alone."""
    return f"best-{step:08d}"


def read_state(folder: Path) -> dict[str, Any]:
    """What the writer of a checkpoint said about it."""
    return read_json(folder / STATE_FILE)


def state_or_nothing(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint that may be damaged."""
    with suppress(OSError, ValueError):
        return read_state(folder)
    return {}


def check_format(folder: Path, state: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another version of this program."""
    if state.get("format") != CHECKPOINT_FORMAT:
        raise InputError(
            folder,
            f"has the format {state.get('format')}, this version reads {CHECKPOINT_FORMAT}",
            "use the version that wrote it",
        )
