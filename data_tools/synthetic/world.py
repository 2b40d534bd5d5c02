"""The hidden structure that all synthetic languages share: concepts, topics, preferences."""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

Value = TypeVar("Value")

NOUN_CLASSES = 3
# Words that agree with a noun have one form for each class and number: class * 2 + plural.
AGREEMENTS = 2 * NOUN_CLASSES
TOPICS = 24
NOUNS_PER_TOPIC = 12
VERBS_PER_TOPIC = 6
ADJECTIVES_PER_TOPIC = 5
# Words used in every topic.
ADVERBS = 24
PREPOSITIONS = 8
DETERMINERS = 4
TENSES = 3

NOUNS = TOPICS * NOUNS_PER_TOPIC
VERBS = TOPICS * VERBS_PER_TOPIC
ADJECTIVES = TOPICS * ADJECTIVES_PER_TOPIC

_VERBS_OF_A_NOUN = 3


class Dice:
    """Random choices that are the same on every platform and in every version of Python.

    Python guarantees only `random.random` to be stable, so everything else is derived from it.
    """

    def __init__(self, seed: int, *purpose: str) -> None:
        self.random = random.Random("/".join((str(seed), *purpose))).random

    def below(self, number: int) -> int:
        """Return a whole number from 0 to `number` - 1."""
        return int(self.random() * number)

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def choose(self, values: Sequence[Value]) -> Value:
        return values[self.below(len(values))]


class Zipf:
    """Draws numbers from 0 to `size` - 1 with a probability of k proportional to 1 / (k + 1)."""

    def __init__(self, size: int) -> None:
        sums = list(accumulate(1 / (rank + 1) for rank in range(size)))
        self._bounds = [value / sums[-1] for value in sums[:-1]]

    def draw(self, dice: Dice) -> int:
        return bisect(self._bounds, dice.random())


@dataclass(frozen=True)
class World:
    """The facts about the concepts, which are independent of the language.

    Nouns, verbs and adjectives are numbered topic by topic, the most frequent of a topic first.

    Attributes:
        noun_class: [NOUNS], the class with which adjectives, determiners, verbs and pronouns agree.
        noun_verbs: [NOUNS], the verbs that a noun as subject prefers.
        transitive: [VERBS], whether a verb takes an object.
    """

    noun_class: list[int]
    noun_verbs: list[list[int]]
    transitive: list[bool]

    @classmethod
    def build(cls, seed: int) -> World:
        dice = Dice(seed, "world")
        noun_verbs = [
            [
                noun // NOUNS_PER_TOPIC * VERBS_PER_TOPIC + dice.below(VERBS_PER_TOPIC)
                for _ in range(_VERBS_OF_A_NOUN)
            ]
            for noun in range(NOUNS)
        ]
        return cls(
            noun_class=[dice.below(NOUN_CLASSES) for _ in range(NOUNS)],
            noun_verbs=noun_verbs,
            transitive=[dice.chance(0.6) for _ in range(VERBS)],
        )
