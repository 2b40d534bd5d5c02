"""A task's stream: the endless sequence of its samples, addressed by ordinal.

Every epoch shuffles the documents anew (a keyed permutation, nothing stored), reads them as one
sequence of tokens and cuts it into samples of seq_len + 1 tokens that share one token with their
neighbours. Within an epoch the samples are permuted again in windows, so that one long document
does not fill neighbouring batches. Epochs never mix: an epoch's last sample may be shorter.
"""

from __future__ import annotations

import numpy as np

from megaphase.corpus import Corpus
from megaphase.keys import derive_key
from megaphase.plan import _builder
from megaphase.targets import IGNORED_TARGET

# Samples are permuted within windows of this size, so that a run that needs a hundredth of a huge
# epoch needs an index of that hundredth (and at most one window) only.
SAMPLE_WINDOW = 1 << 16

# Documents looked at in one call, so that a call takes well under a second.
DOCUMENTS_PER_CALL = 1 << 21


def held_out_threshold(fraction: float) -> int:
    """Documents whose 64-bit hash is below this are held out of training."""
    return int(fraction * 2**64)


class Stream:
    """One side (training or held out) of one task's corpus as a sequence of samples.

    Samples have two numbers: the ordinal, by which training asks for them, and the number in token
    order, by which the index holds them; both count on from epoch to epoch.

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
        side = "held out" if held_out else "training"
        corpus.expect_random_reads()
        # Plain views: numpy's memmap class costs microseconds at every use.
        self._samples = _builder.Stream(
            np.asarray(corpus.tokens),
            np.asarray(corpus.byte_offsets),
            np.asarray(corpus.lengths),
            np.asarray(corpus.hashes),
            held_out_threshold(fraction),
            held_out,
            derive_key(seed, "documents", side, task),
            seq_len,
        )
        self.documents, self.tokens = self._samples.totals()
        self.samples_per_epoch = max(0, -(-(self.tokens - 1) // seq_len))
        self._shuffle_key = derive_key(seed, "samples", side, task)

    @property
    def start_dtype(self) -> type[np.generic]:
        """The type of an index's slots and offsets: it must number the corpus's documents."""
        return np.uint32 if len(self.corpus.lengths) <= 1 << 32 else np.uint64

    def epochs(self, samples: int) -> float:
        """How many epochs so many samples are."""
        return samples / self.samples_per_epoch

    def index_sizes(self, ordinals: int) -> list[int]:
        """For every epoch, the samples that an index for the ordinals [0, ordinals) must hold."""
        full, used = divmod(ordinals, self.samples_per_epoch)
        windows = -(-used // SAMPLE_WINDOW)
        last = min(windows * SAMPLE_WINDOW, self.samples_per_epoch)
        return [self.samples_per_epoch] * full + ([last] if last else [])

    def walk(self, epoch: int) -> _builder.StreamWalk:
        """A walk through an epoch's samples in token order; its `fill` writes where they begin."""
        return self._samples.walk(epoch)

    def first_starts(self, samples: int) -> np.ndarray:
        """Slot and offset where epoch 0's first samples begin, in token order: [samples, 2]."""
        starts = np.empty((samples, 2), self.start_dtype)
        walk, done = self.walk(0), 0
        while done < samples:
            done += walk.fill(starts[done:], DOCUMENTS_PER_CALL)
            if done < samples and walk.at_end:
                raise ValueError(f"an epoch of {self.task} has fewer than {samples} samples")
        return starts

    def in_token_order(self, ordinals: np.ndarray) -> np.ndarray:
        """The numbers in token order of the samples with these ordinals, int64 [n]."""
        return _builder.shuffle_samples(
            ordinals, self.samples_per_epoch, SAMPLE_WINDOW, self._shuffle_key
        )

    def pieces(self, epoch: int, slot: int, offset: int) -> list[tuple[int, int, int]]:
        """(document, offset, tokens) of the pieces that make up the sample that begins there."""
        return self._samples.pieces(epoch, slot, offset)

    def read(
        self,
        starts: np.ndarray,
        numbers: np.ndarray,
        rows: np.ndarray,
        inputs: np.ndarray,
        targets: np.ndarray,
        filler: int,
    ) -> None:
        """Read the samples with these numbers in token order into the given rows.

        starts:          start_dtype [indexed samples, 2], slot and offset where each begins
        numbers, rows:   int64 [samples]
        inputs, targets: int64 [batch, seq_len]; what the last sample of an epoch leaves empty gets
                         `filler` as input and IGNORED_TARGET as target
        """
        self._samples.read(
            starts, self.samples_per_epoch, numbers, rows, inputs, targets, filler, IGNORED_TARGET
        )
