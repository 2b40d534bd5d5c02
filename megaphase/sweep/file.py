"""The sweep file as pydantic models; every error names the key's path."""

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
    FractionOf1,
    LearningRate,
    Name,
    ProperFraction,
    RoleOrTaskNames,
    Section,
    Seed,
    Steps,
    Temperature,
)
from megaphase.launch.slurm.pipeline import Step
from megaphase.utils.validation_errors import as_input_error

Kind = Literal["static", "two-phase", "restart", "keep", "low-only", "regularized"]
KINDS: tuple[Kind, ...] = ("static", "two-phase", "restart", "keep", "low-only", "regularized")
# Kinds of two stages, the first of which takes a share of the budget.
STAGED = ("two-phase", "restart", "keep", "low-only")


class LearningRateGrid(Section):
    """One schedule for all arms, and the peaks that every arm tries.

    final: of the peak. warmup: of the schedule's steps.
    """

    schedule: Literal["cosine", "linear", "inverse_sqrt", "constant"] = "cosine"
    peaks: list[LearningRate] = Field(min_length=1)
    final: FractionOf1 = 0.1
    warmup: FractionOf1 = 0.03

    @field_validator("peaks")
    @classmethod
    def _each_once(cls, peaks: list[float]) -> list[float]:
        return _unique("this list", peaks)


class Within(Section):
    """Temperatures by which the tasks of a group share its rate; 1: in proportion to tokens."""

    high: Temperature = 1.0
    low: Temperature = 1.0


class Arm(Section):
    """One way to spend the budget, with all the settings of it that are tried.

    kind: the arm's name if left out.
    rates: of the low-resource tasks together in the last phase; temperatures: of the mixture of all
        tasks there, instead or as well.
    pretrain: shares of the budget that the first stage has.
    settings: values of the run file by key path, such as `model.dropout: 0.1`.
    early_stopping: end the last phase after so many validations without a gain of any low-resource
        task, and take the weights of the lowest mean low-resource loss.
    """

    kind: Kind | None = None
    rates: list[ProperFraction] = Field(default=[])
    temperatures: list[Temperature] = Field(default=[])
    pretrain: list[ProperFraction] = Field(default=[])
    settings: dict[str, Any] = Field(default={})
    early_stopping: Few | None = None

    @field_validator("rates", "temperatures", "pretrain")
    @classmethod
    def _each_once(cls, values: list[float]) -> list[float]:
        return _unique("this list", values)


class TranslationScores(Section):
    """How held-out sources are translated when a run has ended; see `megaphase translate`."""

    samples: Annotated[Count, Field(le=10**9)] = 200
    max_tokens: Few = 256
    beam: Annotated[Count, Field(le=1000)] = 4
    batch: Few = 16


class ClusterJobs(Section):
    """What the job of a run asks a cluster for; the keys of a step of a pipeline, of which
    docs/slurm.md tells.

    next_sbatch: options of the small jobs that begin the rounds after the first.
    at_a_time: runs of one array.
    """

    nodes: Few = 1
    gpus_per_node: FewOrZero = 8
    tasks_per_node: Few | None = None
    cores: Few | None = None
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
        """Of sbatch, one by one."""
        return self._train_step().sbatch

    @property
    def next_options(self) -> Sequence[str]:
        """Likewise, of the jobs that begin rounds."""
        return self._next_step().sbatch

    @property
    def training(self) -> dict[str, Any]:
        """Keys of a step that trains."""
        own = {"next_sbatch", "at_a_time"}
        return self.model_dump(include=self.model_fields_set - own)

    def _train_step(self) -> Step:
        return _checked_step("sbatch", {"train": "RUN_FILE", **self.training})

    def _next_step(self) -> Step:
        step = {"command": "sweep", "sbatch": self.next_sbatch}
        return _checked_step("next_sbatch", step)


def _checked_step(options: str, keys: dict[str, Any]) -> Step:
    """A pipeline's step, which finds what is wrong; options: what its `sbatch` is called here."""
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
    high, low: the two groups of tasks, as a role or a list; what is in neither is left out.
    steps, tokens: the budget of every run, over all of its phases.
    models: changes of the section `model` by name; one model as the run file has it if left out.
    keep_checkpoints: of all runs that have ended, or of those alone that others may go on from.
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
    keep_checkpoints: Literal["all", "first-stages"] = "all"
    translation: TranslationScores | None = None
    slurm: ClusterJobs | None = None

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: list[int]) -> list[int]:
        return _unique("this list", seeds)

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give the budget of a run, either steps or tokens")
        return self


def _unique(what: str, values: list[Any]) -> list[Any]:
    if len(set(values)) < len(values):
        twice = next(value for value in values if values.count(value) > 1)
        raise ValueError(f"{twice!r} stands twice in {what}; leave it out once")
    return values
