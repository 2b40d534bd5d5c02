"""A task's stream: the endless sequence of its samples, addressed by ordinal.

Every epoch shuffles the documents (by a keyed permutation, without storing it), concatenates them
and splits the tokens into samples of seq_len + 1 tokens that share one token with their neighbours.
Within an epoch the samples are permuted again in windows, so that one long document does not fill
neighbouring batches. Epochs do not mix: an epoch's last sample may be shorter.
"""

from __future__ import annotations

import numpy as np

from megaphase.corpus import Corpus
from megaphase.corpus.integrity import wrong_tokens
from megaphase.plan import _builder
from megaphase.plan.split import held_out_hashes, training_hashes
from megaphase.utils.files import hash_json
from megaphase.utils.seeds import derive_key
from megaphase.utils.targets import IGNORED_TARGET

# Samples are permuted within windows of this size, so that a run that needs a hundredth of a huge
# epoch needs only an index of that hundredth (and at most one more window).
SAMPLE_WINDOW = 1 << 16

# Documents visited in one call, so that a call takes well under a second.
DOCUMENTS_PER_CALL = 1 << 21


class Stream:
    """The training or held-out documents of one task as a sequence of samples.

    A sample has two numbers: the ordinal, by which training requests it, and the number in token
    order, by which the index stores it; both continue from epoch to epoch.

    Attributes:
        documents: number of documents that it reads.
        tokens: number of their tokens, EODs included.
        samples_per_epoch: number of samples of seq_len + 1 tokens; the last may be shorter.
        attend_across_documents: whether a sample's documents attend to each other.
    """

    def __init__(
        self,
        task: str,
        corpus: Corpus,
        *,
        seed: int,
        seq_len: int,
        fraction: float,
        held_out: bool,
        subsample: float = 1.0,
        tag: int | None = None,
        attend_across_documents: bool = True,
        bos: int | None = None,
    ) -> None:
        """
        Args:
                fraction: the fraction of the documents that is held out.
                held_out: whether to read the held-out documents instead of the training ones.
                subsample: the fraction of the other documents that is trained on.
                tag: for a PackedStream only: the token between source and target.
                bos: the input from which a document's first token is predicted, instead of the EOD
                    of the document before it; the first document of an epoch has none.
        """
        self.task = task
        self.corpus = corpus
        self._origin = {
            "task": task,
            "seed": seed,
            "seq_len": seq_len,
            "held_out_fraction": fraction,
            "held_out": held_out,
            "tag": tag,
            "attend_across_documents": attend_across_documents,
        }
        if held_out:
            self._hashes = held_out_hashes(fraction)
        else:
            self._hashes = training_hashes(fraction, subsample)
            # Streams without a subsample keep the fingerprints that they had before it existed.
            self._origin |= {"subsample": subsample} if subsample != 1 else {}
        self.seq_len = seq_len
        self.attend_across_documents = attend_across_documents
        self._every_sample_has_a_target = attend_across_documents and tag is None
        side = "held out" if held_out else "training"
        corpus.expect_random_reads()
        # Plain arrays: numpy's memmap class costs microseconds at every use.
        self._samples = _builder.Stream(
            np.asarray(corpus.tokens),
            np.asarray(corpus.byte_offsets),
            np.asarray(corpus.lengths),
            np.asarray(corpus.hashes),
            self._hashes.first,
            self._hashes.last,
            derive_key(seed, "documents", side, task),
            seq_len,
            tag,
            None if corpus.blocks is None else np.asarray(corpus.blocks),
            corpus.manifest.vocab_size,
            bos,
        )
        self.documents, self.tokens = self._samples.totals()
        self.samples_per_epoch = self._samples_in_an_epoch()
        self._shuffle_key = derive_key(seed, "samples", side, task)

    def _samples_in_an_epoch(self) -> int:
        return max(0, -(-(self.tokens - 1) // self.seq_len))

    @property
    def fingerprint(self) -> str:
        """A hash of everything that determines the sequence of samples."""
        return hash_json(self._origin | {"corpus": self.corpus.fingerprint})

    def text_bytes(self) -> int:
        """Return the size of its documents' UTF-8 text in bytes; visits all documents of the
        corpus."""
        total, corpus = 0, self.corpus
        for first in range(0, len(corpus.hashes), DOCUMENTS_PER_CALL):
            here = slice(first, first + DOCUMENTS_PER_CALL)
            read = self._hashes.holds(np.asarray(corpus.hashes[here]))
            total += int(corpus.sums["text_bytes"][here][read].sum(dtype=np.int64))
        return total

    def bytes_of_targets(self, samples: int, token_bytes: np.ndarray) -> np.ndarray:
        """Return the bytes of text behind the targets of the first samples, float64
        [samples, seq_len].

        A document's bytes are those of its text before normalization; they are shared among its
        tokens in proportion to the bytes of each. Positions past a sample's end get 0.

        token_bytes: int64 [vocabulary], the bytes of each token.
        """
        found = np.zeros((samples, self.seq_len))
        for row, (slot, offset) in enumerate(self.first_starts(samples).tolist()):
            parts = [
                self._bytes_of_document(document, token_bytes)[first : first + tokens]
                for document, first, tokens in self.pieces(0, slot, offset)
            ]
            targets = np.concatenate(parts)[1:]
            found[row, : len(targets)] = targets
        return found

    def _bytes_of_document(self, document: int, token_bytes: np.ndarray) -> np.ndarray:
        """Return the bytes of a document's text behind each of its tokens, float64 [tokens]."""
        sizes: np.ndarray = token_bytes[self.corpus.document(document)]
        whole = float(self.corpus.sums["text_bytes"][document])
        shared: np.ndarray = sizes * (whole / max(1, int(sizes.sum())))
        return shared

    @property
    def start_dtype(self) -> type[np.generic]:
        """The type of an index's slots and offsets, large enough for the corpus's documents."""
        return np.uint32 if len(self.corpus.lengths) <= 1 << 32 else np.uint64

    def epochs(self, samples: int) -> float:
        """Return the number of epochs in `samples` samples."""
        return samples / self.samples_per_epoch

    def index_sizes(self, ordinals: int) -> list[int]:
        """Return, for every epoch, the samples that an index for the ordinals [0, ordinals)
        stores."""
        full, used = divmod(ordinals, self.samples_per_epoch)
        windows = -(-used // SAMPLE_WINDOW)
        last = min(windows * SAMPLE_WINDOW, self.samples_per_epoch)
        return [self.samples_per_epoch] * full + ([last] if last else [])

    def first_indexed_epoch(self, first_ordinal: int) -> int:
        """Return the first epoch that an index for ordinals from this one on needs."""
        return first_ordinal // self.samples_per_epoch

    def walk(self, epoch: int) -> _builder.StreamWalk:
        """Return a walk through an epoch's samples in token order; `fill` writes their starts."""
        return self._samples.walk(epoch)

    def first_starts(self, samples: int) -> np.ndarray:
        """Return slot and offset of epoch 0's first samples, in token order: [samples, 2]."""
        starts = np.empty((samples, 2), self.start_dtype)
        walk, done = self.walk(0), 0
        while done < samples:
            done += walk.fill(starts[done:], DOCUMENTS_PER_CALL)
            if done < samples and walk.at_end:
                raise ValueError(f"an epoch of {self.task} has fewer than {samples} samples")
        return starts

    def in_token_order(self, ordinals: np.ndarray) -> np.ndarray:
        """Convert ordinals to sample numbers in token order, int64 [n]."""
        return self._shuffled(ordinals, SAMPLE_WINDOW)

    def _shuffled(self, ordinals: np.ndarray, window: int) -> np.ndarray:
        return _builder.shuffle_samples(ordinals, self.samples_per_epoch, window, self._shuffle_key)

    def index_rows(self, numbers: np.ndarray) -> np.ndarray:
        """Return the rows of the index that store where these samples begin, int64 [n]."""
        return numbers

    def pieces(self, epoch: int, slot: int, offset: int) -> list[tuple[int, int, int]]:
        """Return (document, offset, tokens) of the pieces of the sample that begins there."""
        return self._samples.pieces(epoch, slot, offset)

    def read(
        self,
        starts: np.ndarray,
        numbers: np.ndarray,
        rows: np.ndarray,
        inputs: np.ndarray,
        targets: np.ndarray,
        pad_token_id: int,
        documents: np.ndarray | None = None,
    ) -> None:
        """Read the samples with these numbers in token order into the given rows.

        starts:          start_dtype [indexed samples, 2], slot and offset of each start
        numbers, rows:   int64 [samples]
        inputs, targets: int64 [batch, seq_len]; positions past a sample's end get
                         `pad_token_id` as input and IGNORED_TARGET as target
        documents:       int64 [batch, seq_len], needed if the sample's documents do not attend to
                         each other: gets the index of every input's document within its row

        Tokens are verified when this process reads them for the first time.

        Raises:
            InputError: they were altered, or are outside the vocabulary.
        """
        if self.attend_across_documents:
            documents = None
        elif documents is None:
            raise ValueError(f"{self.task} needs to know which document a token belongs to")
        try:
            self._samples.read(
                starts,
                self.samples_per_epoch,
                self.index_rows(numbers),
                rows,
                inputs,
                targets,
                pad_token_id,
                IGNORED_TARGET,
                documents,
            )
        except _builder.WrongTokensError as error:
            raise wrong_tokens(self.corpus, *error.args) from None

    def has_target(self, samples: int) -> bool:
        """Return whether any of the first `samples` samples in token order has a target."""
        if self._every_sample_has_a_target:
            return self.samples_per_epoch > 0
        starts = self.first_starts(min(samples, self.samples_per_epoch))
        first_row = np.zeros(1, np.int64)
        inputs, targets, documents = (np.empty((1, self.seq_len), np.int64) for _ in range(3))
        for number in range(len(starts)):
            self.read(starts, first_row + number, first_row, inputs, targets, 0, documents)
            if (targets != IGNORED_TARGET).any():
                return True
        return False
