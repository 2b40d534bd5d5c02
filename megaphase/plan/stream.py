"""A task's stream: the endless sequence of its samples, addressed by ordinal.

Every epoch shuffles the documents (by a keyed permutation, without storing it), concatenates them
and splits the tokens into samples of seq_len + 1 tokens that share one token with their neighbours.
Within an epoch the samples are permuted again in windows, so that one long document does not fill
neighbouring batches. Epochs do not mix: an epoch's last sample may be shorter. Where the length of
samples changes within an epoch, those of the new length take what is left of it; see remainder.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from megaphase.corpus.integrity import wrong_tokens
from megaphase.plan import _builder
from megaphase.plan.document_table import DocumentTable, Piece, pieces_of_parts
from megaphase.plan.position import SampleKind
from megaphase.plan.remainder import Remainder
from megaphase.plan.task_documents import DOCUMENTS_PER_CALL, TaskDocuments
from megaphase.plan.verified_file import VerifiedArray, holding
from megaphase.utils.seeds import derive_key
from megaphase.utils.targets import IGNORED_TARGET

# Samples are permuted within windows of this size, so that a run that needs a hundredth of a huge
# epoch needs only an index of that hundredth (and at most one more window).
SAMPLE_WINDOW = 1 << 16

# The part of an index that belongs to a task, or starts that were computed just now.
Starts = np.ndarray | VerifiedArray


class Stream(TaskDocuments):
    """The documents of one task in a split as a sequence of samples.

    A sample has two numbers: the ordinal, by which training requests it, and the number in token
    order, by which the index stores it; both continue from epoch to epoch.
    """

    @property
    def kind(self) -> SampleKind:
        """The kind of its samples."""
        return SampleKind(self.seq_len)

    def _samples_in_an_epoch(self) -> int:
        return -(-self.positions // self.seq_len)

    def bytes_of_targets(self, starts: np.ndarray, token_bytes: np.ndarray) -> np.ndarray:
        """Return the bytes of text behind the targets of the samples of epoch 0 that begin there,
        float64 [samples, seq_len].

        A document's bytes are those of its text before normalization; they are shared among its
        tokens in proportion to the bytes of each. Positions past a sample's end get 0.

        starts: start_dtype [samples, 2]. token_bytes: int64 [vocabulary], the bytes of each token.
        """
        found = np.zeros((len(starts), self.seq_len))
        for row, (slot, offset) in enumerate(starts.tolist()):
            parts = [
                self._bytes_of_document(document, token_bytes)[first : first + tokens]
                for document, first, tokens in self.pieces(0, slot, offset)
            ]
            targets = np.concatenate(parts)[1:]
            found[row, : len(targets)] = targets
        return found

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

    def index_sizes_until(self, rest: Any, ahead: int) -> list[int]:
        """Return likewise those of an index that ends `ahead` positions after as many positions as
        were used of the epoch of which `rest` is left."""
        whole = [self.samples_per_epoch] * (rest.epoch + 1)
        if rest.positions:
            reached = min(self.positions - rest.positions + ahead, self.positions)
            whole[-1] = -(-reached // self.seq_len)
        return whole

    def samples_within(self, epochs: Fraction) -> int:
        """Return the most samples of this length that do not exceed a fraction of an epoch."""
        return int(epochs * self.positions / self.seq_len)

    def walk(self, epoch: int, like: _builder.StreamWalk | None = None) -> _builder.StreamWalk:
        """Return a walk through an epoch's samples in token order; `fill` writes their starts.

        like: an earlier walk through an epoch of the same documents, whose lengths it need not read
            again.
        """
        self.verify_once()
        return self._samples.walk(epoch, like)

    def first_starts(self, samples: int) -> np.ndarray:
        """Return slot and offset of epoch 0's first samples, in token order: [samples, 2]."""
        return self._next_starts(self.walk(0), samples)

    def starts_in_blocks(self, first: int, last: int, block: int) -> Iterator[np.ndarray]:
        """Yield slot and offset of epoch 0's samples [first, last) in token order, `block` of them
        at a time, so that memory does not depend on how many there are."""
        walk = self.walk(0)
        for begin in range(0, first, block):
            self._next_starts(walk, min(block, first - begin))
        for begin in range(first, last, block):
            yield self._next_starts(walk, min(block, last - begin))

    def _next_starts(self, walk: _builder.StreamWalk, samples: int) -> np.ndarray:
        starts, done = np.empty((samples, 2), self.start_dtype), 0
        while done < samples:
            done += walk.fill(starts[done:], DOCUMENTS_PER_CALL)
            if done < samples and walk.at_end:
                raise ValueError(f"an epoch of {self.task} has fewer samples")
        return starts

    def in_token_order(self, ordinals: np.ndarray) -> np.ndarray:
        """Convert ordinals to sample numbers in token order, int64 [n]."""
        return self._shuffled(ordinals, SAMPLE_WINDOW)

    def _shuffled(self, ordinals: np.ndarray, window: int) -> np.ndarray:
        return _builder.shuffle_samples(ordinals, self.samples_per_epoch, window, self._shuffle_key)

    def index_rows(self, numbers: np.ndarray) -> np.ndarray:
        """Return the rows of the index that store where these samples begin, int64 [n]."""
        return numbers

    def pieces(self, epoch: int, slot: int, offset: int) -> list[Piece]:
        """Return the pieces of the sample that begins there."""
        self.verify_once()
        return self._samples.pieces(epoch, slot, offset)

    def samples_left(self, rest: Any) -> int:
        """Return the number of samples of this length in what is left of an epoch."""
        positions: int = rest.positions
        return -(-positions // self.seq_len)

    def part_left(self, rest: Any) -> Fraction:
        """Return what is left of an epoch, in epochs."""
        # A table also has positions of the first tokens of documents that begin a sample.
        return Fraction(min(rest.positions, self.positions), max(1, self.positions))

    def nothing_left(self, epoch: int = -1) -> Any:
        """Return the remainder of an epoch that has been used up, by default that before all."""
        return Remainder.nothing(epoch)

    def _whole(self, epoch: int) -> Any:
        return Remainder.whole(epoch, self.positions)

    def rest_after(self, rest: Any, samples: int) -> Any:
        """Return what is left of the epoch that is reached after `samples` samples of this length,
        the first of which come from `rest`."""
        left = self.samples_left(rest)
        if samples < left:
            return self._unused(rest, samples) if samples else rest
        epochs, used = divmod(samples - left, self.samples_per_epoch)
        if used == 0:
            return self.nothing_left(rest.epoch + epochs)
        return self._unused(self._whole(rest.epoch + epochs + 1), used)

    def _unused(self, rest: Any, used: int) -> Any:
        """Return what is left after the first `used` samples of a remainder: those that are not yet
        drawn of their window, and everything after it."""
        end = min(-(-used // SAMPLE_WINDOW) * SAMPLE_WINDOW, self.samples_left(rest))
        firsts = np.sort(self.numbers_in(rest, np.arange(used, end))) * self.seq_len
        lasts = np.minimum(firsts + self.seq_len, rest.positions)
        if end * self.seq_len < rest.positions:
            firsts = np.append(firsts, end * self.seq_len)
            lasts = np.append(lasts, rest.positions)
        return rest.keep(firsts, lasts)

    def numbers_in(self, rest: Any, ordinals: np.ndarray) -> np.ndarray:
        """Convert ordinals within a remainder to sample numbers in token order there, int64 [n]."""
        if rest.cuts == 0:
            first: int = rest.epoch * self.samples_per_epoch
            return self.in_token_order(first + ordinals) - first
        return self._shuffled_in(rest, ordinals, SAMPLE_WINDOW)

    def _shuffled_in(self, rest: Any, ordinals: np.ndarray, window: int) -> np.ndarray:
        key = derive_key(*self._shuffle, "rest", rest.epoch, rest.cuts)
        return _builder.shuffle_samples(ordinals, self.samples_left(rest), window, key)

    def _fragments(self, rest: Any, numbers: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return [row, epoch, first, last] of the fragments of some samples of a remainder, int64
        [fragments, 4]."""
        firsts = numbers * self.seq_len
        lasts = np.minimum(firsts + self.seq_len, rest.positions)
        of, first, last = rest.fragments(firsts, lasts)
        return np.stack([rows[of], np.full(len(of), rest.epoch), first, last], axis=1)

    def _whole_fragments(self, numbers: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return likewise those of samples with these numbers over all epochs: one each."""
        epochs, within = np.divmod(numbers, self.samples_per_epoch)
        firsts = within * self.seq_len
        lasts = np.minimum(firsts + self.seq_len, self.positions)
        return np.stack([rows, epochs, firsts, lasts], axis=1)

    def sample_pieces(
        self, starts: Starts, number: int, rest: Any | None = None
    ) -> list[list[Piece]]:
        """Return the pieces of every fragment of a sample.

        starts: as in `read`. number: over all epochs, or in `rest`, if given.
        """
        numbers, rows = np.array([number]), np.zeros(1, np.int64)
        if rest is not None and rest.table is not None:
            return pieces_of_parts(self._parts_of(rest.table, rest, numbers)[0])
        if rest is None:
            fragments = self._whole_fragments(numbers, rows)
        else:
            fragments = self._fragments(rest, numbers, rows)
        return [self._pieces_of_fragment(starts, *fragment) for _, *fragment in fragments.tolist()]

    def _pieces_of_fragment(self, starts: Starts, epoch: int, first: int, last: int) -> list[Piece]:
        row, skipped = divmod(first, self._grid)
        row += epoch * -(-self.positions // self._grid)
        slot, offset = holding(starts, np.array([row]))[row].tolist()
        self.verify_once()
        return self._samples.pieces_of_tokens(epoch, slot, offset + skipped, last - first + 1)

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
        """Read the samples with these numbers in token order into the given rows.

        starts:          start_dtype [indexed samples, 2], slot and offset of each start
        numbers, rows:   int64 [samples]
        inputs, targets: int64 [batch, seq_len]; positions past a sample's end get
                         `pad_token_id` as input and IGNORED_TARGET as target
        documents:       int64 [batch, seq_len], needed if the sample's documents do not attend to
                         each other: gets the index of every input's document within its row

        Tokens and the index are verified when this process reads them for the first time.

        Raises:
            InputError: they were altered, or tokens are outside the vocabulary.
        """
        if self._grid != self.seq_len:
            fragments = self._whole_fragments(numbers, rows)
            self._read_fragments(starts, fragments, inputs, targets, pad_token_id, documents)
            return
        index_rows = self.index_rows(numbers)
        self._verified(
            self._samples.read,
            holding(starts, index_rows),
            self.samples_per_epoch,
            index_rows,
            rows,
            inputs,
            targets,
            pad_token_id,
            IGNORED_TARGET,
            self._apart(documents),
        )

    def _verified(self, read: Callable[..., None], *arguments: Any) -> None:
        """Call one of the C++ reading functions; tokens that it finds altered are an InputError."""
        self.verify_once()
        try:
            read(*arguments)
        except _builder.WrongTokensError as error:
            raise wrong_tokens(self.corpus, *error.args) from None

    def read_rest(
        self,
        starts: Starts,
        rest: Any,
        numbers: np.ndarray,
        rows: np.ndarray,
        inputs: np.ndarray,
        targets: np.ndarray,
        pad_token_id: int,
        documents: np.ndarray | None = None,
    ) -> None:
        """Read the samples with these numbers in a remainder; see `read`."""
        if rest.table is not None:
            parts, sizes = self._parts_of(rest.table, rest, numbers)
            self._read_parts(parts, sizes, rows, inputs, targets, pad_token_id, documents)
            return
        fragments = self._fragments(rest, numbers, rows)
        self._read_fragments(starts, fragments, inputs, targets, pad_token_id, documents)

    def _parts_of(
        self, table: DocumentTable, rest: Remainder, numbers: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the parts of some samples of a remainder, and how many each has."""
        firsts = numbers * self.seq_len
        lasts = np.minimum(firsts + self.seq_len, rest.positions)
        return table.in_ranges(*rest.fragments(firsts, lasts), len(numbers))

    def _read_parts(
        self,
        parts: np.ndarray,
        sizes: np.ndarray,
        rows: np.ndarray,
        inputs: np.ndarray,
        targets: np.ndarray,
        pad_token_id: int,
        documents: np.ndarray | None,
    ) -> None:
        """Read samples that consist of parts of documents.

        parts: int64 [parts, 3], see document_table.py. sizes: int64 [samples], of their parts.
        """
        to = inputs, targets, pad_token_id, IGNORED_TARGET, self._apart(documents)
        self._verified(self._samples.read_parts, parts, sizes, rows, *to)

    def _read_fragments(
        self,
        starts: Starts,
        fragments: np.ndarray,
        inputs: np.ndarray,
        targets: np.ndarray,
        pad_token_id: int,
        documents: np.ndarray | None,
    ) -> None:
        starts_per_epoch = -(-self.positions // self._grid)
        _, epochs, firsts, _ = fragments.T
        self._verified(
            self._samples.read_fragments,
            holding(starts, epochs * starts_per_epoch + firsts // self._grid),
            starts_per_epoch,
            fragments,
            inputs,
            targets,
            pad_token_id,
            IGNORED_TARGET,
            self._apart(documents),
        )

    def has_target(self, samples: int) -> bool:
        """Return whether any of the first `samples` samples in token order has a target."""
        if self._every_sample_has_a_target:
            return self.samples_per_epoch > 0
        order = [self.fingerprint_at(self.seq_len), self.bos]
        [found] = self.count("has target", lambda: [self._has_target(samples)], order, samples)
        return bool(found)

    def _has_target(self, samples: int) -> bool:
        starts = self.first_starts(min(samples, self.samples_per_epoch))
        first_row = np.zeros(1, np.int64)
        inputs, targets, documents = (np.empty((1, self.seq_len), np.int64) for _ in range(3))
        for number in range(len(starts)):
            self.read(starts, first_row + number, first_row, inputs, targets, 0, documents)
            if (targets != IGNORED_TARGET).any():
                return True
        return False
