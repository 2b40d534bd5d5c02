"""Continue the merges of a byte-pair encoding on words that are already cut into its pieces."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from heapq import heapify, heappop, heappush, heapreplace
from itertools import pairwise
from typing import NamedTuple

# A piece that occurs once is not learnt, as in the libraries.
_LEAST_COUNT = 2
_NONE = -1


class NewPiece(NamedTuple):
    """A learnt piece.

    Attributes:
        text: as in the vocabulary.
        pairs: the pairs of pieces that were merged into it, the most frequent first; none for a
            character.
    """

    text: str
    pairs: list[tuple[str, str]]


def learn_pieces(
    words: Mapping[tuple[str, ...], int], absent: Collection[str], taken: Collection[str]
) -> Iterator[NewPiece]:
    """Yield new pieces, each the one that saves most tokens given all earlier ones.

    A merge saves a token wherever it applies, a character that was absent from the vocabulary the
    tokens of its other bytes. The result depends only on the arguments.

    Args:
        words: words as sequences of pieces, and how often each occurs; no merge crosses their ends.
        absent: the pieces in `words` that are characters outside the vocabulary.
        taken: texts that must not become pieces.
    """
    yield from _Learner(words, absent, taken).pieces()


class _Learner:
    """Words as lists of symbol numbers, with the counts of all pairs of neighbours.

    Attributes:
        texts: the text of each symbol.
        is_absent: whether a symbol is a character that is not in the vocabulary yet.
        saved: the tokens that each possible new piece saves.
        places: the words that contain it, or did.
    """

    def __init__(
        self, words: Mapping[tuple[str, ...], int], absent: Collection[str], taken: Collection[str]
    ) -> None:
        self.taken = taken
        self.texts: list[str] = []
        self.numbers: dict[str, int] = {}
        self.is_absent: list[bool] = []
        self.joined: dict[tuple[int, int], int] = {}
        self.saved: dict[int, int] = defaultdict(int)
        self.places: dict[int, list[int]] = defaultdict(list)
        for text in sorted(absent):
            self.is_absent[self._number(text)] = True
        self.words = [[self._number(piece) for piece in word] for word in words]
        self.counts = list(words.values())
        self.learnt: set[int] = set()
        for place in range(len(self.words)):
            self._count_absent(place)
            self._count_pairs(place, self.words[place], self.counts[place])

    def pieces(self) -> Iterator[NewPiece]:
        heap = [(-saved, self.texts[number], number) for number, saved in self.saved.items()]
        heapify(heap)
        while heap:
            negative, text, number = heap[0]
            saved = self.saved[number]
            if saved != -negative:  # it has changed since it was put there
                heapreplace(heap, (-saved, text, number))
                continue
            heappop(heap)
            if saved < self._least_saved(number) or number in self.learnt:
                continue
            self.learnt.add(number)
            if self.is_absent[number]:
                self.is_absent[number] = False
                pairs: list[tuple[str, str]] = []
                grown = self._begin_to_merge(number)
            else:
                pairs, grown = self._merge(number)
            for other in grown:
                heappush(heap, (-self.saved[other], self.texts[other], other))
            yield NewPiece(text, pairs)

    def _number(self, text: str) -> int:
        number = self.numbers.get(text)
        if number is None:
            number = self.numbers[text] = len(self.texts)
            self.texts.append(text)
            self.is_absent.append(False)
        return number

    def _join(self, left: int, right: int) -> int:
        """Return the symbol into which two can be merged, or none."""
        result = self.joined.get((left, right))
        if result is None:
            if self.is_absent[left] or self.is_absent[right]:
                return _NONE
            text = self.texts[left] + self.texts[right]
            result = _NONE if text in self.taken else self._number(text)
            self.joined[left, right] = result
        return _NONE if result in self.learnt else result

    def _least_saved(self, number: int) -> int:
        return _LEAST_COUNT * (self._other_bytes(number) if self.is_absent[number] else 1)

    def _other_bytes(self, number: int) -> int:
        """Return the tokens that an absent character saves, at least one: it can be merged."""
        return max(len(self.texts[number].encode()) - 1, 1)

    def _count_absent(self, place: int) -> None:
        for number in self.words[place]:
            if self.is_absent[number]:
                self.saved[number] += self._other_bytes(number) * self.counts[place]
                self.places[number].append(place)

    def _count_pairs(self, place: int, word: list[int], count: int) -> set[int]:
        """Count a word's pairs; return their results."""
        results = set()
        for left, right in pairwise(word):
            result = self._join(left, right)
            if result != _NONE:
                self.saved[result] += count
                results.add(result)
        for result in results:
            self.places[result].append(place)
        return results

    def _uncount_pairs(self, word: list[int], count: int) -> None:
        for left, right in pairwise(word):
            result = self._join(left, right)
            if result != _NONE:
                self.saved[result] -= count

    def _begin_to_merge(self, number: int) -> set[int]:
        """Count the pairs of a character that was absent."""
        grown = set()
        for place in dict.fromkeys(self.places.pop(number)):
            word, count = self.words[place], self.counts[place]
            for left, right in pairwise(word):
                if number in (left, right):
                    result = self._join(left, right)
                    if result != _NONE:
                        self.saved[result] += count
                        self.places[result].append(place)
                        grown.add(result)
        return grown

    def _merge(self, number: int) -> tuple[list[tuple[str, str]], set[int]]:
        """Merge every pair with this result; return the pairs and the results that may have become
        more frequent."""
        pairs: dict[tuple[int, int], int] = defaultdict(int)
        grown: set[int] = set()
        for place in dict.fromkeys(self.places.pop(number)):
            word, count = self.words[place], self.counts[place]
            merged = []
            skip = False
            for left, right in zip(word, [*word[1:], _NONE], strict=True):
                if skip:
                    skip = False
                elif right != _NONE and self.joined.get((left, right)) == number:
                    merged.append(number)
                    pairs[left, right] += count
                    skip = True
                else:
                    merged.append(left)
            if len(merged) < len(word):
                self._uncount_pairs(word, count)
                self.words[place] = merged
                grown |= self._count_pairs(place, merged, count)
        ordered = sorted(pairs, key=lambda pair: (-pairs[pair], self.texts[pair[0]]))
        return [(self.texts[left], self.texts[right]) for left, right in ordered], grown
