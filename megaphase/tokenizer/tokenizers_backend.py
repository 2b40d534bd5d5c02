"""Encoding and decoding with the Hugging Face `tokenizers` library."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np

from megaphase.tokenizer.backend import unfinished_bytes
from megaphase.tokenizer.record import SPACE_SYMBOL, TokenizerRecord
from megaphase.tokenizer.spelling import spelled_piece
from megaphase.tokenizer.tokenizers_files import BYTE_LEVEL, EncodingModel

# In characters. A longer text is encoded in parts, which begin with a space between two letters,
# to bound the memory; see _can_be_cut.
_LONG_TEXT = 1 << 19
# Letters of several scripts, upper and lower case: a cut before the space changes no ids.
_CUT_SAMPLES = ("aa bb", "Aa Bb", "aA bB", "яя яя", "Яя Яя", "कम कम", "λο λο", "عم عم", "é é")


class TokenizersBackend:
    """A `Backend`."""

    def __init__(self, model: EncodingModel, record: TokenizerRecord) -> None:
        # Every worker process encodes on its own core; the library would start threads for all.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.byte_fallback, self.exact_bytes = model.byte_fallback, model.exact_bytes
        self._encoder = model.encoder
        self._vocabulary, self._bytes_of = model.vocabulary, model.bytes_of
        self._vocab_size = record.vocab_size
        self._byte_level = record.algorithm == BYTE_LEVEL
        self._adds_space = any("space" in step for step in record.normalization)
        self._can_be_cut = self._is_local()

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        short = [text for text in texts if len(text) <= _LONG_TEXT or not self._can_be_cut]
        if len(short) == len(texts):
            return self._encode_all(short)
        encoded = iter(self._encode_all(short))
        return [
            next(encoded)
            if len(text) <= _LONG_TEXT
            else np.concatenate(self._encode_all(list(self._parts_of(text))))
            for text in texts
        ]

    def _encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(each.ids, np.int32) for each in encoded]

    def decode(self, ids: Sequence[int], *, whole: bool) -> str:
        joined = b"".join(self._bytes_of.get(token, b"") for token in ids)
        if whole:
            joined = joined[: len(joined) - unfinished_bytes(joined)]
        text = joined.decode("utf-8", "replace")
        return text.removeprefix(" ") if self._adds_space else text

    def token_bytes(self) -> np.ndarray:
        sizes = np.zeros(self._vocab_size, np.int64)
        for token, spelled in self._bytes_of.items():
            sizes[token] = len(spelled)
        return sizes

    def is_spelled(self) -> np.ndarray:
        spelled = np.zeros(self._vocab_size, bool)
        for token, each in self._bytes_of.items():
            spelled[token] = _decoded(each) is None
        return spelled

    def piece(self, token: int) -> str:
        spelled = self._bytes_of.get(token)
        if spelled is None:
            return self._vocabulary.get(token, f"<{token}>")
        text = _decoded(spelled)
        if text is None:
            return "".join(f"<0x{byte:02X}>" for byte in spelled)
        return text.replace(" ", SPACE_SYMBOL)

    def spelling(self, token: int) -> bytes:
        return self._bytes_of.get(token, b"")

    def encode_spelling(self, spelling: bytes) -> list[int]:
        pieces = self._encoder.model.tokenize(spelled_piece(spelling, byte_level=self._byte_level))
        return [piece.id for piece in pieces]

    def _is_local(self) -> bool:
        """Return whether a text may be cut before a space between two letters."""
        whole = self._encode_all(_CUT_SAMPLES)
        cut = (np.concatenate(self._encode_all(self._cut(text))) for text in _CUT_SAMPLES)
        return all(map(np.array_equal, whole, cut)) and not any(
            self._spans_words(spelled) for spelled in self._bytes_of.values()
        )

    def _cut(self, text: str) -> list[str]:
        first, _, second = text.partition(" ")
        return [first, second if self._adds_space else f" {second}"]

    @staticmethod
    def _spans_words(spelled: bytes) -> bool:
        """Return whether a token has a space after a letter."""
        first, space, _ = spelled.lstrip(b" ").partition(b" ")
        return bool(space) and first[-1:].isalpha()

    def _parts_of(self, text: str) -> Iterator[str]:
        """Split a long text where it may be cut, or leave it whole where it may not."""
        begin = 0
        while len(text) - begin > _LONG_TEXT:
            end = text.rfind(" ", begin + 1, begin + _LONG_TEXT)
            while end > begin + 1 and not (text[end - 1].isalpha() and text[end + 1].isalpha()):
                end = text.rfind(" ", begin + 1, end)
            if end <= begin + 1:
                break
            yield text[begin:end]
            begin = end + self._adds_space
        yield text[begin:]


def _decoded(spelled: bytes) -> str | None:
    """Return the characters that bytes encode, or None if they are not whole."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return None
