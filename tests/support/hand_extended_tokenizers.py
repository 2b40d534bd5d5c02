"""Tokenizers extended by hand: pieces or merges appended, with a record of what they extend."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from sentencepiece.sentencepiece_model_pb2 import ModelProto

from megaphase.tokenizer import (
    MODEL_NAME,
    RECORD_NAME,
    TOKENIZER_JSON_NAME,
    Extends,
    Tokenizer,
    TokenizerRecord,
)
from megaphase.utils.files import hash_file

# The score of a piece that is always taken where it fits.
_BEST = 0.0


def extend_by_hand(base: Path, out: Path, words: Sequence[str]) -> Tokenizer:
    """Write the tokenizer in the directory `base`, one of `megaphase tokenizer train`, with a piece
    for each word, and for every beginning of it that a byte-level BPE needs."""
    shutil.copytree(base, out)
    if Tokenizer.load(base).record.library == "tokenizers":
        _append_merges(out, words)
    else:
        _append_pieces(out, words)
    return Tokenizer.load(out)


def _append_pieces(folder: Path, words: Sequence[str]) -> None:
    path, base = folder / MODEL_NAME, Tokenizer.load(folder)
    model = ModelProto.FromString(path.read_bytes())
    known = {piece.piece for piece in model.pieces}
    letters = sorted(set("".join(words)) - known)
    for letter in letters:  # `tokenizers` reaches no piece of which a character is none
        model.pieces.add(piece=letter, score=min(piece.score for piece in model.pieces))
    for word in words:
        model.pieces.add(piece=f"\N{LOWER ONE EIGHTH BLOCK}{word}", score=_BEST)
    path.write_bytes(model.SerializeToString())
    _write_record(folder, base, base.vocab_size + len(letters) + len(words), hash_file(path))


def _append_merges(folder: Path, words: Sequence[str]) -> None:
    path, base = folder / TOKENIZER_JSON_NAME, Tokenizer.load(folder)
    whole = json.loads(path.read_bytes())
    model, added = whole["model"], 0
    for word in words:
        pieces = [_vocabulary_text(base, token) for token in base.encode(f" {word}")]
        joined = pieces[0]
        for piece in pieces[1:]:
            model["merges"].append([joined, piece])
            joined += piece
            if joined not in model["vocab"]:
                model["vocab"][joined] = base.vocab_size + added
                added += 1
    path.write_text(json.dumps(whole, ensure_ascii=False))
    (folder / RECORD_NAME).rename(folder / "record")
    found = Tokenizer.load(folder).fingerprint
    (folder / "record").rename(folder / RECORD_NAME)
    _write_record(folder, base, base.vocab_size + added, found)


def _vocabulary_text(base: Tokenizer, token: int) -> str:
    whole = json.loads((base.path / TOKENIZER_JSON_NAME).read_bytes())
    return next(text for text, i in whole["model"]["vocab"].items() if i == token)


def _write_record(folder: Path, base: Tokenizer, vocab_size: int, tokenizer_hash: str) -> None:
    extends = Extends(tokenizer_hash=base.fingerprint, vocab_size=base.vocab_size)
    changed = {"vocab_size": vocab_size, "tokenizer_hash": tokenizer_hash, "extends": extends}
    record: TokenizerRecord = base.record.model_copy(update=changed)
    (folder / RECORD_NAME).write_text(record.model_dump_json())
