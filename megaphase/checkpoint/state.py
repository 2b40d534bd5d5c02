"""A checkpoint's state file, and the names of checkpoints; without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megaphase.utils.errors import InputError
from megaphase.utils.files import read_json
from megaphase.utils.names import BEST_PREFIX, STEP_PREFIX

CHECKPOINT_FORMAT = 2
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"  # size and hash of every other file

# Keys of the state that not every checkpoint has: the hash of the tokenizer with which the model
# was trained, the ids [first, stop) by which its vocabulary was extended, and the optimizer whose
# state it holds.
TOKENIZER_HASH = "tokenizer_hash"
NEW_TOKENS = "new_tokens"
# The kinds of tensors that are mean squares of the gradients of a matrix's rows and columns; they
# are stored whole, beside the first piece of the matrix.
ROWS, COLUMNS = "exp_avg_sq_row", "exp_avg_sq_col"
OPTIMIZER, ADAMW = "optimizer", "adamw"  # which is AdamW where it is missing
# The kind of tensors that are an average of the weights; the key of its record in the state.
AVERAGE = "average"
NAME = re.compile(r"(step|best)-([0-9]{8,})")


def full_name(step: int) -> str:
    """Return the name of a checkpoint from which a run can resume."""
    return f"{STEP_PREFIX}{step:08d}"


def best_name(step: int) -> str:
    """Return the name of a checkpoint with only the weights."""
    return f"{BEST_PREFIX}{step:08d}"


def step_of(name: str, kind: str = "step") -> int | None:
    """Return the step in the name of a checkpoint of this kind, or None if it is not one."""
    match = NAME.fullmatch(name)
    if match is None or match[1] != kind or (match[2][0] == "0" and len(match[2]) > 8):
        return None
    return int(match[2])


def checkpoint_folders(folder: Path, kind: str = "step") -> list[Path]:
    """Return the directories in a run's checkpoint folder that have a checkpoint's name, by step.

    Links and files with such a name are ignored.
    """
    if not folder.is_dir():
        return []
    found = [(step_of(path.name, kind), path) for path in folder.iterdir()]
    named = [(step, path) for step, path in found if step is not None]
    return [path for _, path in sorted(named) if path.is_dir() and not path.is_symlink()]


def read_state(folder: Path) -> dict[str, Any]:
    """Return the state that the writer of a checkpoint stored in it.

    Raises OSError or ValueError if it cannot be read.
    """
    state = read_json(folder / STATE_FILE)
    if not isinstance(state, dict):
        raise ValueError(f"{STATE_FILE} is not a JSON object")
    return state


def state_or_nothing(folder: Path) -> dict[str, Any]:
    """Return the state of a checkpoint, or an empty one if it is damaged."""
    with suppress(OSError, ValueError):
        return read_state(folder)
    return {}


def check_format(folder: Path, state: Mapping[str, Any]) -> None:
    """Reject a checkpoint of another version of this program."""
    if state.get("format") != CHECKPOINT_FORMAT:
        raise InputError(
            folder,
            f"has the format {state.get('format')}, this version reads {CHECKPOINT_FORMAT}",
            "use the version that wrote it",
        )
