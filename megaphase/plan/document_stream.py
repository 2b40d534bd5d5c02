"""A task's stream whose samples begin where documents begin; `cut: documents`.

Documents, in the order of epoch 0's keyed permutation, are packed into samples by best fit within
windows of PACKING_WINDOW documents: none is cut that fits into a sample, and a longer one is cut
into pieces that fill samples of their own, and a rest that is packed. All epochs have the same
samples, permuted in windows anew. Within an epoch that samples of another kind have begun, what is
left of it is packed in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from megaphase.plan.document_table import (
    PACKING_WINDOW,
    DocumentTable,
    PackedSource,
    Piece,
    pieces_of_parts,
)
from megaphase.plan.document_tables import table_bytes
from megaphase.plan.position import SampleKind
from megaphase.plan.remainder import Remainder
from megaphase.plan.stream import SAMPLE_WINDOW, Starts, Stream
from megaphase.plan.task_documents import DOCUMENTS_PER_CALL
from megaphase.utils.files import hash_json

FORMAT_VERSION = 1


class DocumentStream(Stream):
    """Samples of a task's whole documents; they are stored in tables, see DocumentTables."""

    @classmethod
    def of(cls, stream: Stream, seq_len: int) -> DocumentStream:
        """Return the stream of the same documents, cut where they begin."""
        other = cls.__new__(cls)
        other.__dict__ |= stream.at(seq_len).__dict__
        other.samples_per_epoch = other._samples_in_an_epoch()
        return other

    @property
    def kind(self) -> SampleKind:
        """The kind of its samples."""
        return SampleKind(self.seq_len, "documents")

    def _samples_in_an_epoch(self) -> int:
        source = self._source(None)
        [samples] = self.count(
            "samples of documents", lambda: [self.tables.samples(source)], source.fingerprint
        )
        return samples

    def table(self, rest: Remainder | None = None) -> DocumentTable:
        """Return the samples of an epoch, or of what is left of one.

        Raises as DocumentTables.table does.
        """
        return self.tables.table(self._source(rest))

    def _source(self, rest: Remainder | None) -> PackedSource:
        packed = _packing(self, self.seq_len)
        return PackedSource(
            hash_json(packed if rest is None else [*packed, rest.fingerprint]),
            f"documents of {self.task}",
            self.seq_len,
            self.bos is not None,
            self.start_dtype,
            self.tokens if rest is None else rest.positions,
            lambda: self._chunks(rest),
        )

    def _chunks(self, rest: Remainder | None) -> Iterator[np.ndarray]:
        """Yield the parts of the epoch's documents, or of what is left of it."""
        self.verify_once()
        if rest is not None and rest.table is not None:
            yield from rest.table.chunks(rest.firsts, rest.lasts)
            return
        epoch, ranges = 0, [(0, self.tokens)]
        if rest is not None:
            epoch = rest.epoch
            # Position p has target p + 1; the epoch's first token is a target of none.
            firsts = np.where(rest.firsts == 0, 0, rest.firsts + 1)
            ranges = list(zip(firsts.tolist(), (rest.lasts + 1).tolist(), strict=True))
        walk = self._samples.part_walk(epoch, ranges)
        while not walk.at_end:
            parts = np.empty((PACKING_WINDOW, 3), np.int64)
            yield parts[: walk.fill(parts, DOCUMENTS_PER_CALL)]

    def index_sizes(self, ordinals: int) -> list[int]:
        """Return no sizes: its samples are not in the plan's index."""
        return []

    def samples_within(self, epochs: Fraction) -> int:
        """Return the most samples of this length that do not exceed a fraction of an epoch."""
        return int(epochs * self.samples_per_epoch)

    def samples_left(self, rest: Remainder) -> int:
        """Return the number of samples into which what is left of an epoch is packed."""
        return self.tables.samples(self._source(rest)) if rest.positions else 0

    def rest_after(self, rest: Remainder, samples: int) -> Remainder:
        """Return what is left of the epoch that is reached after `samples` samples, the first of
        which come from `rest`."""
        left = self.samples_left(rest)
        if samples < left:
            return self._left(self.table(rest), rest, samples) if samples else rest
        epochs, used = divmod(samples - left, self.samples_per_epoch)
        if used == 0:
            return Remainder.nothing(rest.epoch + epochs)
        table = self.table()
        return self._left(table, Remainder.whole(rest.epoch + epochs + 1, table.end), used)

    def _left(self, table: DocumentTable, rest: Remainder, used: int) -> Remainder:
        """Return what is left after the first `used` samples of a table: those that are not yet
        drawn of their window, and everything after it."""
        end = min(-(-used // SAMPLE_WINDOW) * SAMPLE_WINDOW, table.samples)
        numbers = np.sort(self.numbers_in(rest, np.arange(used, end)))
        firsts = table.positions.at(np.append(numbers, end))
        lasts = np.append(table.positions.at(numbers + 1), table.end)
        left = Remainder.whole(rest.epoch, table.end).keep(
            firsts[firsts < lasts], lasts[firsts < lasts]
        )
        return left.of_table(table, rest.cuts + 1)

    def sample_pieces(
        self, starts: Starts, number: int, rest: Remainder | None = None
    ) -> list[list[Piece]]:
        """Return the pieces of a sample, each as a fragment; see Stream."""
        table = self.table(rest)
        parts, _ = table.of_samples(np.array([number % table.samples]))
        return pieces_of_parts(parts)

    def read(
        self,
        starts: Starts,
        numbers: np.ndarray,
        rows: np.ndarray,
        inputs: np.ndarray,
        targets: np.ndarray,
        pad_token_id: int,
        documents: np.ndarray | None = None,
    ) -> None:
        """Read the samples with these numbers over all epochs; see Stream."""
        table = self.table()
        parts, sizes = table.of_samples(numbers % table.samples)
        self._read_parts(parts, sizes, rows, inputs, targets, pad_token_id, documents)

    def read_rest(
        self,
        starts: Starts,
        rest: Remainder,
        numbers: np.ndarray,
        rows: np.ndarray,
        inputs: np.ndarray,
        targets: np.ndarray,
        pad_token_id: int,
        documents: np.ndarray | None = None,
    ) -> None:
        """Read the samples with these numbers in a remainder; see `read`."""
        parts, sizes = self.table(rest).of_samples(numbers)
        self._read_parts(parts, sizes, rows, inputs, targets, pad_token_id, documents)

    def padding(self, rest: Remainder, samples: int) -> float:
        """Return the share of positions without an input in `samples` samples after `rest`: that of
        what is left and of whole epochs on average, in proportion to their samples."""
        in_rest = min(self.samples_left(rest), samples)
        empty = 0.0
        for table, count in (
            (self.table(rest) if in_rest else None, in_rest),
            (self.table() if samples > in_rest else None, samples - in_rest),
        ):
            if table is not None:
                empty += count * (1 - table.filled / (table.samples * self.seq_len))
        return empty / max(1, samples)


def _packing(stream: Stream, seq_len: int) -> list[Any]:
    """Return what determines the table of an epoch's samples."""
    return [FORMAT_VERSION, PACKING_WINDOW, stream.fingerprint_at(seq_len), stream.bos]


def is_table_stored(stream: Stream, seq_len: int) -> bool:
    """Return whether the table of an epoch's samples need not be written."""
    return stream.tables.is_stored(hash_json(_packing(stream, seq_len)))


def most_table_bytes(stream: Stream, seq_len: int, cuts: int = 0) -> int:
    """Return at most how large the table of an epoch's samples is, or of what is left of an epoch
    whose documents are cut in `cuts` places."""
    parts = stream.documents + stream.tokens // seq_len + cuts
    # Of the samples of a window, all but one are more than half full: of two others, the parts of
    # the later one would have been added to the earlier one.
    windows = -(-parts // PACKING_WINDOW)
    samples = min(parts, 2 * stream.tokens // seq_len + windows)
    return table_bytes(parts, samples, stream.start_dtype)
