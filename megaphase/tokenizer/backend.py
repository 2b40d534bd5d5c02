"""What a tokenizer library must do for `Tokenizer`."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Backend(Protocol):
    """Encodes and decodes with one library.

    Attributes:
        byte_fallback: whether characters outside the vocabulary are spelled in bytes.
        exact_bytes: whether `token_bytes` adds up to the size of every text; if not, the library
            changes texts before it encodes them.
    """

    byte_fallback: bool
    exact_bytes: bool

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, int32 [tokens]; never a control token. Uses one core."""

    def decode(self, ids: Sequence[int], *, whole: bool) -> str:
        """Return the text of ids; control tokens and ids beyond the vocabulary are skipped.

        Bytes that are not UTF-8 become U+FFFD; with `whole`, those at the end that begin a
        character are left out.
        """

    def token_bytes(self) -> np.ndarray:
        """Return each token's size in bytes of UTF-8, int64 [vocab_size]; 0 for control tokens."""

    def is_spelled(self) -> np.ndarray:
        """Return whether each token encodes only a part of a character, or an unknown one, bool
        [vocab_size]."""

    def piece(self, token: int) -> str:
        """Return a token's text in the vocabulary, in which a space is U+2581."""

    def spelling(self, token: int) -> bytes:
        """Return the text that a token encodes, in UTF-8; nothing for control tokens."""

    def encode_spelling(self, spelling: bytes) -> list[int]:
        """Return the ids that encode these bytes inside a text, without normalization and without a
        space before them; of a byte-level model, they may begin or end within a character."""


def unfinished_bytes(text: bytes) -> int:
    """Return how many bytes at the end are only the beginning of a character of UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(text)
    return len(decoder.getstate()[0])
