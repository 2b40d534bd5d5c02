"""Read YAML according to version 1.2.

PyYAML follows version 1.1, in which `no` is false (so the task `no: {...}` would not be
Norwegian), `3e-4` is a string and a key that occurs twice silently wins.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from megaphase.utils.errors import InputError, file_fault
from megaphase.utils.files import read_file
from megaphase.utils.names import shown

BOOL_TAG = "tag:yaml.org,2002:bool"
INT_TAG = "tag:yaml.org,2002:int"
FLOAT_TAG = "tag:yaml.org,2002:float"
MERGE_TAG = "tag:yaml.org,2002:merge"
REPLACED_TAGS = (BOOL_TAG, INT_TAG, FLOAT_TAG, "tag:yaml.org,2002:timestamp")

BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
# Far more than any run file needs.
MOST_BYTES = 1 << 20
MOST_VALUES = 1_000_000
MOST_MERGED = 10_000
DEEPEST = 50

FLOAT = re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$")
INT = re.compile(r"^[-+]?[0-9]+(?:_[0-9]+)*$")


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema and unique keys."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in REPLACED_TAGS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == MERGE_TAG:
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # an error is raised below, with the line
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {shown(key)} occurs twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_MERGED:
            raise yaml.constructor.ConstructorError(
                None, None, f"more than {MOST_MERGED:,} keys are merged", node.start_mark
            )


_Loader.add_implicit_resolver(BOOL_TAG, BOOL, list("tTfF"))
_Loader.add_implicit_resolver(INT_TAG, INT, list("-+0123456789"))
_Loader.add_implicit_resolver(FLOAT_TAG, FLOAT, list("-+.0123456789"))
# YAML 1.1 reads 010 as 8, and fails on 09.
_Loader.add_constructor(INT_TAG, lambda _, node: int(node.value))
_Loader.add_constructor(FLOAT_TAG, lambda _, node: float(node.value))


def read_yaml(path: Path) -> dict[str, Any]:
    """Parse a YAML file that contains a mapping.

    Raises:
        InputError: the file is missing, is not YAML (with the line), or contains something else.
    """
    try:
        text = read_file(path, pipes=True).decode("utf-8")
    except FileNotFoundError:
        raise InputError(path, "no such file", "give the path of a run file") from None
    except OSError as error:
        raise file_fault(path, error, "give the path of a run file") from None
    except UnicodeDecodeError:
        raise InputError(path, "this is not UTF-8 text") from None
    if len(text) > MOST_BYTES:
        raise InputError(path, f"is larger than {MOST_BYTES:,} bytes", "give a run file")
    try:
        data = _parsed(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise InputError(f"{path}{line}", problem or "this is not YAML") from None
    except (yaml.YAMLError, ValueError) as error:
        why = " ".join(str(error).split())
        remedy = "look for tags such as !!map, and for numbers of very many digits"
        raise InputError(path, f"a value cannot be read ({why})", remedy) from None
    if not isinstance(data, dict):
        raise InputError(path, "the file must contain a mapping of keys to values")
    return data


def parse_scalar(text: str) -> Any:
    """Parse the value of a `key=value` override as YAML."""
    try:
        return _parsed(text)
    except (yaml.YAMLError, ValueError):
        return text


def _parsed(text: str) -> Any:
    """Parse a YAML text into values that share no object.

    Raises:
        ValueError: a tag does not fit its value, or there is too much of it.
    """
    try:
        return _Copy().of(yaml.load(text, _Loader))
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep") from None
    except (KeyError, AttributeError, TypeError, OverflowError):
        # PyYAML's constructors fail on values such as `!!bool maybe` and `!!timestamp soon`.
        raise ValueError("a value does not fit its tag") from None


class _Copy:
    """Copies values so that every alias gets its own copy of the anchor's value.

    Otherwise, a change of one would change all of them. The number of values is limited, since
    aliases of aliases can expand to any number of them.
    """

    def __init__(self) -> None:
        self._values = 0

    def of(self, value: Any, depth: int = 0) -> Any:
        self._values += 1
        if self._values > MOST_VALUES:
            raise ValueError(f"it holds more than {MOST_VALUES:,} values, aliases counted")
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
        if isinstance(value, dict):
            return {key: self.of(each, depth + 1) for key, each in value.items()}
        if isinstance(value, list):
            return [self.of(each, depth + 1) for each in value]
        return value
