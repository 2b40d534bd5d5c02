"""The whole run file as a pydantic model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import Field, PrivateAttr

from megaphase.callbacks.config import LoggingConfig
from megaphase.callbacks.early_stopping import MonitorConfig, StopConfig
from megaphase.checkpoint.config import CheckpointConfig
from megaphase.config.fields import FilePath, Name, Section, Seed
from megaphase.config.phases import PhaseConfig
from megaphase.distributed.config import ParallelConfig
from megaphase.estimate.config import HardwareConfig
from megaphase.fault_tolerance.config import FaultsConfig
from megaphase.model.config import ModelConfig
from megaphase.optim.config import DEFAULT_OPTIMIZER, OptimizerConfig
from megaphase.plan.batch_config import (
    BatchConfig,
    BatchError,
    PhaseBatch,
    near_multiples,
    phase_batch,
)
from megaphase.plan.config import TaskConfig
from megaphase.training.config import BackendsConfig, TestSplitConfig, ValidationConfig
from megaphase.utils.errors import InputError


class RunConfig(Section):
    """The keys of the run file and its sections.

    When a run is started again in its run directory, only these may have changed: `output`,
    `tokenizer`, `tasks.*.corpus` (as paths; the content is checked), `bos` (where documents still
    begin with the same token), `parallel`, `deterministic`, `batch.micro`, `phases.*.batch.micro`,
    `phases.*.average.device`, `model.activation_checkpointing`, `parts`, `checkpoint`, `faults`,
    `logging`, `hardware`, `test.samples` and `validation.harness`.
    """

    seed: Seed = 1234
    """Determines the initial weights and every shuffle."""
    output: FilePath
    """The run directory; made where it is missing."""
    tokenizer: FilePath
    """A tokenizer that `megaphase tokenizer train` made, a sentencepiece model, or the directory of
    a Hugging Face model, with a sentencepiece model or a `tokenizer.json`."""
    bos: bool | None = None
    """Whether the first token of a document is predicted from the tokenizer's BOS token, instead of
    the EOD of the document before it; not in translation pairs, nor in conversations, which begin
    as their chat template says. If left out, as the model was trained with, as far as the
    tokenizer's files say (`add_bos_token`)."""
    tasks: dict[Name, TaskConfig] = Field(min_length=1)
    """The tasks by name: their corpora."""
    model: ModelConfig
    """Shape of the model."""
    parallel: ParallelConfig = ParallelConfig()
    """How processes share the work."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of the computation; with `bf16` the master weights are fp32."""
    deterministic: bool = False
    """Whether a GPU computes the same bits whenever a step is repeated, so that a resumed run's
    metrics are bit for bit those of the run that was never interrupted. The CPU does in any case.
    It costs speed: attention's gradient is summed in a fixed order, without cuDNN, and NCCL does
    not sum in the NVLink switch."""
    batch: BatchConfig
    """Batch sizes."""
    optimizer: OptimizerConfig = DEFAULT_OPTIMIZER
    """Settings of the optimizer."""
    parts: BackendsConfig = BackendsConfig()
    """The implementations that compute."""
    phases: list[PhaseConfig] = Field(min_length=1)
    """The phases in their order."""
    validation: ValidationConfig = ValidationConfig()
    """Held-out documents and their losses."""
    test: TestSplitConfig = TestSplitConfig()
    """Documents that are kept for the final results."""
    monitor: MonitorConfig = MonitorConfig()
    """Tasks whose best weights are kept."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are saved."""
    faults: FaultsConfig = FaultsConfig()
    """What is done about bad steps, divergence and dead processes."""
    logging: LoggingConfig = LoggingConfig()
    """How progress is reported."""
    hardware: HardwareConfig = HardwareConfig()
    """The hardware that estimates and MFU refer to."""

    _path: Path = PrivateAttr(default=Path("run.yaml"))

    @property
    def path(self) -> Path:
        """The run file that this was read from."""
        return self._path

    def corpus(self, task: str) -> Path:
        """The prefix of a task's corpus.

        Raises:
            InputError: the task has a number of tokens in its place.
        """
        prefix = self.tasks[task].corpus
        if prefix is None:
            raise InputError(
                self.where(f"tasks.{task}.tokens"),
                "is for `megaphase plan` alone; nothing else works without text",
                "tokenize the text, and name its corpus instead",
            )
        return prefix

    def tasks_with_role(self, role: str) -> list[str]:
        """The tasks that have this role, in the file's order."""
        return [name for name, task in self.tasks.items() if task.role == role]

    def selected_tasks(self, selection: str | list[str]) -> list[str]:
        """Return the tasks of a role or of a list of names."""
        return self.tasks_with_role(selection) if isinstance(selection, str) else selection

    def monitored_tasks(self) -> list[str]:
        """The tasks whose best weights are kept."""
        return self.selected_tasks(self.monitor.tasks or [])

    def stop_conditions(self) -> list[StopConfig]:
        """Of every phase, with the names of the tasks that a role in `overfit.tasks` selects."""
        return [self._with_task_names(phase.stop) for phase in self.phases]

    def _with_task_names(self, stop: StopConfig) -> StopConfig:
        if stop.overfit is None:
            return stop
        tasks = self.selected_tasks(stop.overfit.tasks)
        overfit = stop.overfit.model_copy(update={"tasks": tasks})
        return stop.model_copy(update={"overfit": overfit})

    def phase_number(self, name: str) -> int:
        """The number of the phase with this name."""
        return [phase.name for phase in self.phases].index(name)

    def phase_model(self, number: int) -> ModelConfig:
        """The `model` section of a phase, with the keys that the phase itself gives."""
        own = self.phases[number].model
        return self.model if own is None else own.over(self.model)

    def loss_weights(self, number: int) -> dict[str, float]:
        """The weight of every task's losses in a phase."""
        own = self.phases[number].loss_weights or {}
        return {name: own.get(name, task.loss_weight) for name, task in self.tasks.items()}

    def sampled_tasks(self, number: int) -> list[str]:
        """The tasks that a phase samples."""
        mixture = self.phases[number].mixture
        if mixture.rates is not None:
            return [task for task, rate in mixture.rates.items() if rate != 0]
        return list(self.tasks) if mixture.over is None else self.selected_tasks(mixture.over)

    def relative_loss_weights(self, number: int) -> list[float]:
        """The weight of every task's losses in a phase, as a fraction of the largest weight of a
        task that the phase samples; 1 for the tasks that it does not sample."""
        weights, sampled = self.loss_weights(number), self.sampled_tasks(number)
        largest = max(weights[task] for task in sampled)
        return [weights[task] / largest if task in sampled else 1.0 for task in weights]

    def held_out_fraction(self, task: str) -> float:
        """The fraction of a task's documents that is held out of training."""
        own = self.tasks[task].held_out
        return self.validation.fraction if own is None else own

    def held_out_key(self, task: str) -> str:
        """The key that `held_out_fraction` is from, for messages."""
        own = self.tasks[task].held_out
        return "validation.fraction" if own is None else f"tasks.{task}.held_out"

    def test_fraction(self, task: str) -> float:
        """The fraction of a task's documents in the test split; 0 if it has none."""
        own = self.tasks[task].test
        return (self.test.fraction or 0.0) if own is None else own

    def tested_tasks(self) -> list[str]:
        """The tasks that have a test split."""
        return [task for task in self.tasks if self.test_fraction(task)]

    def test_key(self, task: str) -> str:
        """The key that `test_fraction` is from, for messages."""
        own = self.tasks[task].test
        return "test.fraction" if own is None else f"tasks.{task}.test"

    def phase_batch(self, number: int) -> PhaseBatch:
        """The batch of a phase: the `batch` section, with the keys that the phase itself gives.

        Raises:
            InputError: it is no whole number of samples, or its ramp or micro-batch do not fit.
        """
        own, name = self.phases[number].batch, self.phases[number].name
        seq_len = self.phase_model(number).seq_len
        where = f"phases[{number}].batch"
        try:
            return phase_batch(self.batch, own, seq_len, where)
        except BatchError as error:
            if error.key.startswith("batch.ramp") and self._ramp_is_over_before(number):
                full = self.batch.model_copy(update={"ramp": None})
                return phase_batch(full, own, seq_len, where)
            of_phase = "" if len(self.phases) == 1 else f" in {name}"
            remedy = error.remedy
            lengths = self._lengths_of_common_batch()
            if error.tokens is not None and error.key.startswith("batch.") and len(lengths) > 1:
                near = near_multiples(error.tokens, math.lcm(*lengths))
                remedy = f"write {near}, which fits all phases, or give {where} its own tokens"
            raise InputError(self.where(error.key), f"{error.problem}{of_phase}", remedy) from None

    def _lengths_of_common_batch(self) -> set[int]:
        """`seq_len` of all phases that have no batch of their own."""
        return {
            self.phase_model(number).seq_len
            for number, phase in enumerate(self.phases)
            if phase.batch is None or phase.batch.samples is phase.batch.tokens is None
        }

    def _ramp_is_over_before(self, number: int) -> bool:
        """Whether the phases before this one take the tokens of the run's ramp in any case, which
        is unknown of a phase whose length is in epochs; the batches of those phases are right."""
        ramp = self.batch.ramp
        assert ramp is not None
        tokens = 0
        for before, phase in enumerate(self.phases[:number]):
            if tokens >= ramp.tokens:
                break
            if phase.tokens is not None:
                tokens += phase.tokens
            elif phase.steps is not None:
                batch = self.phase_batch(before)
                tokens += batch.schedule(tokens).samples_before(phase.steps) * batch.seq_len
        return tokens >= ramp.tokens

    def data_ranks(self, processes: int) -> int:
        """The data-parallel ranks of a run on so many processes.

        Raises:
            InputError: tensor parallelism does not divide the processes, or `secondary_partition`
                not the data-parallel ranks.
        """
        tensor = self.parallel.tensor
        if processes % tensor:
            raise InputError(
                self.where("parallel.tensor"),
                f"{tensor} does not divide the {processes} processes of this run",
                f"start a multiple of {tensor} processes, or change it",
            )
        data = processes // tensor
        secondary = self.parallel.secondary_partition
        if secondary is not None and data % secondary:
            raise InputError(
                self.where("parallel.secondary_partition"),
                f"{secondary} does not divide the {data} data-parallel ranks of this run",
                f"start a multiple of {secondary} processes, change it, or leave it out",
            )
        return data

    def micro_batches(self, processes: int, number: int = 0) -> int:
        """How many an optimizer step of a phase with its full batch has on each data-parallel rank.

        `plan.batch_layout` checks that the ranks share each batch evenly.

        Raises:
            InputError: see `data_ranks`.
        """
        batch = self.phase_batch(number)
        return -(-batch.samples // (self.data_ranks(processes) * batch.micro))

    def where(self, key: str) -> str:
        """`FILE: KEY`, for messages about a value that turned out wrong later on."""
        return f"{self._path}: {key}"
