"""What values of JSON are, in words."""

from __future__ import annotations

from typing import Any

JSON_TYPES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
    bytes: "bytes",
}


def string_fault(value: Any) -> str | None:
    """Return why a value is not valid text, or None."""
    if not isinstance(value, str):
        return f"{JSON_TYPES.get(type(value), str(value))}, not a string"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"a lone surrogate, \\u{ord(value[error.start]):04x}"
    return None
