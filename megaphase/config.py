"""The run file as pydantic models; every error names the file and the key's path.

`load_run_file` is the only way in: it reads YAML 1.2 (so that the task `no` stays Norwegian and
`200e9` is a number), applies `key.path=value` overrides and checks all that can be checked
without looking at a corpus or at the world size.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from megaphase.errors import InputError
from megaphase.validation_errors import as_input_error, hint
from megaphase.yaml_file import parse_scalar, read_yaml

RATE_SUM_TOLERANCE = 1e-6


def _whole_number(value: Any) -> Any:
    """Let counts be written as 200e9, which YAML reads as a float."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


Count = Annotated[int, BeforeValidator(_whole_number), Field(gt=0, strict=True)]
CountOrZero = Annotated[int, BeforeValidator(_whole_number), Field(ge=0, strict=True)]
# Strict: true is no number, and "3e-4" in quotes is text.
Positive = Annotated[float, Field(gt=0, strict=True)]
PositiveOrZero = Annotated[float, Field(ge=0, strict=True)]
FractionOf1 = Annotated[float, Field(ge=0, le=1, strict=True)]


def _non_empty_path(value: Any) -> Any:
    if isinstance(value, Path) or (isinstance(value, str) and value.strip()):
        return value
    raise PydanticCustomError("path_type", "not a path")


FilePath = Annotated[Path, BeforeValidator(_non_empty_path)]


def _role_or_task_names(value: Any) -> Any:
    if value == []:
        raise PydanticCustomError("too_short", "empty")
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise PydanticCustomError("selection_type", "neither a role nor a list of tasks")
    return value


RoleOrTaskNames = Annotated[str | list[str], PlainValidator(_role_or_task_names)]


class Section(BaseModel):
    """A mapping of the run file; unknown keys are refused with the nearest right name."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if data is None:  # `validation:` with nothing below it
            return {}
        if not isinstance(data, dict):
            raise PydanticCustomError("dict_type", "not a mapping")
        for key in data:
            if key not in cls.model_fields:
                what = hint(key, cls.model_fields, "the keys here are")
                raise ValueError(f"unknown key {key!r}; {what}")
        return data


class TaskConfig(Section):
    """One training distribution: what it teaches and where its corpus lies (PREFIX of .bin/.idx).

    kind: texts of a language, or pairs for translation.
    attend_across_documents: whether the documents of a sample see each other; by default those of
    an lm task do, translation pairs do not.
    role is any word, such as `high` or `low`, by which a mixture's `over` can name several tasks.
    """

    corpus: FilePath
    kind: Literal["lm", "translation"] = "lm"
    attend_across_documents: bool | None = Field(default=None, strict=True)
    role: str | None = Field(default=None, min_length=1)

    @property
    def attends_across_documents(self) -> bool:
        """`attend_across_documents`, or what the kind of task has where it is left out."""
        if self.attend_across_documents is None:
            return self.kind == "lm"
        return self.attend_across_documents


class ModelConfig(Section):
    """The GPT's shape: a preset, explicit sizes, or a preset with some sizes changed."""

    seq_len: Count
    preset: str | None = None
    layers: Count | None = None
    hidden: Count | None = None
    heads: Count | None = None
    kv_heads: Count | None = None
    ffn: Count | None = None
    vocab: Count | None = None
    norm: Literal["rmsnorm", "layernorm"] | None = None
    position: Literal["rotary", "learned"] | None = None
    activation: Literal["swiglu", "gelu"] | None = None
    tied_embeddings: bool | None = None
    bias: bool | None = None
    rotary_base: Positive | None = None
    norm_eps: Positive | None = None
    init_std: Positive | None = None
    activation_checkpointing: Literal["none", "full"] = "none"


class ParallelConfig(Section):
    """How one model replica and its optimizer are spread over processes."""

    tensor: Count = 1
    sequence: bool = False
    zero: Literal[0, 1, 2, 3] = 3

    @model_validator(mode="after")
    def _sequence_needs_tensor(self) -> Self:
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence: true needs tensor greater than 1")
        return self


class BatchConfig(Section):
    """samples: global batch of an optimizer step; micro: samples of one forward pass per rank."""

    samples: Count
    micro: Count = 1

    @model_validator(mode="after")
    def _micro_divides(self) -> Self:
        if self.samples % self.micro:
            raise ValueError(f"micro ({self.micro}) does not divide samples ({self.samples})")
        return self


class OptimizerConfig(Section):
    """AdamW (Loshchilov and Hutter 2019); clip is the largest global gradient norm, 0 is none."""

    name: Literal["adamw"] = "adamw"
    betas: tuple[FractionOf1, FractionOf1] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: PositiveOrZero = 0.1
    clip: PositiveOrZero = 1.0


class MixtureConfig(Section):
    """A phase's sampling rates: exactly one of rates, temperature, proportional and unimax.

    over: the tasks among which the last three divide the phase, a list of names or a role.
    """

    rates: dict[str, PositiveOrZero] | None = None
    temperature: Positive | None = None
    proportional: Literal[True] | None = None
    unimax: Literal[True] | None = None
    over: RoleOrTaskNames | None = None
    max_epochs: Positive | None = None

    @field_validator("rates")
    @classmethod
    def _rates_sum_to_one(cls, rates: dict[str, float] | None) -> dict[str, float] | None:
        if rates is not None:
            total = math.fsum(rates.values())
            if abs(total - 1) > RATE_SUM_TOLERANCE:
                raise ValueError(f"the rates sum to {total:.9g}; make them sum to 1")
        return rates

    @model_validator(mode="after")
    def _one_method(self) -> Self:
        methods = ("rates", "temperature", "proportional", "unimax")
        given = [name for name in methods if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"give exactly one of {', '.join(methods)}; found {found}")
        if self.rates is not None and self.over is not None:
            raise ValueError("over goes with temperature, proportional and unimax, not with rates")
        if self.unimax and self.max_epochs is None:
            raise ValueError("unimax needs max_epochs")
        return self


