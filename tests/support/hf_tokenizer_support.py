"""A tokenizer in Megaphase and, after an export, in transformers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from existing_tokenizers import STRANGE, TEXTS
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from megaphase.convert.hugging_face.tokenizer import write_hf_tokenizer
from megaphase.tokenizer import Tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")

CODE = 'def f(xs: list[int]) -> str:\n    if xs:\n\t\treturn "<b>" + str(xs[0x41:])  # <0x>\n'
LOOKS_LIKE_CONTROL = [
    *("<eod>", "a<eod>b", "<<eod>>", "<eod", "<unk>", "<unk><unk>", "x <fr>", "<hi> x", "<fr>fr"),
    *("<reserved_0>", "<0x41>", "<0xE2><0x96><0x81>", "é<0x0A>é", "<s>", "</s>", "<tag>"),
]
HARD = [
    *(*STRANGE, *TEXTS, *LOOKS_LIKE_CONTROL, CODE, " ".join(TEXTS * 20)),
    *(
        symbol * n
        for symbol in (" ", "\n", "\t", "a", "ab", "aab", "▁")
        for n in (2, 3, 5, 64, 257)
    ),
    *("x" + " " * n + "y" for n in range(2, 9)),
    *("▁", " ▁", "▁ ", "a▁b ▁c", "▁the", "<b>", "x<b>y</b>", "<b", "\r\n", "\0", "\ufeffa"),
    *(
        "e\u0301 é",
        "A\u030a",
        "\u0301",
        "👩‍👩‍👧 👍🏽",
        "क्षि कि",
        "가",
        "\u00a0\u3000\u200b",
        "١٢٣",
        "12345",
    ),
]


@dataclass(frozen=True)
class Pair:
    """One tokenizer, in Megaphase and as transformers loads its export."""

    native: Tokenizer
    reference: Any
    folder: Path


def pair_of(path: Path, folder: Path, max_length: int = 1 << 30) -> Pair:
    import transformers

    folder.mkdir(parents=True)
    native = Tokenizer.load(path)
    write_hf_tokenizer(native, folder, max_length=max_length)
    return Pair(native, transformers.AutoTokenizer.from_pretrained(folder), folder)


def model_of(
    path: Path, pieces: dict[str, float], model_type: str = "UNIGRAM", symbols: Sequence[str] = ()
) -> Path:
    """Make a model of these pieces, their scores and user symbols, that does not change text."""
    model = ModelProto()
    model.trainer_spec.model_type = model.trainer_spec.ModelType.Value(model_type)
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    kind = ModelProto.SentencePiece
    for piece, type_ in (("<unk>", kind.UNKNOWN), ("<s>", kind.CONTROL), ("</s>", kind.CONTROL)):
        model.pieces.add(piece=piece, score=0.0, type=type_)
    for symbol in symbols:
        model.pieces.add(piece=symbol, score=0.0, type=kind.USER_DEFINED)
    for piece, score in pieces.items():
        model.pieces.add(piece=piece, score=score)
    path.write_bytes(model.SerializeToString())
    return path


def assert_same_ids(pair: Pair, text: str) -> None:
    assert pair.reference(text).input_ids == pair.native.encode(text)


def assert_same(pair: Pair, text: str) -> None:
    assert_same_ids(pair, text)
    ids = pair.native.encode(text)
    assert pair.reference.decode(ids, skip_special_tokens=True) == pair.native.decode(ids)
