"""Tokenizers: loading, encoding with exact byte counts, and the record stored with the model."""

from megaphase.tokenizer.extension import pieces_replaced
from megaphase.tokenizer.record import (
    MODEL_NAME,
    RECORD_NAME,
    SPACE_SYMBOL,
    TOKENIZER_JSON_NAME,
    Extends,
    Fertility,
    TokenizerRecord,
)
from megaphase.tokenizer.sentencepiece_backend import SentencePieceBackend
from megaphase.tokenizer.tokenizer import Tokenizer

__all__ = [
    "MODEL_NAME",
    "RECORD_NAME",
    "SPACE_SYMBOL",
    "TOKENIZER_JSON_NAME",
    "Extends",
    "Fertility",
    "SentencePieceBackend",
    "Tokenizer",
    "TokenizerRecord",
    "pieces_replaced",
]
