"""Prompts from a file of JSON lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megaphase.utils.errors import InputError
from megaphase.utils.files import read_file
from megaphase.utils.locale_settings import is_utf8

STANDARD_INPUT = Path("-")


def read_prompts(path: Path, key: str) -> list[str]:
    """The string under `key` of every line, a JSON object; `-` is standard input.

    Raises:
        InputError: naming the file and the line that is no such object.
    """
    try:
        content = sys.stdin.buffer.read() if path == STANDARD_INPUT else read_file(path, pipes=True)
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", "check --input") from None
    prompts = [
        _prompt(line, key, f"{path}:{number}")
        for number, line in enumerate(content.split(b"\n"), 1)
        if line.strip()
    ]
    if not prompts:
        raise InputError(path, "holds no prompts", f'give lines like {{"{key}": "text"}}')
    return prompts


def _prompt(line: bytes, key: str, where: str) -> str:
    try:
        prompt = json.loads(line)[key]
    except (ValueError, KeyError, TypeError, RecursionError):
        prompt = None
    if not isinstance(prompt, str):
        problem = f"is no JSON object with a string under {key!r}"
        raise InputError(where, problem, "mend the line, or give --json-key")
    if not is_utf8(prompt):
        problem = "holds half of a surrogate pair, which is no character"
        raise InputError(where, problem, "mend the line")
    return prompt
