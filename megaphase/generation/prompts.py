"""Read prompts from a file of JSON lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megaphase.utils.errors import InputError
from megaphase.utils.files import read_file
from megaphase.utils.locale_settings import is_utf8

STANDARD_INPUT = Path("-")


def read_prompts(path: Path, key: str) -> list[str]:
    """Return the string under `key` of every line, a JSON object; `-` is standard input.

    Raises:
        InputError: names the file and the first invalid line.
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
        raise InputError(path, "contains no prompts", f'give lines like {{"{key}": "text"}}')
    return prompts


def _prompt(line: bytes, key: str, where: str) -> str:
    try:
        prompt = json.loads(line)[key]
    except (ValueError, KeyError, TypeError, RecursionError):
        prompt = None
    if not isinstance(prompt, str):
        problem = f"is not a JSON object with a string under {key!r}"
        raise InputError(where, problem, "correct the line, or give --json-key")
    if not is_utf8(prompt):
        problem = "contains a lone surrogate, which is not a character"
        raise InputError(where, problem, "correct the line")
    return prompt
