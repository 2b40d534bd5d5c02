"""The documents of one task that a stream reads: those of one split."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy
from typing import Any, Self

import numpy as np

from megaphase.corpus import Corpus
from megaphase.plan import _builder
from megaphase.plan.corpus_counts import CorpusCounts
from megaphase.plan.document_tables import DocumentTables
from megaphase.plan.split import Split, hashes_of_test_split, held_out_hashes, training_hashes
from megaphase.utils.files import hash_json
from megaphase.utils.seeds import derive_key

# Documents visited in one call, so that a call takes well under a second.
DOCUMENTS_PER_CALL = 1 << 21


class TaskDocuments:
    """The documents of one task in a split, and what streams of them have in common.

    Attributes:
        documents: number of documents that it reads.
        tokens: number of their tokens, EODs included.
        samples_per_epoch: number of samples of seq_len + 1 tokens; the last may be shorter.
        attend_across_documents: whether a sample's documents attend to each other.
        bos: the input from which a document's first token is predicted; None: the token before it.
        tables: of the documents packed into samples; used where samples begin with documents.
    """

    def __init__(
        self,
        task: str,
        corpus: Corpus,
        *,
        seed: int,
        seq_len: int,
        fraction: float,
        split: Split = "training",
        test_fraction: float = 0.0,
        subsample: float = 1.0,
        tag: int | None = None,
        attend_across_documents: bool = True,
        bos: int | None = None,
        counts: CorpusCounts | None = None,
    ) -> None:
        """
        Args:
                fraction: the fraction of the documents that is held out for validation.
                split: of which to read the documents.
                test_fraction: the fraction of the documents in the test split.
                subsample: the fraction of the other documents that is trained on.
                tag: for a PackedStream only: the token between source and target.
                bos: the input from which a document's first token is predicted, instead of the EOD
                    of the document before it; the first document of an epoch has none.
                counts: numbers of corpora that are known already.
        """
        self.task = task
        self.corpus = corpus
        self._origin = {
            "task": task,
            "seed": seed,
            "held_out_fraction": fraction,
            "held_out": split == "validation",
            "tag": tag,
            "attend_across_documents": attend_across_documents,
        }
        if split == "validation":
            self._hashes = held_out_hashes(fraction)
        elif split == "test":
            self._hashes = hashes_of_test_split(test_fraction)
        else:
            self._hashes = training_hashes(fraction, subsample, test_fraction)
            # Streams without them keep the fingerprints that they had before these keys existed.
            self._origin |= {"subsample": subsample} if subsample != 1 else {}
            self._origin |= {"test_fraction": test_fraction} if test_fraction else {}
        self.seq_len = self._grid = seq_len
        self.attend_across_documents = attend_across_documents
        self.bos = bos
        self.tables = DocumentTables()
        is_target = corpus.targets
        # Streams of other kinds keep the fingerprints that they had before there were chats.
        self._origin |= {} if is_target is None else {"kind": "chat"}
        self._every_sample_has_a_target = (
            attend_across_documents and tag is None and is_target is None
        )
        side = "held out" if split == "validation" else split
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
            None if is_target is None else np.asarray(is_target),
        )
        self._counts = counts
        self.documents, self.tokens = self.count("documents", lambda: [*self._samples.totals()])
        self.samples_per_epoch = self._samples_in_an_epoch()
        self._shuffle = seed, "samples", side, task
        self._shuffle_key = derive_key(*self._shuffle)
        self._of_lengths: dict[tuple[int, int], Any] = {(seq_len, seq_len): self}

    def at(self, seq_len: int, grid: int | None = None) -> Self:
        """Return the stream of the same documents with samples of another length.

        grid: positions between two starts of the index from which it reads; seq_len by default.
        """
        grid = grid or seq_len
        known: Self | None = self._of_lengths.get((seq_len, grid))
        if known is not None:
            return known
        other = copy(self)
        other.seq_len, other._grid = seq_len, grid
        other._samples = self._samples.with_seq_len(grid)
        other.samples_per_epoch = other._samples_in_an_epoch()
        self._of_lengths[seq_len, grid] = other
        return other

    @property
    def positions(self) -> int:
        """The number of positions of an epoch: of tokens that are a target."""
        return max(0, self.tokens - 1)

    def _samples_in_an_epoch(self) -> int:
        raise NotImplementedError

    def fingerprint_at(self, seq_len: int) -> str:
        """Return a hash of everything that determines the sequence of samples of a length."""
        return hash_json(self._origin | {"seq_len": seq_len, "corpus": self.corpus.fingerprint})

    def count(
        self, what: str, count: Callable[[], Iterable[float]], *determining: object
    ) -> list[int]:
        """Return whole numbers that are determined by the corpus, the hashes of the documents, and
        some JSON values; `count` finds them if they are not known yet."""
        return [int(number) for number in self.figures(what, count, *determining)]

    def figures(
        self, what: str, count: Callable[[], Iterable[float]], *determining: object
    ) -> list[float]:
        """Return numbers that are determined likewise."""
        if self._counts is None:
            return [*count()]
        hashes = [self._hashes.first, self._hashes.last]
        key = [what, self.corpus.fingerprint, hashes, *determining]
        return self._counts.of(key, lambda: [*count()])

    def verify_once(self) -> None:
        """Verify the corpora, unless that has been done; before any document is visited."""
        if self._counts is not None:
            self._counts.verify_once()

    def text_bytes(self) -> int:
        """Return the size of its documents' UTF-8 text in bytes."""
        [total] = self.count("bytes of text", lambda: [self._sum_text_bytes()])
        return total

    def _sum_text_bytes(self) -> int:
        total, corpus = 0, self.corpus
        for first in range(0, len(corpus.hashes), DOCUMENTS_PER_CALL):
            here = slice(first, first + DOCUMENTS_PER_CALL)
            read = self._hashes.holds(np.asarray(corpus.hashes[here]))
            total += int(corpus.sums["text_bytes"][here][read].sum(dtype=np.int64))
        return total

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

    def _apart(self, documents: np.ndarray | None) -> np.ndarray | None:
        """Return where to write the documents of the inputs; None if they attend to each other."""
        if self.attend_across_documents:
            return None
        if documents is None:
            raise ValueError(f"{self.task} needs to know which document a token belongs to")
        return documents
