"""Runs that go on from another run's checkpoint, without a copy of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megaphase.checkpoint.names import find_checkpoint
from megaphase.checkpoint.store import read_state
from megaphase.config import RunConfig
from megaphase.errors import InputError
from megaphase.files import write_json_whole
from megaphase.plan.history import ORIGIN_FILE
from megaphase.plan.spec import PlanSpec
from megaphase.training.run_directory import RunDirectory


@dataclass(frozen=True)
class Branch:
    """Where a run begins: another one's checkpoint, and what that run had used by then."""

    checkpoint: Path
    step: int
    tokens: int
    used: dict[str, int]
    state: dict[str, Any]

    def record(self, run_dir: Path) -> None:
        """Write down where the run began, so that it can go on without being told again."""
        facts = {key: value for key, value in asdict(self).items() if key != "state"}
        write_json_whole(run_dir / ORIGIN_FILE, {**facts, "checkpoint": str(self.checkpoint)})

    def check(self, config: RunConfig, spec: PlanSpec, model: dict[str, Any]) -> None:
        """Refuse a model or streams that are not those of the run that this one goes on from.

        Raises:
            InputError: naming the first key that differs.
        """
        for key, found in self.state["model"].items():
            if model[key] != found:
                raise InputError(
                    config.where(f"model.{key}"),
                    f"is {model[key]}, but {self.checkpoint} has {found}",
                    "write the same model",
                )
        streams = spec.stream_fingerprints
        for task in streams.keys() & self.state["streams"].keys():
            if streams[task] != self.state["streams"][task]:
                raise InputError(
                    config.where(f"tasks.{task}"),
                    f"its samples are not those that {self.checkpoint} was trained on",
                    "give the same corpus, seed, model.seq_len and validation.fraction",
                )


def begin_branch(config: RunConfig, source: str) -> Branch:
    """A branch from `RUN@NAME` or a checkpoint's path.

    Raises:
        InputError: there is no such checkpoint, or a phase that it has behind it stands in the run
            file again.
    """
    folder = find_checkpoint(source)
    state = read_state(folder)
    done = state["phase_name"]
    for number, phase in enumerate(config.phases):
        if phase.name == done:
            raise InputError(
                config.where(f"phases[{number}].name"),
                f"{done} has been trained in {folder}",
                "leave it out: the run file of a branch holds what follows",
            )
    return _branch(folder, state)


def recorded_branch(directory: RunDirectory) -> Branch | None:
    """Where the run in this directory began, if it is a branch."""
    path = directory.path / ORIGIN_FILE
    if not path.exists():
        return None
    try:
        folder = Path(json.loads(path.read_text())["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(path, "is damaged", "branch into another output") from None
    if not folder.is_dir():
        # Needed until the first checkpoint only; the loading of it will tell.
        return _from_record(path, folder)
    return _branch(folder, read_state(folder))


def _branch(folder: Path, state: dict[str, Any]) -> Branch:
    position = state["position"]
    return Branch(folder, position["step"], position["tokens"], state["used"], state)


def _from_record(path: Path, folder: Path) -> Branch:
    record = json.loads(path.read_text())
    state: dict[str, Any] = {"model": {}, "streams": {}}
    return Branch(folder, record["step"], record["tokens"], record["used"], state)


def choose_branch(config: RunConfig, source: str | None) -> Branch | None:
    """The branch that was recorded, or the one that is asked for now.

    Raises:
        InputError: the run in the directory began otherwise.
    """
    directory = RunDirectory(config.output)
    recorded = recorded_branch(directory)
    if source is None:
        return recorded
    if recorded is not None and recorded.checkpoint == find_checkpoint(source):
        return recorded
    if recorded is not None or directory.run_file.exists():
        began = f"from {recorded.checkpoint}" if recorded else "by itself"
        raise InputError(
            config.where("output"),
            f"the run in {config.output} began {began}, not from {source}",
            "choose another output",
        )
    return begin_branch(config, source)
