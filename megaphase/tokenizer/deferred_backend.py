"""A tokenizer of which another process has read the files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megaphase.tokenizer.backend import Backend
from megaphase.tokenizer.record import TokenizerRecord


@dataclass(frozen=True)
class TokenizerFacts:
    """What training needs of a tokenizer; unlike it, they are pickled without its path's files.

    Attributes:
        token_bytes: see Backend, as are those that are not listed.
    """

    path: Path
    record: TokenizerRecord
    byte_fallback: bool
    exact_bytes: bool
    token_bytes: np.ndarray


class DeferredBackend:
    """Knows the facts, and loads the library and its files when the first text is converted."""

    def __init__(self, facts: TokenizerFacts, load: Callable[[], Backend]) -> None:
        self.byte_fallback, self.exact_bytes = facts.byte_fallback, facts.exact_bytes
        self._token_bytes, self._load = facts.token_bytes, load

    @cached_property
    def _backend(self) -> Backend:
        return self._load()

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See Backend, as for the other methods."""
        return self._backend.encode_arrays(texts)

    def decode(self, ids: Sequence[int], *, whole: bool) -> str:
        return self._backend.decode(ids, whole=whole)

    def token_bytes(self) -> np.ndarray:
        return self._token_bytes

    def is_spelled(self) -> np.ndarray:
        return self._backend.is_spelled()

    def piece(self, token: int) -> str:
        return self._backend.piece(token)

    def spelling(self, token: int) -> bytes:
        return self._backend.spelling(token)

    def encode_spelling(self, spelling: bytes) -> list[int]:
        return self._backend.encode_spelling(spelling)
