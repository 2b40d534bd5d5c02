"""The whole run file as a pydantic model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PrivateAttr

from megaphase.config.fields import CountOrZero, FilePath, Section
from megaphase.config.phases import PhaseConfig
from megaphase.config.sections import (
    BatchConfig,
    CheckpointConfig,
    FaultsConfig,
    LoggingConfig,
    ModelConfig,
    MonitorConfig,
    OptimizerConfig,
    ParallelConfig,
    TaskConfig,
    ValidationConfig,
)


class RunConfig(Section):
    """The whole run file. Relative paths in it are relative to the file itself."""

    seed: CountOrZero = 1234
    output: FilePath
    tokenizer: FilePath
    tasks: dict[str, TaskConfig] = Field(min_length=1)
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: Literal["bf16", "fp32"] = "bf16"
    batch: BatchConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    phases: list[PhaseConfig] = Field(min_length=1)
    validation: ValidationConfig = ValidationConfig()
    monitor: MonitorConfig = MonitorConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    logging: LoggingConfig = LoggingConfig()

    _path: Path = PrivateAttr(default=Path("run.yaml"))

    @property
    def path(self) -> Path:
        """The run file that this was read from."""
        return self._path

    def tasks_with_role(self, role: str) -> list[str]:
        """The tasks that have this role, in the file's order."""
        return [name for name, task in self.tasks.items() if task.role == role]

    def selected_tasks(self, selection: str | list[str]) -> list[str]:
        """The tasks that a role, or a list of names, stands for."""
        return self.tasks_with_role(selection) if isinstance(selection, str) else selection

    def where(self, key: str) -> str:
        """`FILE: KEY`, for messages about a value that turned out wrong later on."""
        return f"{self._path}: {key}"

    def resolved_paths(self, folder: Path) -> Self:
        """A copy whose paths are absolute, relative ones taken from `folder`."""
        folder = folder.resolve()
        tasks = {
            name: task.model_copy(update={"corpus": folder / task.corpus.expanduser()})
            for name, task in self.tasks.items()
        }
        return self.model_copy(
            update={
                "output": folder / self.output.expanduser(),
                "tokenizer": folder / self.tokenizer.expanduser(),
                "tasks": tasks,
            }
        )
