"""A task's stream: the endless sequence of its samples, addressed by ordinal.

Every epoch shuffles the documents anew (a keyed permutation, nothing stored), reads them as one
sequence of tokens and cuts it into samples of seq_len + 1 tokens that share one token with their
neighbours. Within an epoch the samples are permuted again in windows, so that one long document
does not fill neighbouring batches. Epochs never mix: an epoch's last sample may be shorter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from megaphase.corpus import Corpus
from megaphase.errors import InputError
from megaphase.plan import _builder
from megaphase.keys import derive_key

# Samples are permuted within windows of this size, so that a run that needs a hundredth of a huge
# epoch needs an index of that hundredth (and at most one window) only.
SAMPLE_WINDOW = 1 << 16


def held_out_threshold(fraction: float) -> int:
    """Documents whose 64-bit hash is below this are held out of training."""
    return int(fraction * 2**64)


@dataclass(frozen=True)
class SampleLocation:
    """Where a sample begins: its epoch, and slot in the document order and offset in the document."""

    epoch: int
    slot: int
    offset: int


class Stream:
    """One side (training or held out) of one task's corpus as a sequence of samples."""

    def __init__(
        self, task: str, corpus: Corpus, *, seed: int, seq_len: int, fraction: float, held_out: bool
    ) -> None:
        self.task = task
        self.corpus = corpus
        self.seq_len = seq_len
        self._seed = seed
        self._side = ("held out" if held_out else "training",)
        self._documents = (corpus.lengths, corpus.hashes, held_out_threshold(fraction), held_out)
        self.documents, self.tokens = _builder.count_documents(*self._documents)
        self.samples_per_epoch = max(0, -(-(self.tokens - 1) // seq_len))
        self._document_key = lru_cache(maxsize=64)(self._derive_document_key)

    def require_whole_sample(self) -> None:
        """Refuse a corpus that cannot fill a single training sample."""
        if self.tokens <= self.seq_len:
            raise InputError(
                self.corpus.prefix,
                f"task {self.task!r} has {self.tokens:,} training tokens, fewer than one sample of "
                f"seq_len + 1 = {self.seq_len + 1:,}",
                "add text or lower model.seq_len",
            )

    def epochs(self, samples: float) -> float:
        """How many epochs so many samples are."""
        return samples / self.samples_per_epoch

    def _derive_document_key(self, epoch: int) -> int:
        return derive_key(self._seed, "documents", *self._side, self.task, epoch)

    def index_size(self, epoch: int, ordinals: int) -> int:
        """Samples of `epoch` that an index for the ordinals [0, ordinals) must hold."""
        used = min(max(0, ordinals - epoch * self.samples_per_epoch), self.samples_per_epoch)
        return min(-(-used // SAMPLE_WINDOW) * SAMPLE_WINDOW, self.samples_per_epoch)

    def fill_epoch(self, epoch: int, slots: np.ndarray, offsets: np.ndarray) -> None:
        """Write the locations of an epoch's first samples, in token order, into the two arrays."""
        _builder.fill_epoch(
            *self._documents, self._document_key(epoch), self.seq_len, slots, offsets
        )

    def position(self, ordinal: int) -> tuple[int, int]:
        """(epoch, position in the epoch's token order) of the sample with this ordinal."""
        epoch, number = divmod(ordinal, self.samples_per_epoch)
        window = number // SAMPLE_WINDOW
        start = window * SAMPLE_WINDOW
        size = min(SAMPLE_WINDOW, self.samples_per_epoch - start)
        key = derive_key(self._seed, "samples", *self._side, self.task, epoch, window)
        image = _builder.permute(size, key, np.array([number - start]))
        return epoch, start + int(image[0])

    def read(self, location: SampleLocation, out: np.ndarray) -> int:
        """Copy a sample's tokens into `out` (int64 [seq_len + 1]); returns how many there were.

        Fewer than seq_len + 1 only at an epoch's end; the rest of `out` keeps its content.
        """
        return _builder.read_sample(
            self.corpus.tokens,
            self.corpus.byte_offsets,
            *self._documents,
            self._document_key(location.epoch),
            location.slot,
            location.offset,
            out,
        )

    def pieces(self, location: SampleLocation) -> Any:
        """The (document, offset, tokens) pieces of which a sample is made."""
        return _builder.sample_pieces(
            *self._documents,
            self._document_key(location.epoch),
            location.slot,
            location.offset,
            self.seq_len + 1,
        )
