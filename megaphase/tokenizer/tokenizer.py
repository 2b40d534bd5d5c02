"""A small interface to sentencepiece.

Tokenizers made by `megaphase tokenizer train` are lossless: `decode(encode(text)) == text` for
every text. Existing tokenizers are used as they are, see `megaphase.tokenizer.files`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import sentencepiece

from megaphase.tokenizer.files import (
    SPACE_SYMBOL,
    TokenizerRecord,
    adds_prefix_space,
    read_tokenizer,
)

# In characters. sentencepiece takes thirty bytes of memory per character, so a longer text is
# encoded in parts that begin with a space, where a piece begins in any case.
_LONG_TEXT = 1 << 19


class Tokenizer:
    """Converts text to token ids and back.

    Text never encodes to a control token (EOD, tags), whatever it contains, and decoding skips
    them. An instance is pickled as its path, so passing one to another process is cheap.

    Attributes:
        path: the directory or model file from which it was loaded.
        vocab_size: number of ids, control and added tokens included; not padded.
        eod: the id that ends a document.
        tags: the id of each named task tag.
        reserved_tags: ids of the tags that have no name yet.
        fingerprint: equal for two tokenizers if and only if they assign the same ids.
        record: the content of `megaphase_tokenizer.json`, or its equivalent.
        byte_fallback: whether characters outside the vocabulary are spelled in bytes.
    """

    def __init__(
        self,
        processor: sentencepiece.SentencePieceProcessor,
        record: TokenizerRecord,
        path: Path,
    ) -> None:
        self.path = path
        self.record = record
        self.vocab_size = record.vocab_size
        self.eod = record.eod
        self.tags = dict(record.tags)
        self.reserved_tags = tuple(record.reserved_tags)
        self.fingerprint = record.tokenizer_hash
        self.byte_fallback = processor.is_byte(processor.piece_to_id("<0x00>"))
        self._processor = processor
        self._pieces = processor.get_piece_size()
        self._space_symbol_ids = self._spelled_space_symbol()

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Load a tokenizer made by Megaphase, a sentencepiece model, or a Hugging Face directory.

        Raises InputError, see `read_tokenizer`.
        """
        path = Path(path)
        processor, record = read_tokenizer(path)
        return cls(processor, record, path)

    def __reduce__(self) -> tuple[object, ...]:
        return Tokenizer.load, (self.path,)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of one text, without EOD."""
        ids: list[int] = self.encode_arrays([text])[0].tolist()
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without EOD."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return `encode_batch` as int32 arrays, one per text; uses one core."""
        if not self._space_symbol_ids:
            return self._encode_all(texts)
        long = [len(text) > _LONG_TEXT for text in texts]
        arrays = self._encode_all(
            ["" if it else text for it, text in zip(long, texts, strict=True)]
        )
        for i, text in enumerate(texts):
            if long[i]:
                parts = [self.encode_arrays([part])[0] for part in _parts_of(text)]
                arrays[i] = np.concatenate(parts)
            elif SPACE_SYMBOL in text:
                arrays[i] = np.array(self._encode_around_space_symbol(text), dtype=np.int32)
        return arrays

    def _encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        ids = self._processor.encode(list(texts), out_type="numpy", num_threads=1)
        return list(ids)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of token ids; EOD, tags and added tokens are skipped.

        Bytes that are not UTF-8 (ids cut in the middle of a character) become U+FFFD.
        """
        known = [int(token) for token in ids if token < self._pieces]
        return str(self._processor.decode(known))

    def token_bytes(self) -> np.ndarray:
        """Return each token's size in bytes of UTF-8, int64 [vocab_size]; 0 for control tokens."""
        return np.array([self._bytes_of(token) for token in range(self.vocab_size)], np.int64)

    def is_spelled(self) -> np.ndarray:
        """Return whether each token encodes characters missing from the vocabulary, bool
        [vocab_size]: byte tokens and the unknown token."""
        model = self._processor
        spelled = [model.is_byte(token) or model.is_unknown(token) for token in range(self._pieces)]
        return np.pad(np.array(spelled), (0, self.vocab_size - self._pieces))

    def piece(self, token: int) -> str:
        """Return a token's text in the vocabulary, in which a space is U+2581; for an added token,
        the name of its tag in angle brackets."""
        if token < self._pieces:
            return self._processor.id_to_piece(token)
        names = {added: name for name, added in self.tags.items()}
        return f"<{names.get(token, token)}>"

    def _bytes_of(self, token: int) -> int:
        if token >= self._pieces or token in (self.eod, self._processor.unk_id()):
            return 0
        if self._processor.is_control(token):
            return 0
        if self._processor.is_byte(token):
            return 1
        return len(self._processor.id_to_piece(token).replace(SPACE_SYMBOL, " ").encode())

    def _spelled_space_symbol(self) -> list[int]:
        """Return the space symbol's ids in bytes, with which a lossless model distinguishes it
        from a space; for other models, nothing: they treat it as a space."""
        keeps_spaces = self._processor.encode(" a") != self._processor.encode("a")
        if not (self.byte_fallback and keeps_spaces) or adds_prefix_space(self._processor):
            return []
        names = (f"<0x{byte:02X}>" for byte in SPACE_SYMBOL.encode())
        return [self._processor.piece_to_id(name) for name in names]

    def _encode_around_space_symbol(self, text: str) -> list[int]:
        """Encode text that contains sentencepiece's space symbol: that character as bytes."""
        parts = text.split(SPACE_SYMBOL)
        encoded = [self._processor.encode(parts[0])]
        for part in parts[1:]:
            encoded += [self._space_symbol_ids, self._processor.encode(part)]
        return list(chain.from_iterable(encoded))


def _parts_of(text: str) -> Iterator[str]:
    """Split a long text into parts, before a space if there is one."""
    begin = 0
    while len(text) - begin > _LONG_TEXT:
        end = text.rfind(" ", begin + 1, begin + _LONG_TEXT)
        while end > begin and text[end - 1] == " ":
            end -= 1
        end = end if end > begin else begin + _LONG_TEXT
        yield text[begin:end]
        begin = end
    yield text[begin:]
