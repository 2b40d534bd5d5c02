"""Types of values in a run file, and the mapping that all of its sections are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from megaphase.validation_errors import hint


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
FractionAbove0 = Annotated[float, Field(gt=0, le=1, strict=True)]
ProperFraction = Annotated[float, Field(gt=0, lt=1, strict=True)]


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
