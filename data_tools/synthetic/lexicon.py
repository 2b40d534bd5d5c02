"""The invented words of one synthetic language."""

from __future__ import annotations

from dataclasses import dataclass

from megaphase.data_tools.synthetic.world import (
    ADJECTIVES,
    ADVERBS,
    AGREEMENTS,
    DETERMINERS,
    NOUNS,
    PREPOSITIONS,
    TENSES,
    VERBS,
    Dice,
)

# Consonants and vowels. No letter is in two alphabets, so no two of the first four languages share
# a word.
_ALPHABETS = (
    ("bdfghjklmnprstvwz", "aeiou"),
    ("βγδζθκλμνξπρστφχψ", "αεηιουω"),
    ("бвгджзклмнпрстфхц", "аеиоуыэ"),
    ("բգդզթլխկհմնպռստրք", "աեէըիոու"),
)
_CONSONANTS_USED = 11
_VOWELS_USED = 4
# c stands for a consonant, v for a vowel.
_SYLLABLES = ("cv", "cv", "cv", "cvc", "v")
_ENDINGS = ("v", "vc")


@dataclass(frozen=True)
class Lexicon:
    """Stems and endings; a word is a stem and its endings.

    Attributes:
        verb_last: whether a verb follows its object, and a preposition its noun.
        adjective_first: whether an adjective precedes its noun.
        nouns, verbs, adjectives, adverbs, prepositions, determiners: one stem per concept.
        plural, tense, agreement: endings.
        pronouns, relatives: [AGREEMENTS], whole words.
        pairs: words that frame two clauses, such as "if" and "then"; the first requires the second.
    """

    verb_last: bool
    adjective_first: bool
    nouns: list[str]
    verbs: list[str]
    adjectives: list[str]
    adverbs: list[str]
    prepositions: list[str]
    determiners: list[str]
    plural: str
    tense: list[str]
    agreement: list[str]
    pronouns: list[str]
    relatives: list[str]
    pairs: list[tuple[str, str]]

    @classmethod
    def invent(cls, seed: int, name: str, number: int) -> Lexicon:
        """Invent the words of the language `name`, which has index `number` in its set."""
        inventor = _Inventor(Dice(seed, "lexicon", name), number)
        endings = inventor.words(1 + TENSES + AGREEMENTS, 1, _ENDINGS)
        opening, closing = inventor.words(3, 1), inventor.words(3, 1)
        return cls(
            verb_last=number % 2 == 1,
            adjective_first=number % 4 in (0, 3),
            determiners=inventor.words(DETERMINERS, 1),
            prepositions=inventor.words(PREPOSITIONS, 1),
            pronouns=inventor.words(AGREEMENTS, 1),
            relatives=inventor.words(AGREEMENTS, 1),
            pairs=list(zip(opening, closing, strict=True)),
            nouns=inventor.words(NOUNS, 2),
            verbs=inventor.words(VERBS, 2),
            adjectives=inventor.words(ADJECTIVES, 2),
            adverbs=inventor.words(ADVERBS, 2),
            plural=endings[0],
            tense=endings[1 : 1 + TENSES],
            agreement=endings[1 + TENSES :],
        )


class _Inventor:
    """Invents words of one phonology without repetition."""

    def __init__(self, dice: Dice, number: int) -> None:
        consonants, vowels = _ALPHABETS[number % len(_ALPHABETS)]
        self._dice = dice
        self._letters = {
            "c": self._some(consonants, _CONSONANTS_USED),
            "v": self._some(vowels, _VOWELS_USED),
        }
        self._taken: set[str] = set()

    def words(
        self, count: int, syllables: int, patterns: tuple[str, ...] = _SYLLABLES
    ) -> list[str]:
        return [self._new_word(syllables, patterns) for _ in range(count)]

    def _new_word(self, syllables: int, patterns: tuple[str, ...]) -> str:
        while True:
            pattern = "".join(self._dice.choose(patterns) for _ in range(syllables))
            word = "".join(self._dice.choose(self._letters[kind]) for kind in pattern)
            if word not in self._taken:
                self._taken.add(word)
                return word

    def _some(self, letters: str, count: int) -> str:
        chosen: list[str] = []
        while len(chosen) < count:
            letter = self._dice.choose(letters)
            if letter not in chosen:
                chosen.append(letter)
        return "".join(chosen)
