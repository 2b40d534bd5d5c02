"""YAML as its version 1.2 means it.

PyYAML follows version 1.1, in which `no` is false (so the task `no: {...}` would not be
Norwegian), `3e-4` is a string and a key that stands twice silently wins.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from megaphase.errors import InputError

BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
FLOAT = re.compile(
    r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$"
)
INT = re.compile(r"^[-+]?[0-9][0-9_]*$")


class _Loader(yaml.SafeLoader):
    """SafeLoader with the resolvers of YAML 1.2's core schema and unique keys."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float",
                           "tag:yaml.org,2002:int", "tag:yaml.org,2002:timestamp")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def read_yaml(path: Path) -> dict[str, Any]:
    """Parse a YAML file whose top is a mapping.

    Raises:
        InputError: the file is missing, is no YAML (with the line), or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(path, "no such file", "give the path of a run file") from None
    except UnicodeDecodeError:
        raise InputError(path, "this is not UTF-8 text") from None
    try:
        data = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}", error.problem or "this is not YAML") from None
    except yaml.YAMLError as error:
        raise InputError(path, " ".join(str(error).split())) from None
    if not isinstance(data, dict):
        raise InputError(path, "the file must hold a mapping of keys to values")
    return data


def parse_scalar(text: str) -> Any:
    """The value of a `key=value` override, read as YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text
