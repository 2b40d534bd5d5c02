"""sentencepiece behind one small interface.

A tokenizer directory holds `tokenizer.model`, sentencepiece's own file, and
`megaphase_tokenizer.json`, which says what this project must know about it. The tokenizers that
`megaphase tokenizer train` makes are lossless: `decode(encode(text)) == text` for every text.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import sentencepiece
from pydantic import BaseModel, ConfigDict

from megaphase.errors import InputError
from megaphase.files import hash_file
from megaphase.records import read_record

MODEL_NAME = "tokenizer.model"
RECORD_NAME = "megaphase_tokenizer.json"

# sentencepiece writes a space as this character, and so reads the character itself as a space.
SPACE_SYMBOL = "\N{LOWER ONE EIGHTH BLOCK}"

_REMEDY = "make the tokenizer with `megaphase tokenizer train`"


class Fertility(BaseModel):
    """How finely the vocabulary cuts one language; a badly served one has few bytes a token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes_per_token: float
    tokens_per_word: float
    sample_bytes: int
    held_out: bool
    """Whether the sample was kept out of the training text."""


class TokenizerRecord(BaseModel):
    """`megaphase_tokenizer.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    algorithm: str
    vocab_size: int
    eod: int
    tags: dict[str, int]
    reserved_tags: list[int]
    """Ids without a name, for tags that a later task needs."""
    tokenizer_hash: str
    languages: dict[str, Fertility]


class Tokenizer:
    """Text to token ids and back.

    Text never encodes to a control token (EOD, tags), whatever it contains, and decoding skips
    them. An instance pickles as its directory, so handing one to another process is cheap.

    Attributes:
        directory: where it was loaded from.
        vocab_size: number of ids, control tokens included; not padded.
        eod: the id that ends a document.
        tags: id of each named task tag.
        reserved_tags: ids of the tags that have no name yet.
        fingerprint: digest of `tokenizer.model`.
        record: all that `megaphase_tokenizer.json` says.
    """

    def __init__(
        self,
        processor: sentencepiece.SentencePieceProcessor,
        record: TokenizerRecord,
        directory: Path,
    ) -> None:
        self.directory = directory
        self.record = record
        self.vocab_size = record.vocab_size
        self.eod = record.eod
        self.tags = dict(record.tags)
        self.reserved_tags = tuple(record.reserved_tags)
        self.fingerprint = record.tokenizer_hash
        self._processor = processor
        self._space_symbol_ids: list[int] = [
            processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()
        ]

    @classmethod
    def load(cls, directory: Path | str) -> Tokenizer:
        """Load a tokenizer directory.

        Raises InputError where a file is missing or broken, or `tokenizer.model` is not the one
        that the record was written for.
        """
        directory = Path(directory)
        record = read_record(directory / RECORD_NAME, TokenizerRecord, _REMEDY)
        model = directory / MODEL_NAME
        if not model.is_file():
            raise InputError(model, "no such file", _REMEDY)
        if hash_file(model) != record.tokenizer_hash:
            raise InputError(model, f"is not the model that {RECORD_NAME} describes", _REMEDY)
        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        if processor.get_piece_size() != record.vocab_size:
            problem = f"vocab_size is {record.vocab_size}, the model's {processor.vocab_size()}"
            raise InputError(directory / RECORD_NAME, problem, _REMEDY)
        return cls(processor, record, directory)

    def __reduce__(self) -> tuple[object, ...]:
        return Tokenizer.load, (self.directory,)

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, without EOD."""
        if SPACE_SYMBOL in text:
            return self._encode_around_space_symbol(text)
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without EOD."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_batch` as int32 arrays, one a text; on one core, whatever the machine has."""
        arrays = self._processor.encode(list(texts), out_type="numpy", num_threads=1)
        for i, text in enumerate(texts):
            if SPACE_SYMBOL in text:
                arrays[i] = np.array(self._encode_around_space_symbol(text), dtype=np.int32)
        return arrays

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids; EOD and tags leave no trace.

        Bytes that are not UTF-8 (ids cut in the middle of a character) become U+FFFD.
        """
        return self._processor.decode([int(token) for token in ids])

    def token_bytes(self) -> np.ndarray:
        """How many bytes of UTF-8 text each token stands for, int64 [vocab_size]; control: 0."""
        return np.array([self._bytes_of(token) for token in range(self.vocab_size)], np.int64)

    def _bytes_of(self, token: int) -> int:
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return 0
        if self._processor.is_byte(token):
            return 1
        return len(self._processor.id_to_piece(token).replace(SPACE_SYMBOL, " ").encode())

    def _encode_around_space_symbol(self, text: str) -> list[int]:
        """Encode text that holds sentencepiece's own space symbol: that character as bytes."""
        parts = text.split(SPACE_SYMBOL)
        encoded = [self._processor.encode(parts[0])]
        for part in parts[1:]:
            encoded += [self._space_symbol_ids, self._processor.encode(part)]
        return list(chain.from_iterable(encoded))