class LearningRateConfig(Section):
    """One phase's schedule; every phase starts its own at step 0 with its own warm-up.

    decay_steps belongs to `wsd` (warm-up, stable, decay): the length of the final decay.
    """

    schedule: Literal["cosine", "linear", "inverse_sqrt", "constant", "wsd"] = "cosine"
    peak: Positive
    final: PositiveOrZero = 0.0
    warmup_steps: CountOrZero = 0
    decay_steps: Count | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.final > self.peak:
            raise ValueError(f"final ({self.final:g}) is above peak ({self.peak:g})")
        if (self.schedule == "wsd") != (self.decay_steps is not None):
            raise ValueError("decay_steps is needed by schedule wsd and by no other")
        return self


class PhaseConfig(Section):
    """A run of steps with one mixture, one schedule and one optimizer-state policy."""

    name: str
    tokens: Count | None = None
    steps: Count | None = None
    mixture: MixtureConfig
    order: Literal["balanced", "random"] = "balanced"
    optimizer_state: Literal["reset", "keep"] = "reset"
    learning_rate: LearningRateConfig

    @field_validator("name")
    @classmethod
    def _fit_for_a_file_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise ValueError(f"{name!r} is no phase name; use letters, digits, '_', '.' and '-'")
        return name

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.tokens is None) == (self.steps is None):
            raise ValueError("give exactly one of tokens and steps")
        return self


class ValidationConfig(Section):
    """fraction of each task's documents is held out of training; samples of it are scored."""

    every_steps: Count = 500
    samples: Count = 256
    fraction: Annotated[float, Field(gt=0, lt=1, strict=True)] = 0.01


class CheckpointConfig(Section):
    """The newest `keep` checkpoints stay, and the one at the end of every phase for ever."""

    every_steps: Count = 1000
    keep: Count = 3


class LoggingConfig(Section):
    """every_steps: how often a plain progress line is printed when no terminal is there."""

    every_steps: Count = 10
    tensorboard: bool = True


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
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    _path: Path = PrivateAttr(default=Path("run.yaml"))

    @property
    def path(self) -> Path:
        """The run file that this was read from."""
        return self._path

    def tasks_with_role(self, role: str) -> list[str]:
        """The tasks that have this role, in the file's order."""
        return [name for name, task in self.tasks.items() if task.role == role]

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


def _check_references(config: RunConfig) -> None:
    """Names that point from one section to another: tasks in mixtures, phases by name."""
    names = [phase.name for phase in config.phases]
    for i, phase in enumerate(config.phases):
        if names.index(phase.name) != i:
            raise InputError(
                config.where(f"phases[{i}].name"),
                f"{phase.name!r} stands twice",
                "give every phase its own name",
            )
        over = phase.mixture.over
        if isinstance(over, str):
            _check_role(config, config.where(f"phases[{i}].mixture.over"), over)
            over = None
        mentioned = {"rates": phase.mixture.rates or {}, "over": over or []}
        for key, tasks in mentioned.items():
            for task in tasks:
                if task not in config.tasks:
                    raise InputError(
                        config.where(f"phases[{i}].mixture.{key}"),
                        f"no task {task!r} with a corpus under tasks",
                        hint(task, config.tasks, "the tasks are"),
                    )


def _check_role(config: RunConfig, where: str, role: str) -> None:
    if config.tasks_with_role(role):
        return
    roles = sorted({task.role for task in config.tasks.values() if task.role is not None})
    if role in config.tasks:
        remedy = f"for the task write [{role}]"
    elif roles:
        remedy = hint(role, roles, "the roles are")
    else:
        remedy = "set tasks.NAME.role, or give a list of tasks"
    raise InputError(where, f"no task has the role {role!r}", remedy)


def _apply_override(path: Path, data: dict[str, Any], override: str) -> None:
    """Set `phases.0.learning_rate.peak=1e-3` in the parsed file, before it is checked."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"override {override!r}", "this is not key.path=value")
    parts = key.replace("[", ".").replace("]", "").split(".")
    node: Any = data
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise InputError(
                    f"override {override!r}",
                    f"{'.'.join(parts[:depth])} in {path} is a list of {len(node)}",
                    "name an entry by its number, from 0",
                )
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
            if not last:
                node.setdefault(part, {})
        else:
            raise InputError(
                f"override {override!r}", f"{'.'.join(parts[:depth])} in {path} holds no keys"
            )
        if last:
            node[index] = parse_scalar(text)
        else:
            node = node[index]


def load_run_file(path: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read, override and check a run file.

    Raises:
        InputError: naming the file, the key's path and the remedy.
    """
    data = read_yaml(path)
    for override in overrides:
        _apply_override(path, data, override)
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        raise as_input_error(path, error) from None
    config = config.resolved_paths(path.parent)
    config._path = path
    _check_references(config)
    return config
