"""Encoding and decoding with sentencepiece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain

import numpy as np
import sentencepiece

from megaphase.tokenizer.backend import unfinished_bytes
from megaphase.tokenizer.record import SPACE_SYMBOL, TokenizerRecord
from megaphase.tokenizer.sentencepiece_files import adds_prefix_space

# In characters. sentencepiece takes thirty bytes of memory per character, so a longer text is
# encoded in parts that begin with a space, where a piece begins in any case.
_LONG_TEXT = 1 << 19


class SentencePieceBackend:
    """A `Backend`. The bytes of models that normalize are those of the normalized text."""

    exact_bytes = True

    def __init__(
        self, processor: sentencepiece.SentencePieceProcessor, record: TokenizerRecord
    ) -> None:
        self.byte_fallback = processor.is_byte(processor.piece_to_id("<0x00>"))
        self._processor = processor
        self._eod, self._vocab_size = record.eod, record.vocab_size
        self._added = {token: name for name, token in record.tags.items()}
        self._pieces = processor.get_piece_size()
        self._space_symbol_ids = self._spelled_space_symbol()

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
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

    def decode(self, ids: Sequence[int], *, whole: bool) -> str:
        known = [token for token in ids if token < self._pieces]
        if whole:
            known = known[: len(known) - self._unfinished(known)]
        return str(self._processor.decode(known))

    def _unfinished(self, ids: Sequence[int]) -> int:
        """Return how many ids at the end encode only the beginning of a character."""
        # A character of UTF-8 has at most 4 bytes.
        last = []
        for token in reversed(ids[-4:]):
            if not self._processor.is_byte(token):
                break
            last.append(int(self._processor.id_to_piece(token)[1:-1], 16))
        return unfinished_bytes(bytes(reversed(last)))

    def token_bytes(self) -> np.ndarray:
        return np.array([len(self.spelling(token)) for token in range(self._vocab_size)], np.int64)

    def is_spelled(self) -> np.ndarray:
        model = self._processor
        spelled = [model.is_byte(token) or model.is_unknown(token) for token in range(self._pieces)]
        return np.pad(np.array(spelled), (0, self._vocab_size - self._pieces))

    def piece(self, token: int) -> str:
        if token < self._pieces:
            return self._processor.id_to_piece(token)
        return f"<{self._added.get(token, token)}>"

    def spelling(self, token: int) -> bytes:
        if token >= self._pieces or token in (self._eod, self._processor.unk_id()):
            return b""
        if self._processor.is_control(token):
            return b""
        piece = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):
            return bytes([int(piece[1:-1], 16)])
        return piece.replace(SPACE_SYMBOL, " ").encode()

    def encode_spelling(self, spelling: bytes) -> list[int]:
        ids: list[int] = self._plain_processor.encode(spelling.decode())
        return ids

    @cached_property
    def _plain_processor(self) -> sentencepiece.SentencePieceProcessor:
        """The same model without changes of the text."""
        # Imported here because only extended tokenizers need it.
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

        model = ModelProto.FromString(self._processor.serialized_model_proto())
        model.normalizer_spec.precompiled_charsmap = b""
        model.normalizer_spec.add_dummy_prefix = False
        model.normalizer_spec.remove_extra_whitespaces = False
        return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())

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
