"""One interface to the tokenizer libraries.

Tokenizers made by `megaphase tokenizer train` are lossless: `decode(encode(text)) == text` for
every text. Existing tokenizers are used as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor

from megaphase.tokenizer.backend import Backend
from megaphase.tokenizer.deferred_backend import DeferredBackend, TokenizerFacts
from megaphase.tokenizer.record import (
    RECORD_NAME,
    REMEDY,
    TOKENIZER_JSON_NAME,
    TokenizerRecord,
)
from megaphase.tokenizer.sentencepiece_backend import SentencePieceBackend
from megaphase.tokenizer.sentencepiece_files import (
    HUGGING_FACE_MODEL_NAMES,
    read_hugging_face,
    read_model_alone,
    read_own,
)
from megaphase.tokenizer.tiktoken_files import check_has_tokenizer_json, is_for_tiktoken
from megaphase.tokenizer.tokenizers_backend import TokenizersBackend
from megaphase.tokenizer.tokenizers_files import (
    EncodingModel,
    read_own_json,
    read_tokenizer_json,
)
from megaphase.utils.errors import InputError
from megaphase.utils.json_models import read_record


class Tokenizer:
    """Converts text to token ids and back.

    Text never encodes to a control token (EOD, tags), whatever it contains, and decoding skips
    them. An instance is pickled as its path, so passing one to another process is cheap.

    Attributes:
        path: the directory or model file from which it was loaded.
        vocab_size: number of ids, control and added tokens included; not padded.
        eod: the id that ends a document.
        bos: the id that begins a document for models that were trained with one; None if there is
            none.
        adds_bos: whether the tokenizer's files say that the model was trained with `bos`.
        tags: the id of each named task tag.
        reserved_tags: ids of the tags that have no name yet.
        fingerprint: equal for two tokenizers if and only if they assign the same ids.
        record: the content of `megaphase_tokenizer.json`, or its equivalent.
        byte_fallback: whether characters outside the vocabulary are spelled in bytes.
        exact_bytes: whether `token_bytes` adds up to the size of every text.
    """

    def __init__(self, backend: Backend, record: TokenizerRecord, path: Path) -> None:
        self.path = path
        self.record = record
        self.vocab_size = record.vocab_size
        self.eod = record.eod
        self.bos, self.adds_bos = record.bos, record.adds_bos
        self.tags = dict(record.tags)
        self.reserved_tags = tuple(record.reserved_tags)
        self.fingerprint = record.tokenizer_hash
        self.byte_fallback = backend.byte_fallback
        self.exact_bytes = backend.exact_bytes
        self._backend = backend

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Load a tokenizer made by Megaphase, a sentencepiece model, or a Hugging Face directory.

        A directory with a sentencepiece model is encoded with sentencepiece, any other with the
        `tokenizers` library.

        Raises InputError if a file is missing or damaged, is not the one that the record
        describes, the record names tokens that the model does not have, there is no EOD, texts
        would not come back, or a Hugging Face tokenizer assigns other ids than its model.
        """
        path = Path(path)
        return cls(*_read(path), path)

    def facts(self) -> TokenizerFacts:
        """Return what another process needs to train without reading the tokenizer's files."""
        backend = self._backend
        sizes = backend.token_bytes()
        return TokenizerFacts(
            self.path, self.record, backend.byte_fallback, backend.exact_bytes, sizes
        )

    @classmethod
    def of_facts(cls, facts: TokenizerFacts) -> Tokenizer:
        """Return a tokenizer that reads its files when it converts the first text."""
        backend = DeferredBackend(facts, lambda: _read(facts.path)[0])
        return cls(backend, facts.record, facts.path)

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
        return self._backend.encode_arrays(texts)

    def decode(self, ids: Sequence[int] | np.ndarray, *, whole: bool = False) -> str:
        """Return the text of token ids; EOD, tags and special added tokens are skipped.

        Bytes that are not UTF-8 (ids cut in the middle of a character) become U+FFFD; with `whole`,
        a character that is cut off at the end is left out.
        """
        return self._backend.decode([int(token) for token in ids], whole=whole)

    def token_bytes(self) -> np.ndarray:
        """Return each token's size in bytes of UTF-8, int64 [vocab_size]; 0 for control tokens."""
        return self._backend.token_bytes()

    def is_spelled(self) -> np.ndarray:
        """Return whether each token encodes only a part of a character, or an unknown one, bool
        [vocab_size]."""
        return self._backend.is_spelled()

    def piece(self, token: int) -> str:
        """Return a token's text in the vocabulary, in which a space is U+2581; for an added token
        of a sentencepiece model, the name of its tag in angle brackets."""
        return self._backend.piece(token)

    def spelling(self, token: int) -> bytes:
        """Return the text that a token encodes, in UTF-8; nothing for control tokens."""
        return self._backend.spelling(token)

    def encode_spelling(self, spelling: bytes) -> list[int]:
        """Return the ids that encode a token's `spelling` inside a text: without normalization,
        without a space before it, and also where it begins or ends within a character."""
        return self._backend.encode_spelling(spelling)


def _read(path: Path) -> tuple[Backend, TokenizerRecord]:
    if path.is_file():
        if path.suffix == ".json":
            remedy = "give the directory that contains it"
            raise InputError(path, "does not say which token ends a document", remedy)
        check_has_tokenizer_json(path)
        return _with_sentencepiece(read_model_alone(path))
    if not path.exists():
        remedy = "give another, or make one with `megaphase tokenizer train`"
        raise InputError(path, "no such file or directory", remedy)
    if path.is_dir() and not (path / RECORD_NAME).exists():
        model = next((n for n in HUGGING_FACE_MODEL_NAMES if (path / n).is_file()), None)
        check_has_tokenizer_json(path if model is None else path / model)
        if model is not None and not is_for_tiktoken(path / model):
            return _with_sentencepiece(read_hugging_face(path, path / model))
        if (path / TOKENIZER_JSON_NAME).exists():
            return _with_tokenizers(read_tokenizer_json(path))
        names = ", ".join((RECORD_NAME, TOKENIZER_JSON_NAME, *HUGGING_FACE_MODEL_NAMES))
        raise InputError(path, f"has none of {names}", "give the directory of a tokenizer")
    record = read_record(path / RECORD_NAME, TokenizerRecord, REMEDY)
    if record.library == "tokenizers":
        return _with_tokenizers(read_own_json(path, record))
    return _with_sentencepiece(read_own(path, record))


def _with_sentencepiece(
    found: tuple[SentencePieceProcessor, TokenizerRecord],
) -> tuple[Backend, TokenizerRecord]:
    return SentencePieceBackend(*found), found[1]


def _with_tokenizers(
    found: tuple[EncodingModel, TokenizerRecord],
) -> tuple[Backend, TokenizerRecord]:
    return TokenizersBackend(*found), found[1]
