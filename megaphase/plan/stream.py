"""A task's stream: the endless sequence of its samples, addressed by ordinal.

Every epoch shuffles the documents anew (a keyed permutation, nothing stored), reads them as one
sequence of tokens and cuts it into samples of seq_len + 1 tokens that share one token with their
neighbours. Within an epoch the samples are permuted again in windows, so that one long document
does not fill neighbouring batches. Epochs never mix: an epoch's last sample may be shorter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megaphase.corpus import Corpus
from megaphase.keys import derive_key
from megaphase.plan import _builder
from megaphase.targets import IGNORED_TARGET

# Samples are permuted within windows of this size, so that a run that needs a hundredth of a huge
# epoch needs an index of that hundredth (and at most one window) only.
SAMPLE_WINDOW = 1 << 16


def held_out_threshold(fraction: float) -> int:
    """Documents whose 64-bit hash is below this are held out of training."""
    return int(fraction * 2**64)


@dataclass(frozen=True)
class SampleLocations:
    """Where samples begin.

    epochs:  int64 [samples]
    slots:   int64 [samples], position in the epoch's order of documents
    offsets: uint32 [samples], token of that document
    """

    epochs: np.ndarray
    slots: np.ndarray
    offsets: np.ndarray


class Stream:
    """One side (training or held out) of one task's corpus as a sequence of samples.

    Attributes:
        documents: how many documents of the corpus are on this side.
        tokens: how many tokens they have, EODs included.
        samples_per_epoch: of seq_len + 1 tokens; the last one may be shorter.
    """

    def __init__(
        self, task: str, corpus: Corpus, *, seed: int, seq_len: int, fraction: float, held_out: bool
    ) -> None:
        self.task = task
        self.corpus = corpus
        self.seq_len = seq_len
        # Plain views: numpy's memmap class costs microseconds at every use.
        self._tokens = np.asarray(corpus.tokens)
        self._byte_offsets = np.asarray(corpus.byte_offsets)
        self._documents = (
            np.asarray(corpus.lengths),
            np.asarray(corpus.hashes),
            held_out_threshold(fraction),
            held_out,
        )
        self.documents, self.tokens = _builder.count_documents(*self._documents)
        self.samples_per_epoch = max(0, -(-(self.tokens - 1) // seq_len))
        side = "held out" if held_out else "training"
        self._documents_key = derive_key(seed, "documents", side, task)
        self._samples_key = derive_key(seed, "samples", side, task)

    def epochs(self, samples: int) -> float:
        """How many epochs so many samples are."""
        return samples / self.samples_per_epoch

    def index_size(self, epoch: int, ordinals: int) -> int:
        """Samples of `epoch` that an index for the ordinals [0, ordinals) must hold."""
        used = min(max(0, ordinals - epoch * self.samples_per_epoch), self.samples_per_epoch)
        return min(-(-used // SAMPLE_WINDOW) * SAMPLE_WINDOW, self.samples_per_epoch)

    def fill_epoch(self, epoch: int, slots: np.ndarray, offsets: np.ndarray) -> None:
        """Write where the epoch's first samples begin, in token order, into the two arrays.

        slots: uint32 or uint64 [samples]; offsets: uint32 [samples]
        """
        _builder.fill_epoch(
            *self._documents, self._documents_key, epoch, self.seq_len, slots, offsets
        )

    def in_token_order(self, ordinals: np.ndarray) -> np.ndarray:
        """The numbers in token order, counted on from epoch to epoch, of these ordinals [n]."""
        return _builder.shuffle_samples(
            ordinals, self.samples_per_epoch, SAMPLE_WINDOW, self._samples_key
        )

    def read(
        self,
        locations: SampleLocations,
        rows: np.ndarray,
        inputs: np.ndarray,
        targets: np.ndarray,
        filler: int,
    ) -> None:
        """Read the located samples into the given rows of inputs and targets.

        rows:            int64 [samples]
        inputs, targets: int64 [batch, seq_len]; what the last sample of an epoch leaves empty gets
                         `filler` as input and IGNORED_TARGET as target
        """
        _builder.read_samples(
            self._tokens,
            self._byte_offsets,
            *self._documents,
            self._documents_key,
            locations.epochs,
            locations.slots,
            locations.offsets,
            rows,
            inputs,
            targets,
            filler,
            IGNORED_TARGET,
        )
