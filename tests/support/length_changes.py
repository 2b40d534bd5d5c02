"""A slow reference for streams whose samples change their length, which lists single positions.

It shares no code with the package: it is written from docs/plan.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from plan_support import ReferenceStream, derived_key, member_key, permutation
from translation_support import TAG, Pairs, Piece, ReferencePackedStream, packed

from megaphase.utils.targets import IGNORED_TARGET

Position = int  # of an input token in the epoch; its target is the next token
Sample = tuple[int, list[Position]]  # the epoch, and the positions of the sample


def drawn_in_windows(samples: list, key: int, window: int) -> list:
    """Return samples in the order in which they are drawn."""
    drawn = []
    for number, start in enumerate(range(0, len(samples), window)):
        part = samples[start : start + window]
        drawn += [part[i] for i in permutation(len(part), member_key(key, number))]
    return drawn


@dataclass
class ReferenceDraws:
    """Draws samples of changing lengths, one by one.

    positions: of an epoch. window: the samples that are permuted together.
    """

    positions: int
    window: int
    stream: ReferenceStream
    _epoch: int = -1
    _cuts: int = 0
    _ahead: list[list[Position]] = field(default_factory=list)
    _seq_len: int | None = None

    def draw(self, seq_len: int, samples: int) -> list[Sample]:
        """Return the next samples, of this length."""
        drawn: list[Sample] = []
        if samples and self._seq_len not in (None, seq_len):
            left = sorted(position for sample in self._ahead for position in sample)
            self._cuts += 1
            self._ahead = self._cut(left, seq_len)
        if samples:
            self._seq_len = seq_len
        for _ in range(samples):
            if not self._ahead:
                self._epoch, self._cuts = self._epoch + 1, 0
                self._ahead = self._cut(list(range(self.positions)), seq_len)
            drawn.append((self._epoch, self._ahead.pop(0)))
        return drawn

    def _cut(self, left: list[Position], seq_len: int) -> list[list[Position]]:
        samples = [left[start : start + seq_len] for start in range(0, len(left), seq_len)]
        origin = self.stream.seed, "samples", self.stream.side, self.stream.task
        if self._cuts == 0:
            key = member_key(derived_key(*origin), self._epoch)
        else:
            key = member_key(derived_key(*origin, "rest", self._epoch, self._cuts), 0)
        return drawn_in_windows(samples, key, self.window)


@dataclass(frozen=True)
class ReferenceRows:
    """Writes samples of positions as rows; tokens are looked up in the documents of an epoch.

    apart: whether documents do not attend to each other. bos: see Stream.
    """

    stream: ReferenceStream
    apart: bool
    bos: int | None
    _joined: dict[int, tuple[list[int], list[int]]] = field(default_factory=dict)

    def joined(self, epoch: int) -> tuple[list[int], list[int]]:
        """Return the tokens of an epoch, and the slot of every token's document."""
        if epoch not in self._joined:
            self._joined[epoch] = self._join(epoch)
        return self._joined[epoch]

    def _join(self, epoch: int) -> tuple[list[int], list[int]]:
        reference, documents = self.stream, self.stream.documents
        family = derived_key(reference.seed, "documents", reference.side, reference.task)
        order = permutation(len(documents.lengths), member_key(family, epoch))
        here = documents.on_side(reference.side, reference.fraction, reference.subsample)
        tokens: list[int] = []
        slots: list[int] = []
        for slot, document in enumerate(order):
            if here[document]:
                tokens += documents.tokens(document)
                slots += [slot] * documents.lengths[document]
        return tokens, slots

    def row(
        self, sample: Sample, seq_len: int, filler: int
    ) -> tuple[list[int], list[int], list[int]]:
        """Return inputs, targets and documents, [seq_len] each."""
        epoch, positions = sample
        tokens, slots = self.joined(epoch)
        inputs, targets, pieces = [], [], []
        document = -1
        for i, p in enumerate(positions):
            if i and positions[i - 1] != p - 1:
                # The fragment before may have ended with a number of its last target's document.
                document = pieces[-1] + 1
            elif i == 0 or slots[p] != slots[p - 1]:
                document += 1
            # A fragment's last target may be in a document of which no input is left.
            begins = slots[p + 1] != slots[p]
            inputs.append(self.bos if begins and self.bos is not None else tokens[p])
            targets.append(
                IGNORED_TARGET if self.apart and begins and self.bos is None else tokens[p + 1]
            )
            pieces.append(document + (begins and self.bos is not None))
        empty = seq_len - len(positions)
        begins_past_end = slots[positions[-1] + 1] != slots[positions[-1]]
        inputs += [filler] * empty
        if empty:
            inputs[len(positions)] = tokens[positions[-1] + 1]
        targets += [IGNORED_TARGET] * empty
        pieces += [pieces[-1] + (begins_past_end and self.bos is None)] * empty
        return [inputs, targets, pieces]


