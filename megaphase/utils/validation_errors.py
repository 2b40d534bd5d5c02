"""Turn pydantic's errors about a YAML file into one line in its author's terms."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megaphase.utils.errors import InputError
from megaphase.utils.names import printable, shown

# Tags of the alternatives of a key that is a number or a mapping, and of a section that a name
# chooses; they are no part of a key's path.
NUMBER, MAPPING, _TAG = "<number>", "<mapping>", "<name: "
_LONGEST = 200  # characters of a value, or of a part of a key, in a message
_MESSAGES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text; put it in quotes",
    "path_type": "must be a path",
    "dict_type": "must be a mapping of keys to values",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "selection_type": "must be a role or a list of tasks",
    "too_short": "must hold at least one entry",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} letters",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
}


def union_tag(name: str) -> str:
    """Return pydantic's tag of a section that a name chooses."""
    return f"{_TAG}{name}>"


def hint(name: object, known: Iterable[str], what: str) -> str:
    """Return `did you mean 'seed'?` if a known name is similar, else the list of known names."""
    by_folded = {each.casefold(): each for each in known}
    near = difflib.get_close_matches(str(name).casefold()[:_LONGEST], by_folded, n=1)
    return f"did you mean {by_folded[near[0]]!r}?" if near else f"{what} {', '.join(known)}"


def as_input_error(path: Path, error: ValidationError) -> InputError:
    """Return the first error in the file as an InputError with the path of the key."""
    first = error.errors(include_url=False)[0]
    kind = first["type"]
    location = tuple(part for part in first["loc"] if not _is_tag(part))
    if location and location[-1] == "[key]":
        key = _key_path(location[:-2])
        if kind == "value_error":
            return InputError(f"{path}: {key}", first["msg"].removeprefix("Value error, "))
        return InputError(
            f"{path}: {key}", f"the key {_as_yaml(first['input'])} is not text", "put it in quotes"
        )
    where = f"{path}: {_key_path(location)}" if location else str(path)
    if kind == "missing":
        return InputError(where, "this key is missing", "add it")
    if kind == "value_error":
        return InputError(where, first["msg"].removeprefix("Value error, "))
    found = f"found {_as_yaml(first['input'])}"
    if kind in _MESSAGES:
        bounds = {key: _bound(value) for key, value in first.get("ctx", {}).items()}
        message = _MESSAGES[kind].format(**bounds)
        return InputError(where, message.replace("True", "true"), found)
    return InputError(where, f"{first['msg'][0].lower()}{first['msg'][1:]}", found)


def _is_tag(part: int | str) -> bool:
    return part in (NUMBER, MAPPING) or (isinstance(part, str) and part.startswith(_TAG))


def _bound(value: Any) -> str:
    """Format a limit for a message."""
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _key_path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
            continue
        text = part if part.isprintable() and len(part) <= _LONGEST else shown(part)
        path += f".{text}" if path else text
    return path


def _as_yaml(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return printable(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…")
