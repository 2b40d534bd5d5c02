"""The whole run file as a pydantic model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PrivateAttr

from megaphase.callbacks.config import LoggingConfig
from megaphase.callbacks.early_stopping import MonitorConfig
from megaphase.checkpoint.config import CheckpointConfig
from megaphase.config.fields import FilePath, Name, Section, Seed
from megaphase.config.phases import PhaseConfig
from megaphase.distributed.config import ParallelConfig
from megaphase.estimate.hardware import HardwareConfig
from megaphase.fault_tolerance.config import FaultsConfig
from megaphase.model.config import ModelConfig
from megaphase.optim.config import OptimizerConfig
from megaphase.plan.config import BatchConfig, TaskConfig
from megaphase.training.config import BackendsConfig, ValidationConfig
from megaphase.utils.errors import InputError


class RunConfig(Section):
    """The whole run file. Relative paths in it are relative to the file itself."""

    seed: Seed = 1234
    output: FilePath
    tokenizer: FilePath
    tasks: dict[Name, TaskConfig] = Field(min_length=1)
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: Literal["bf16", "fp32"] = "bf16"
    batch: BatchConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    parts: BackendsConfig = BackendsConfig()
    phases: list[PhaseConfig] = Field(min_length=1)
    validation: ValidationConfig = ValidationConfig()
    monitor: MonitorConfig = MonitorConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    logging: LoggingConfig = LoggingConfig()
    hardware: HardwareConfig = HardwareConfig()

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

    def held_out_fraction(self, task: str) -> float:
        """The fraction of a task's documents that is held out of training."""
        own = self.tasks[task].held_out
        return self.validation.fraction if own is None else own

    def held_out_key(self, task: str) -> str:
        """The key that `held_out_fraction` is from, for messages."""
        own = self.tasks[task].held_out
        return "validation.fraction" if own is None else f"tasks.{task}.held_out"

    def micro_batches(self, processes: int) -> int:
        """How many an optimizer step has on each data-parallel rank of a run on so many processes.

        Raises:
            InputError: tensor parallelism does not divide the processes, or the data-parallel ranks
                not the global batch.
        """
        tensor, micro = self.parallel.tensor, self.batch.micro
        if processes % tensor:
            raise InputError(
                self.where("parallel.tensor"),
                f"{tensor} does not divide the {processes} processes of this run",
                f"start a multiple of {tensor} processes, or change it",
            )
        data = processes // tensor
        if self.batch.samples % (data * micro):
            raise InputError(
                self.where("batch.samples"),
                f"{self.batch.samples} is not a multiple of {data} data-parallel ranks × micro "
                f"{micro} = {data * micro}",
                "change samples, micro or the number of processes",
            )
        return self.batch.samples // (data * micro)

    def where(self, key: str) -> str:
        """`FILE: KEY`, for messages about a value that turned out wrong later on."""
        return f"{self._path}: {key}"