@dataclass
class ReferencePackedDraws:
    """Draws packed samples of changing lengths from translation pairs, one by one.

    A sample is a list of pieces; what is left of an epoch is a list of single predictions.
    """

    stream: ReferencePackedStream
    _epoch: int = -1
    _cuts: int = 0
    _ahead: list[list[Piece]] = field(default_factory=list)
    _seq_len: int | None = None

    def draw(self, seq_len: int, samples: int) -> list[tuple[int, list[Piece]]]:
        """Return the epoch and the pieces of the next samples of this length."""
        drawn: list[tuple[int, list[Piece]]] = []
        if samples and self._seq_len not in (None, seq_len) and self._ahead:
            left = {
                (document, place)
                for sample in self._ahead
                for document, first, last in sample
                for place in range(first, last - 1)
            }
            self._cuts += 1
            self._ahead = self._pack(left, seq_len)
        if samples:
            self._seq_len = seq_len
        for _ in range(samples):
            if not self._ahead:
                self._epoch, self._cuts = self._epoch + 1, 0
                everything = {
                    (document, place)
                    for document in self._order()
                    for place in range(len(self.stream.pairs.documents[document]) - 1)
                }
                self._ahead = self._pack(everything, seq_len)
            drawn.append((self._epoch, self._ahead.pop(0)))
        return drawn

    def _order(self) -> list[int]:
        reference = self.stream
        here = reference.pairs.on_side(reference.side, reference.fraction)
        family = derived_key(reference.seed, "documents", reference.side, reference.task)
        return [i for i in permutation(len(here), member_key(family, 0)) if here[i]]

    def _pack(self, left: set[tuple[int, int]], seq_len: int) -> list[list[Piece]]:
        pieces: list[Piece] = []
        for document in self._order():
            places = sorted(place for each, place in left if each == document)
            for place in places:
                if pieces and pieces[-1][0] == document and pieces[-1][2] == place + 1:
                    pieces[-1] = (document, pieces[-1][1], place + 2)
                else:
                    pieces.append((document, place, place + 2))
        lengths = [last - first for _, first, last in pieces]
        samples = [
            [(pieces[i][0], pieces[i][1] + first, pieces[i][1] + last) for i, first, last in sample]
            for sample in packed(lengths, list(range(len(pieces))), seq_len)
        ]
        origin = self.stream.seed, "samples", self.stream.side, self.stream.task
        if self._cuts == 0:
            key = member_key(derived_key(*origin), self._epoch)
        else:
            key = member_key(derived_key(*origin, "rest", self._epoch, self._cuts), 0)
        return [samples[i] for i in permutation(len(samples), member_key(key, 0))]


def packed_row(
    sample: list[Piece], pairs: Pairs, seq_len: int, filler: int
) -> tuple[list[int], list[int], list[int]]:
    """Return inputs, targets and documents of a sample of pieces of pairs, [seq_len] each."""
    inputs, targets, numbers = [], [], []
    for number, (document, first, last) in enumerate(sample):
        tokens = pairs.documents[document]
        for place in range(first, last):
            inputs.append(tokens[place])
            scored = place > first and place > tokens.index(TAG)
            targets.append(tokens[place] if scored else IGNORED_TARGET)
            numbers.append(number)
    empty = seq_len + 1 - len(inputs)
    return (
        (inputs + [filler] * empty)[:seq_len],
        (targets + [IGNORED_TARGET] * empty)[1:],
        (numbers + [numbers[-1]] * empty)[:seq_len],
    )
