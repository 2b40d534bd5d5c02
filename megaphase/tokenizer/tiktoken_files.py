"""Files of tiktoken and of Mistral's tekken, which are used by way of a tokenizer.json."""

from __future__ import annotations

import re
from pathlib import Path

from megaphase.tokenizer.hugging_face_files import HuggingFaceFiles
from megaphase.tokenizer.record import TOKENIZER_JSON_NAME
from megaphase.utils.errors import InputError

_TEKKEN_NAME = "tekken.json"


def is_for_tiktoken(path: Path) -> bool:
    """Return whether a `tokenizer.model` is a list of ranks for tiktoken beside a tokenizer.json,
    and not a model of sentencepiece."""
    if not path.with_name(TOKENIZER_JSON_NAME).exists() or not _has_ranks(path):
        return False
    return bool(HuggingFaceFiles(path.parent).whole.get("model"))


def check_has_tokenizer_json(path: Path) -> None:
    """Raise InputError if a directory or file has a tokenizer in tiktoken's or Mistral's format,
    and no tokenizer.json beside it."""
    directory = path if path.is_dir() else path.parent
    if (directory / TOKENIZER_JSON_NAME).exists():
        return
    if path.is_dir() and (path / _TEKKEN_NAME).exists():
        remedy = (
            "write it with transformers 5: from transformers.integrations.mistral import "
            f"convert_tekken_tokenizer as read; read({str(path / _TEKKEN_NAME)!r})"
            f".save_pretrained({str(path)!r})"
        )
        raise InputError(path / _TEKKEN_NAME, f"is used by way of a {TOKENIZER_JSON_NAME}", remedy)
    files = (
        [path] if path.is_file() else sorted(path.glob("*.model")) + sorted(path.glob("*.tikt*"))
    )
    for file in files:
        if file.is_file() and _has_ranks(file):
            problem = f"is a list of ranks for tiktoken, used by way of a {TOKENIZER_JSON_NAME}"
            remedy = "copy the model's, or write it with transformers: convert_tiktoken_to_fast"
            raise InputError(file, problem, remedy)


def _has_ranks(path: Path) -> bool:
    """Return whether a file begins with a token in base 64 and its rank."""
    with open(path, "rb") as file:
        first = file.readline(1000)
    return re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\n?", first) is not None
