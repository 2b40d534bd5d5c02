"""Leave tokens for which a model has no rows out of the copied files of its tokenizer.

Published tokenizers have such tokens: that of Gemma 3's models of text alone ends with the
`<image_soft_token>` of the larger ones. The model cannot take their ids. They are left out of all
files, so that Megaphase and transformers read the same tokenizer, and text that spells one is
encoded as other text is.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megaphase.tokenizer import RECORD_NAME, TOKENIZER_JSON_NAME, Tokenizer
from megaphase.tokenizer.hugging_face_files import HuggingFaceFiles, read_object
from megaphase.utils.errors import InputError
from megaphase.utils.files import atomic_write_json, atomic_write_text

_REMEDY = "use the tokenizer with which the model was trained, or give the model more rows first"
# Files that name tokens by their text or id, apart from tokenizer.json.
_NAMING_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def tokens_beyond(tokenizer: Tokenizer, rows: int) -> list[str]:
    """Return the tokens of a Hugging Face directory whose ids are not below `rows`, by id.

    Raises InputError if one of them is needed: a text may encode to it, or it ends or begins
    documents.
    """
    if tokenizer.vocab_size <= rows:
        return []
    files = HuggingFaceFiles(tokenizer.path)
    unknown = (files.whole.get("model") or {}).get("unk_token")
    needed = {tokenizer.eod, (files.pieces | files.added_tokens).get(unknown or "")}
    if tokenizer.adds_bos:
        needed.add(tokenizer.bos)
    has_record = (tokenizer.path / RECORD_NAME).exists()  # which would no longer describe it
    for token in range(rows, tokenizer.vocab_size):
        if has_record or token in needed or tokenizer.spelling(token):
            raise _too_large(tokenizer, rows, token)
    beyond = {token: text for text, token in files.added_tokens.items() if token >= rows}
    return [beyond[token] for token in sorted(beyond)]


def leave_out(texts: Collection[str], folder: Path, rows: int) -> None:
    """Remove tokens from the files of a tokenizer.

    Raises InputError if afterwards the tokenizer still has ids that are not below `rows`.
    """
    for name in _NAMING_FILES:
        if content := read_object(folder / name):
            kept = {key: value for key, value in content.items() if key not in texts}
            atomic_write_json(folder / name, _without(kept, texts))
    if whole := read_object(folder / TOKENIZER_JSON_NAME):
        whole["added_tokens"] = _without(whole.get("added_tokens") or [], texts)
        model = whole.get("model") or {}
        vocabulary = model.get("vocab")
        if isinstance(vocabulary, dict):
            model["vocab"] = {text: i for text, i in vocabulary.items() if text not in texts}
        elif vocabulary:
            model["vocab"] = [pair for pair in vocabulary if pair[0] not in texts]
        if (whole.get("padding") or {}).get("pad_token") in texts:
            whole["padding"] = None
        atomic_write_text(folder / TOKENIZER_JSON_NAME, json.dumps(whole, ensure_ascii=False))
    smaller = Tokenizer.load(folder)
    if smaller.vocab_size > rows:
        raise _too_large(smaller, rows, smaller.vocab_size - 1)


def _without(value: Any, texts: Collection[str]) -> Any:
    """Return a JSON value without the tokens in it, which are strings or described by objects."""
    if isinstance(value, dict):
        return {k: _without(v, texts) for k, v in value.items() if not _is_one_of(v, texts)}
    if isinstance(value, list):
        return [_without(each, texts) for each in value if not _is_one_of(each, texts)]
    return value


def _is_one_of(value: Any, texts: Collection[str]) -> bool:
    text = value.get("content") if isinstance(value, dict) else value
    return isinstance(text, str) and text in texts


def _too_large(tokenizer: Tokenizer, rows: int, token: int) -> InputError:
    added = HuggingFaceFiles(tokenizer.path).added_tokens.items()
    text = next((text for text, number in added if number == token), tokenizer.piece(token))
    problem = (
        f"has {tokenizer.vocab_size:,} tokens, the model only {rows:,} rows, and its token "
        f"{text!r}, {token:,}, cannot be left out"
    )
    return InputError(tokenizer.path, problem, _REMEDY)
