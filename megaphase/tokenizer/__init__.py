"""Tokenizers: loading, encoding with exact byte counts, and the record stored with the model."""

from megaphase.tokenizer.files import (
    MODEL_NAME,
    RECORD_NAME,
    SPACE_SYMBOL,
    Fertility,
    TokenizerRecord,
)
from megaphase.tokenizer.tokenizer import Tokenizer

__all__ = [
    "MODEL_NAME",
    "RECORD_NAME",
    "SPACE_SYMBOL",
    "Fertility",
    "Tokenizer",
    "TokenizerRecord",
]
