"""Types of values in a run file, and the mapping that all of its sections are."""

from __future__ import annotations

from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from megaphase.utils.decimals import as_written
from megaphase.utils.names import MOST_BYTES_OF_RUN, check_name, check_phase_name, shown
from megaphase.utils.paths import expanded_path, resolved_path
from megaphase.utils.remote_files import is_url, names_bucket
from megaphase.utils.validation_errors import MAPPING, NUMBER, hint

# Upper bounds of what is counted: far above all that anybody trains, far below what arithmetic in
# 64 bits, or a loop over it, could not do.
MOST = 10**15
MOST_STEPS = 10**12
MOST_SEED = 2**63 - 1


def _whole_number(value: Any) -> Any:
    """Let counts be written as 200e9, which YAML reads as a float."""
    if isinstance(value, float) and value.is_integer():
        return int(as_written(value))
    return value


# Strict, here and in all sections: true is no number, and "3e-4" in quotes is text.
Count = Annotated[int, BeforeValidator(_whole_number), Field(gt=0, le=MOST)]
CountOrZero = Annotated[int, BeforeValidator(_whole_number), Field(ge=0, le=MOST)]
Steps = Annotated[Count, Field(le=MOST_STEPS)]
StepsOrZero = Annotated[CountOrZero, Field(le=MOST_STEPS)]
Seed = Annotated[int, BeforeValidator(_whole_number), Field(ge=0, le=MOST_SEED)]
# Of files, of processes, of tries.
Few = Annotated[Count, Field(le=1_000_000)]
FewOrZero = Annotated[CountOrZero, Field(le=1_000_000)]
Positive = Annotated[float, Field(gt=0, le=1e9)]
PositiveOrZero = Annotated[float, Field(ge=0, le=1e9)]
# As far as fp32 goes: a peak at which every run diverges is a way to see what then happens.
LearningRate = Annotated[float, Field(gt=0, le=1e30)]
Temperature = Annotated[float, Field(ge=1e-2, le=1e6)]
Epochs = Annotated[float, Field(gt=0, le=1e6)]
Nats = Annotated[float, Field(gt=0, le=1e4)]
NatsOrZero = Annotated[float, Field(ge=0, le=1e4)]
FractionOf1 = Annotated[float, Field(ge=0, le=1)]
FractionBelow1 = Annotated[float, Field(ge=0, lt=1)]
FractionAbove0 = Annotated[float, Field(gt=0, le=1)]
ProperFraction = Annotated[float, Field(gt=0, lt=1)]
# Of a device or a link: what is computed from it stays finite.
Figure = Annotated[float, Field(ge=1e-6, le=1e9)]
# Added to a divisor, in fp32.
Epsilon = Annotated[float, Field(ge=1e-30, le=1)]

Name = Annotated[str, AfterValidator(check_name)]
RunName = Annotated[str, AfterValidator(lambda name: check_name(name, MOST_BYTES_OF_RUN))]
PhaseName = Annotated[str, AfterValidator(check_phase_name)]
# One of a table, or a word that stands for several tasks.
Word = Annotated[str, Field(min_length=1, max_length=100)]


def _file_path(value: Any, info: ValidationInfo) -> Path:
    """A path; absolute where the context of the validation is the folder of the file."""
    if not isinstance(value, Path) and not (isinstance(value, str) and value.strip()):
        raise PydanticCustomError("path_type", "not a path")
    if isinstance(info.context, Path):
        return resolved_path(value, info.context)
    expanded_path(value)
    return Path(value)


# The JSON schemas name the format, for the documentation.
FilePath = Annotated[
    Path,
    PlainValidator(_file_path),
    WithJsonSchema({"type": "string", "format": "path"}),
]


def _file_path_or_mapping(value: Any, info: ValidationInfo) -> Any:
    return value if isinstance(value, dict) else _file_path(value, info)


FilePathOrContent = Annotated[
    Path | dict[str, Any],
    PlainValidator(_file_path_or_mapping),
    WithJsonSchema({"type": ["string", "object"], "format": "path-or-mapping"}),
]


def _role_or_task_names(value: Any) -> Any:
    if value == []:
        raise PydanticCustomError("too_short", "empty")
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise PydanticCustomError("selection_type", "neither a role nor a list of tasks")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(twice)} occurs twice; leave it out once")
    return value


RoleOrTaskNames = Annotated[
    str | list[str],
    PlainValidator(_role_or_task_names),
    WithJsonSchema({"type": ["string", "array"], "format": "role-or-tasks"}),
]


def _remote_folder(text: str) -> str:
    if not is_url(text):
        raise PydanticCustomError("url", "not a URL such as s3://bucket/runs/first")
    if "@" in text or any(not each.isprintable() for each in text):
        raise PydanticCustomError("url", "a URL with '@' or a control character")
    if not names_bucket(text):
        raise PydanticCustomError("url", "a URL without a bucket")
    if any(part in (".", "..") for part in text.split("/")):
        raise PydanticCustomError("url", "a URL with '.' or '..' between slashes")
    return text.rstrip("/")


RemoteFolder = Annotated[
    str,
    AfterValidator(_remote_folder),
    WithJsonSchema({"type": "string", "format": "url"}),
]


class Section(BaseModel):
    """A mapping of the run file; unknown keys are refused with the nearest right name.

    docs/run-file.md is made from these classes: a field's docstring describes the key; the first
    paragraph of a class's docstring is printed above the table of its keys, the others below.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        strict=True,
        # For keys that are words of Python: `from_: … = Field(alias="from")`.
        serialize_by_alias=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_look_alikes(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true for 1 and 2.0 for 2, which are equal to one of a Literal's values."""
        assert info.field_name is not None
        allowed = _literals(cls.model_fields[info.field_name].annotation)
        if value in allowed and not any(value == a and type(value) is type(a) for a in allowed):
            expected = ", ".join(map(repr, allowed[:-1]))
            expected = f"{expected} or {allowed[-1]!r}" if expected else repr(allowed[-1])
            raise PydanticCustomError("literal_error", "{expected}", {"expected": expected})
        return value

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if data is None:  # `validation:` with nothing below it
            return {}
        if not isinstance(data, dict):
            raise PydanticCustomError("dict_type", "not a mapping")
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for key in data:
            if key not in known:
                what = hint(key, known, "the keys here are")
                raise ValueError(f"unknown key {shown(key)}; {what}")
        return data


def number_or_mapping(value: Any) -> str:
    """Tell the two apart, for the Discriminator of a key whose value may be either."""
    return MAPPING if isinstance(value, dict | Section) else NUMBER


def _literals(annotation: Any) -> list[Any]:
    """The values of a Literal, also where it is one of several types."""
    origin = get_origin(annotation)
    if origin is Literal:
        return list(get_args(annotation))
    if origin in (Union, UnionType, Annotated):
        return [value for each in get_args(annotation) for value in _literals(each)]
    return []
