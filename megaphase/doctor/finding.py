"""The result of a check."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Verdict = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        text: what was found.
        remedy: what to do about it; empty if nothing needs to be done.
    """

    verdict: Verdict
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Settings:
    """What the checks need to know.

    Attributes:
        directory: where file system checks write; their files are removed again.
        gpu: whether this node must have GPUs, and whether operators are compiled for it.
    """

    directory: Path
    gpu: bool


def ok(text: str, remedy: str = "") -> Finding:
    """Return a finding about something that works."""
    return Finding("ok", text, remedy)


def warning(text: str, remedy: str) -> Finding:
    """Return a finding with which a run works, but slower or less safely, or not in every
    setting."""
    return Finding("warning", text, remedy)


def fault(text: str, remedy: str) -> Finding:
    """Return a finding with which a run fails."""
    return Finding("fault", text, remedy)


def first_line(message: object) -> str:
    """Return the beginning of another program's message as one line."""
    return " ".join(str(message).split())[:300]
