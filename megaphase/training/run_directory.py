"""A run directory: what lies where, and the check that it belongs to this run file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megaphase.checkpoint.names import CHECKPOINTS
from megaphase.config import RunConfig
from megaphase.errors import InputError
from megaphase.files import read_json, write_json_whole
from megaphase.run_files import METRICS_FILE, PLAN_FILE, RUN_FILE

# What may change between two starts of one run: nothing that its numbers depend on, but by their
# rounding. Where corpora and tokenizer lie may, what they hold may not: the plan's fingerprint
# tells.
FREE_SECTIONS = (
    "output",
    "checkpoint",
    "logging",
    "tokenizer",
    "parallel",
    "faults",
    "hardware",
    "parts",
)
FREE_KEYS = {"batch": ("micro",), "model": ("activation_checkpointing",)}
FREE_TASK_KEYS = ("corpus",)


@dataclass(frozen=True)
class RunDirectory:
    """The paths in a run directory; see DESIGN, section 5, for what the files hold."""

    path: Path

    @property
    def run_file(self) -> Path:
        """The run file as it was understood, with every default."""
        return self.path / RUN_FILE

    @property
    def plan_file(self) -> Path:
        """Tokens, rates and epochs per phase and task."""
        return self.path / PLAN_FILE

    @property
    def metrics(self) -> Path:
        return self.path / METRICS_FILE

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def traces(self) -> Path:
        """What single steps saw, where something was wrong with them."""
        return self.path / "traces"

    @property
    def profile(self) -> Path:
        """Where the time of a few steps went: torch's traces and what they say."""
        return self.path / "profile"

    @property
    def lock(self) -> Path:
        """Held by the process that trains here."""
        return self.path / ".lock"

    def refuse_other_run(self, config: RunConfig) -> None:
        """Raise InputError, naming the first key, where another run file began this directory."""
        if not self.run_file.exists():
            return
        began = _identity(_with_defaults(self._read(self.run_file)))
        now = _identity(_settings(config))
        difference = _first_difference("", began, now)
        if difference is not None:
            key, old, new = difference
            raise InputError(
                config.where(key),
                f"is {_show(new)}, but the run in {self.path} began with {_show(old)}",
                "put the old value back or choose another output",
            )

    def claim(self, config: RunConfig, plan: dict[str, Any]) -> None:
        """Write down the run file and the plan, in a directory that is new or of this run.

        Raises:
            InputError: the corpora have changed since the run began, or the directory cannot be
                written.
        """
        known = self._read(self.plan_file) if self.plan_file.exists() else plan
        if known.get("fingerprint") != plan["fingerprint"]:
            raise InputError(
                config.where("tasks"),
                f"the corpora are not those with which the run in {self.path} began",
                "put the old ones back or choose another output",
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json_whole(self.plan_file, plan)
            write_json_whole(self.run_file, _settings(config))
        except OSError as error:
            raise InputError(
                config.where("output"), f"{self.path} cannot be written ({error.strerror})"
            ) from None

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            return read_json(path)
        except (OSError, ValueError):
            raise InputError(
                path, "is missing or damaged", "choose another output or restore the file"
            ) from None


def _settings(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude_none=True)


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """With what an earlier version did not write, since it had no such key."""
    try:
        return _settings(RunConfig.model_validate(settings))
    except ValidationError:
        return settings


def _identity(settings: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved run file on which the run's numbers depend."""
    kept = {key: value for key, value in settings.items() if key not in FREE_SECTIONS}
    for section, free in FREE_KEYS.items():
        kept[section] = _without(free, settings.get(section, {}))
    tasks = settings.get("tasks", {})
    return kept | {"tasks": {name: _without(FREE_TASK_KEYS, task) for name, task in tasks.items()}}


def _without(keys: Iterable[str], section: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in keys}


def _first_difference(key: str, old: Any, new: Any) -> tuple[str, Any, Any] | None:
    """The path of the first value that differs between two JSON values, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [
            (f"{key}.{k}" if key else k, old.get(k), new.get(k))
            for k in dict.fromkeys([*old, *new])
        ]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{key}[{i}]", a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        return None if old == new else (key, old, new)
    return next(filter(None, (_first_difference(*pair) for pair in pairs)), None)


def _show(value: Any) -> str:
    if value is None:
        return "missing"
    return str(value) if not isinstance(value, dict | list) else json.dumps(value)
