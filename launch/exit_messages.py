"""Messages about a run whose processes have died, derived from its run directory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from megaphase.checkpoint.names import newest_state
from megaphase.checkpoint.state import full_name
from megaphase.config.load import load_run_file
from megaphase.launch.local import ExitMessages
from megaphase.plan.origin import read_origin
from megaphase.training.resume_point import loss_sentence, resume_sentence
from megaphase.utils.errors import InputError
from megaphase.utils.metrics_rows import last_rows
from megaphase.utils.run_files import METRICS_FILE


def training_exit_messages(run_file: Path, overrides: Sequence[str]) -> ExitMessages:
    """Return the exit messages of a training; files are read only when a message is needed."""

    def output() -> Path:
        return load_run_file(run_file, tuple(overrides)).output

    return ExitMessages(
        resume_point=lambda: _or_nothing(lambda: resume_sentence(_newest(output()))),
        loss=lambda: _or_nothing(lambda: _loss(output())),
    )


def _newest(run_dir: Path) -> str | None:
    state = newest_state(run_dir)
    return None if state is None else full_name(state["step"])


def _loss(run_dir: Path) -> str:
    saved = (newest_state(run_dir) or {}).get("step", read_origin(run_dir).step)
    last = max((row["step"] for row in last_rows(run_dir / METRICS_FILE)), default=saved)
    return loss_sentence(_newest(run_dir), last - saved)


def _or_nothing(sentence: Callable[[], str]) -> str:
    """Return the sentence, or "" if it cannot be derived, e.g. because the run file is gone."""
    with suppress(InputError, OSError):
        return sentence()
    return ""
