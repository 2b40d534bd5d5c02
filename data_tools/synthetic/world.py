"""The hidden structure that all artificial languages share: concepts, topics, preferences."""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

Value = TypeVar("Value")

NOUN_CLASSES = 3
# What agrees with a noun has one form for each class and number: class * 2 + plural.
AGREEMENTS = 2 * NOUN_CLASSES
TOPICS = 24
NOUNS_PER_TOPIC = 12
VERBS_PER_TOPIC = 6
ADJECTIVES_PER_TOPIC = 5
# Words of every topic.
ADVERBS = 24
PREPOSITIONS = 8
DETERMINERS = 4
TENSES = 3

NOUNS = TOPICS * NOUNS_PER_TOPIC
VERBS = TOPICS * VERBS_PER_TOPIC
ADJECTIVES = TOPICS * ADJECTIVES_PER_TOPIC

_VERBS_OF_A_NOUN = 3


class Dice:
    """Random choices that are the same on every platform and for every version of Python.

    Only `random.random` is promised to stay as it is, so everything else is made from it.
    """

    def __init__(self, seed: int, *purpose: str) -> None:
        self.random = random.Random("/".join((str(seed), *purpose))).random

    def below(self, number: int) -> int:
        """A whole number from 0 to `number` - 1."""
        return int(self.random() * number)

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def choose(self, values: Sequence[Value]) -> Value:
        return values[self.below(len(values))]


class Zipf:
    """Numbers from 0 to `size` - 1, of which the k-th is drawn with a share ∝ 1 / (k + 1)."""

    def __init__(self, size: int) -> None:
        sums = list(accumulate(1 / (rank + 1) for rank in range(size)))
        self._bounds = [value / sums[-1] for value in sums[:-1]]

    def draw(self, dice: Dice) -> int:
        return bisect(self._bounds, dice.random())


@dataclass(frozen=True)
class World:
    """What is true of the concepts, whatever the language.

    Nouns, verbs and adjectives are numbered topic by topic, each topic's most frequent first.

    Attributes:
        noun_class: [NOUNS], with what adjectives, determiners, verbs and pronouns agree.
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
