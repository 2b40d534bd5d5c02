"""Add pieces to the files of a tokenizer, after all its ids."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from megaphase.chats.template_files import copy_more_templates
from megaphase.tokenizer import SPACE_SYMBOL, TOKENIZER_JSON_NAME, Tokenizer
from megaphase.tokenizer.hugging_face_files import HuggingFaceFiles
from megaphase.utils.files import atomic_write_json, atomic_write_text

Json = dict[str, Any]

# What else a directory of transformers has about its tokenizer. Files that repeat the vocabulary,
# such as vocab.json, would lack the new pieces.
COPIED_NAMES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)

_Kind = ModelProto.SentencePiece


def extended_model(
    base: ModelProto, tokenizer: Tokenizer, pieces: Mapping[str, float]
) -> ModelProto:
    """Return a sentencepiece model with new pieces and their scores.

    Tokens that were added to the base beyond its model become control tokens of the new one.
    """
    model = ModelProto.FromString(base.SerializeToString())
    added = {}
    if tokenizer.path.is_dir():
        added = {i: text for text, i in HuggingFaceFiles(tokenizer.path).added_tokens.items()}
    for token in range(len(model.pieces), tokenizer.vocab_size):
        text = added.get(token, _unassigned(token))
        model.pieces.add(piece=text, score=0.0, type=_Kind.CONTROL)
    for text, score in pieces.items():
        model.pieces.add(piece=text, score=score)
    model.trainer_spec.vocab_size = len(model.pieces)
    return model


def extended_bpe(
    files: HuggingFaceFiles, first: int, pieces: Iterable[str], merges: Iterable[tuple[str, str]]
) -> Json:
    """Return a tokenizer.json of a BPE with new pieces, from the id `first` on, and merges."""
    model = files.whole["model"]
    new = {text: first + place for place, text in enumerate(pieces)}
    old_merges = model.get("merges") or []
    as_text = bool(old_merges) and isinstance(old_merges[0], str)
    new_merges = [" ".join(pair) if as_text else list(pair) for pair in merges]
    # The library takes an added token's id from the vocabulary, and else counts on.
    vocabulary = model["vocab"] | files.added_tokens | new
    extended = model | {"vocab": vocabulary, "merges": [*old_merges, *new_merges]}
    return files.whole | {"model": extended}


def extended_unigram(files: HuggingFaceFiles, first: int, pieces: Mapping[str, float]) -> Json:
    """Return a tokenizer.json of a unigram model with new pieces, from the id `first` on."""
    model = files.whole["model"]
    old = model["vocab"]
    added = {token: text for text, token in files.added_tokens.items()}
    least = min(score for _, score in old)
    beyond = [[added.get(i, _unassigned(i)), least] for i in range(len(old), first)]
    vocabulary = [*old, *beyond, *([text, score] for text, score in pieces.items())]
    return files.whole | {"model": model | {"vocab": vocabulary}}


def all_merges(pieces: Sequence[str], vocabulary: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield every pair that merges to one of the new pieces, as sentencepiece merges them."""
    known = {*vocabulary, *pieces}
    for text in pieces:
        for place in range(len(text) - 1, 0, -1):
            if text[:place] in known and text[place:] in known:
                yield text[:place], text[place:]


def write_json_tokenizer(directory: Path, whole: Json, base: Tokenizer) -> None:
    """Write a tokenizer.json, and the base's other files."""
    atomic_write_text(directory / TOKENIZER_JSON_NAME, json.dumps(whole, ensure_ascii=False))
    for name in COPIED_NAMES:
        if (base.path / name).is_file():
            shutil.copyfile(base.path / name, directory / name)
    copy_more_templates(base.path, directory)
    files = HuggingFaceFiles(directory)
    if "eos" not in files.roles():
        # The model's configuration names it, which is not copied.
        config = files.config | {"eos_token": base.piece(base.eod)}
        atomic_write_json(directory / "tokenizer_config.json", config)


def spells_spaces_as_symbol(files: HuggingFaceFiles) -> bool:
    """Return whether the tokenizer.json writes a space as U+2581, as sentencepiece does; those made
    by Megaphase from sentencepiece models do not."""
    return any(SPACE_SYMBOL in text for text in files.pieces)


def _unassigned(token: int) -> str:
    return f"<unassigned_{token}>"
