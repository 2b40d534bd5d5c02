"""Values that an arm tries: lists in the sweep file, and all combinations of them.

A list is the values to try, unless the key itself takes a list in a run file, as `over` and
`optimizer.betas` do: there a list is one value. `{try: [...]}` is values to try at every key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import prod
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from megaphase.sweep.arms.config import each_once
from megaphase.sweep.arms.setting import Value
from megaphase.utils.errors import InputError

TRY = "try"
# Combinations of values that an arm tries, beside peaks and seeds.
MOST_COMBINATIONS = 10_000

Axes = tuple[tuple[str, Value], ...]
"""Tried values by key path, in the order of the file."""


def combinations(
    section: Mapping[str, Any], schema: Any, axis: str, where: str
) -> list[tuple[Axes, dict[str, Any]]]:
    """Return every combination of the values to try in a section, the last key varying fastest.

    schema: the class whose keys the section has. axis: the path of the section in axes; where: its
    place, for messages. Keys may be paths, such as `model.dropout`.

    Raises:
        InputError: a list to try is empty, or has a value twice.
    """
    found = _alternatives(section, schema, axis, where)
    return [(axes, value) for axes, value in found]


def _alternatives(value: Any, schema: Any, axis: str, where: str) -> list[tuple[Axes, Any]]:
    if isinstance(value, Mapping) and set(value) != {TRY}:
        keys = list(value)
        parts = [
            _alternatives(
                value[key],
                schema_at(schema, str(key)),
                f"{axis}.{key}" if axis else str(key),
                f"{where}.{key}",
            )
            for key in keys
        ]
        check_number(where, [len(part) for part in parts])
        return [
            (
                tuple(each for axes, _ in chosen for each in axes),
                dict(zip(keys, (one for _, one in chosen), strict=True)),
            )
            for chosen in product(*parts)
        ]
    if isinstance(value, Mapping):
        tried, where = value[TRY], f"{where}.{TRY}"
        if not isinstance(tried, list):
            raise InputError(where, "must be a list of the values to try", f"write [{tried}]")
    elif isinstance(value, list) and not takes_list(schema):
        tried = value
    else:
        return [((), value)]
    if not tried:
        raise InputError(where, "must hold at least one value to try", "add one, or leave it out")
    try:
        each_once("this list", tried)
    except ValueError as error:
        raise InputError(where, str(error)) from None
    return [(((axis, as_value(each)),), each) for each in tried]


def check_number(where: str, counts: Sequence[int]) -> None:
    """Check that there are not too many combinations of so many values each.

    Raises:
        InputError: there are more than a sweep could try.
    """
    if (count := prod(counts)) > MOST_COMBINATIONS:
        raise InputError(
            where,
            f"has {count:,} combinations of values to try",
            f"try fewer; an arm has at most {MOST_COMBINATIONS:,}",
        )


def as_value(value: Any) -> Value:
    """Return a number, text, boolean or None as it is, anything else as one line of YAML."""
    if value is None or isinstance(value, str | int | float):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).strip()


def schema_at(schema: Any, path: str) -> Any:
    """Return the annotation of the key at a path below another one; None if it is unknown."""
    for part in path.replace("[", ".").replace("]", "").split("."):
        schema = Union[tuple(_below(schema, part))] if schema is not None else None  # noqa: UP007
    return schema


def takes_list(schema: Any) -> bool:
    """Return whether a key with this annotation may have a list as its value."""
    return any((get_origin(each) or each) in (list, tuple, Sequence) for each in _types(schema))


def _below(schema: Any, part: str) -> Iterator[Any]:
    """Yield the annotations of a key of each type that has it; None if there are none."""
    yield type(None)
    for each in _types(schema):
        if isinstance(each, type) and issubclass(each, BaseModel):
            for name, field in each.model_fields.items():
                if part == (field.alias or name):
                    yield field.annotation
        elif get_origin(each) is dict:
            yield get_args(each)[1]
        elif get_origin(each) is list:
            yield get_args(each)[0]


def _types(schema: Any) -> Iterator[Any]:
    """Yield the alternatives of an annotation."""
    origin = get_origin(schema)
    if origin is Annotated:
        yield from _types(get_args(schema)[0])
    elif origin in (Union, UnionType):
        for each in get_args(schema):
            yield from _types(each)
    elif schema is not None:
        yield schema
