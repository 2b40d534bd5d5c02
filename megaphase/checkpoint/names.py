"""The names with which a user refers to a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megaphase.checkpoint.fetch import fetch_checkpoint
from megaphase.checkpoint.state import STATE_FILE, checkpoint_folders, state_or_nothing
from megaphase.utils.errors import InputError
from megaphase.utils.files import real_path
from megaphase.utils.paths import expanded_path
from megaphase.utils.remote_files import is_url
from megaphase.utils.run_files import CHECKPOINTS
from megaphase.utils.validation_errors import hint


def find_checkpoint(text: str) -> Path:
    """Return the directory of `RUN@NAME`, or of a path of a checkpoint; of one in a store, that in
    the cache, into which it is fetched.

    NAME: a phase, for the checkpoint at its end; a directory in RUN/checkpoints, such as
    `step-00001000`; or a link there, such as `latest`, `best-hi` or `best-mean`.

    Raises:
        InputError: there is no such checkpoint.
        RunError: it cannot be fetched.
    """
    if is_url(text):
        return fetch_checkpoint(text)
    folder = _given(text)
    if _is_checkpoint(folder):
        return real_path(folder)
    run, separator, name = text.rpartition("@")
    if not separator:
        raise not_a_checkpoint(text, folder)
    return find_in_run(_given(run), name)


def with_latest(text: str) -> str:
    """Return `RUN@latest` for a run directory, and any other name of a checkpoint as it is."""
    return f"{text}@latest" if _is_run(_given(text)) else text


def _is_run(folder: Path) -> bool:
    try:
        return (folder / CHECKPOINTS).is_dir() and not _is_checkpoint(folder)
    except (OSError, ValueError):  # the name is too long, or the folder is not readable
        return False


def not_a_checkpoint(text: object, folder: Path) -> InputError:
    """Return the error that the folder, which a user named by `text`, is not a checkpoint."""
    if _is_hugging_face_model(folder):
        remedy = "convert it with `megaphase convert from-hf`"
        return InputError(text, "this is a Hugging Face model, not a checkpoint", remedy)
    if _is_run(folder):
        ends = _phase_ends(folder / CHECKPOINTS)
        names = " or ".join(f"{text}@{name}" for name in ("latest", *list(ends)[-1:]))
        return InputError(text, "this is a run directory, not a checkpoint", f"give {names}")
    remedy = "give RUN@NAME, a step-… directory or a directory that `megaphase convert` wrote"
    return InputError(text, "this is not a checkpoint", remedy)


def _is_hugging_face_model(folder: Path) -> bool:
    try:
        names = [path.name for path in folder.iterdir()]
    except (OSError, ValueError):
        return False
    weights = any(name.endswith((".safetensors", ".bin")) for name in names)
    return weights and "config.json" in names


def _given(text: str) -> Path:
    """Expand `~` in a path from the command line; shells do so only at the start of a word."""
    try:
        return expanded_path(text)
    except ValueError as error:
        raise InputError("", str(error)) from None


def find_for_run(run: Path, text: str) -> Path:
    """Return the directory of a NAME in this run, RUN@NAME of any run, or a path."""
    return find_checkpoint(text) if names_path(text) else find_in_run(run, text)


def names_path(text: str) -> bool:
    """Return whether this is RUN@NAME or a path, not the NAME of a checkpoint in some run."""
    return "@" in text or "/" in text


def find_in_run(run: Path, name: str) -> Path:
    """Return the directory of the checkpoint with this name in a run; see `find_checkpoint`."""
    folder = run / CHECKPOINTS
    if not folder.is_dir():
        raise InputError(run, f"has no folder {CHECKPOINTS}", "give a run directory")
    if name and _is_checkpoint(folder / name):
        return real_path(folder / name)
    ends = _phase_ends(folder)
    if name in ends:
        return real_path(ends[name])
    there = sorted(path.name for path in folder.iterdir() if _is_checkpoint(path))
    names = [*ends, *(each for each in there if each[0] != ".")]
    raise InputError(f"{run}@{name}", "there is no such checkpoint", hint(name, names, "there are"))


def newest_state(run: Path) -> dict[str, Any] | None:
    """Return the state of the newest readable checkpoint of a run, or None if there is none."""
    for folder in reversed(checkpoint_folders(run / CHECKPOINTS)):
        state = state_or_nothing(folder)
        if type(state.get("step")) is int:
            return state
    return None


def permanent_ends(run: Path) -> dict[str, int]:
    """Return the last step of each phase that has a checkpoint at its end, by the phase's name."""
    states = {name: state_or_nothing(path) for name, path in _phase_ends(run / CHECKPOINTS).items()}
    return {name: state["step"] for name, state in states.items() if type(state["step"]) is int}


def _is_checkpoint(path: Path) -> bool:
    try:
        return (path / STATE_FILE).is_file()
    except (OSError, ValueError):  # the name is too long, or the folder is not readable
        return False


def _phase_ends(folder: Path) -> dict[str, Path]:
    """Return the newest checkpoint at the end of each phase, by the phase's name."""
    states = {path: state_or_nothing(path) for path in checkpoint_folders(folder)}
    return {
        state["phase_name"]: path
        for path, state in states.items()
        if state.get("permanent") and "phase_name" in state and "step" in state
    }
