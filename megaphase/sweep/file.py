"""The sweep file as pydantic models; every error names the path of its key."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from megaphase.config.fields import (
    Count,
    Few,
    FewOrZero,
    FilePath,
    FilePathOrContent,
    Name,
    ProperFraction,
    RoleOrTaskNames,
    Section,
    Seed,
    Steps,
    Temperature,
)
from megaphase.launch.slurm.pipeline import GpuType, NodeMemory, Step
from megaphase.sweep.arms.config import Arm, LearningRateGrid, each_once
from megaphase.sweep.planning.config import Halving, Pruning
from megaphase.utils.validation_errors import as_input_error


class Within(Section):
    """Temperatures that divide a group's rate among its tasks; 1: in proportion to tokens."""

    high: Temperature = 1.0
    low: Temperature = 1.0


class TestSplit(Section):
    """The documents on which the runs that spend the budget are reported, and which no run trains
    or is chosen on: `test` of the run file.

    fraction: of every task's documents. samples: of every task.
    """

    __test__ = False  # for pytest

    fraction: ProperFraction
    samples: Annotated[Count, Field(le=10**9)] = 800


class TrainingLoss(Section):
    """The loss on documents that are trained on, the same ones for all seeds; samples: of every
    task."""

    samples: Annotated[Count, Field(le=10**9)] = 800


class TranslationScores(Section):
    """How sources of the test split, or held-out ones where there is none, are translated after a
    run has ended; see `megaphase translate`."""

    samples: Annotated[Count, Field(le=10**9)] = 200
    max_tokens: Few = 256
    beam: Annotated[Count, Field(le=1000)] = 4
    batch: Few = 16


class PrimaryContrast(Section):
    """The comparison for which the sweep is made, to be named before its runs.

    against: one arm or several. loss: `mean`, of high- and low-resource loss, or `high`, `low` or a
        task. model: a name of the sweep file's models; all of them by default.
    """

    arm: Name
    against: list[Name] = Field(min_length=1)
    loss: Name = "mean"
    model: Name | None = None

    @field_validator("against", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("against")
    @classmethod
    def _each_once(cls, arms: list[str]) -> list[str]:
        return each_once("this list", arms)


class ClusterJobs(Section):
    """The resources of a run's job on a cluster; the keys of a pipeline's step, described in
    docs/slurm.md.

    mem, exclusive: of the jobs that train; sbatch: of all jobs.
    next_sbatch: options of the small jobs that start the rounds after the first.
    at_a_time: maximum number of concurrent runs of one array.
    """

    nodes: Few = 1
    gpus_per_node: FewOrZero = 8
    gpu_type: GpuType | None = None
    tasks_per_node: Few | None = None
    cores: Few | None = None
    mem: NodeMemory | None = None
    exclusive: bool = False
    restarts: FewOrZero = 3
    exclude_bad_nodes: bool = False
    sbatch: Any = ()
    next_sbatch: Any = ()
    at_a_time: Few | None = None

    @model_validator(mode="after")
    def _makes_steps(self) -> Self:
        self._train_step()
        self._next_step()
        return self

    @property
    def options(self) -> Sequence[str]:
        """The options of sbatch as a list."""
        return self._train_step().sbatch

    @property
    def next_options(self) -> Sequence[str]:
        """Likewise, for the jobs that start rounds."""
        return self._next_step().sbatch

    @property
    def training(self) -> dict[str, Any]:
        """The keys of a training step."""
        own = {"next_sbatch", "at_a_time"}
        return self.model_dump(include=self.model_fields_set - own)

    def _train_step(self) -> Step:
        return _checked_step("sbatch", {"train": "RUN_FILE", **self.training})

    def _next_step(self) -> Step:
        step = {"command": "sweep", "sbatch": self.next_sbatch}
        return _checked_step("next_sbatch", step)


def _checked_step(options: str, keys: dict[str, Any]) -> Step:
    """Make a pipeline's step, which validates the keys; options: the name of its `sbatch` here."""
    try:
        return Step.model_validate(keys)
    except ValidationError as error:
        found = as_input_error(Path(), error)
        key = f"{options}: " if error.errors()[0]["loc"] else ""
        raise ValueError(f"{key}{found.problem}; {found.remedy}".removesuffix("; ")) from None


class SweepConfig(Section):
    """The whole sweep file. Relative paths in it are relative to the file itself.

    run: a run file, or its content; its seed, output and phases are not used.
    settings: values that replace the run file's, by key path, such as `tasks.hi.subsample: 0.1`.
    high, low: the two groups of tasks, as a role or a list; tasks in neither are left out.
    steps, tokens: the budget of every run, over all of its phases.
    models: changes of the section `model` by name; by default one model as in the run file.
    prune: halving stops the worse half of an arm's settings early; see Halving.
    keep_checkpoints: of all runs that have ended, or only of those from which others may start.
    """

    run: FilePathOrContent
    output: FilePath
    settings: dict[str, Any] = Field(default={})
    high: RoleOrTaskNames
    low: RoleOrTaskNames
    within: Within = Within()
    steps: Steps | None = None
    tokens: Count | None = None
    learning_rate: LearningRateGrid
    seeds: list[Seed] = Field(default=[1234], min_length=1)
    models: dict[Name, dict[str, Any]] = Field(default={})
    arms: dict[Name, Arm] = Field(min_length=1)
    prune: Pruning | None = None
    keep_checkpoints: Literal["all", "first-stages"] = "all"
    test: TestSplit | None = None
    training_loss: TrainingLoss | None = None
    translation: TranslationScores | None = None
    primary: PrimaryContrast | None = None
    slurm: ClusterJobs | None = None

    @property
    def halving(self) -> Halving | None:
        """The rule of `prune`, with all its keys."""
        return Halving() if self.prune == "halving" else self.prune

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: list[int]) -> list[int]:
        return each_once("this list", seeds)

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give the budget of a run, either steps or tokens")
        return self
