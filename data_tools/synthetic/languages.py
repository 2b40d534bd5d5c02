"""Synthetic languages that share structure but not words, for `megaphase demo`.

One hidden grammar describes one hidden world (`synthetic.world`): concepts with Zipfian
frequencies, topics that last for a document, characters that recur in it, subjects that prefer
certain verbs. Adjectives, determiners, verbs, pronouns and relative pronouns agree with a noun,
also across a relative clause; "if" requires "then" one clause later. Each language has its own
words for the concepts (`synthetic.lexicon`), its own letters and one of a few word orders. Thus a
model can apply the structure that it learned from languages with much text to a language with
little.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megaphase.data_tools.synthetic.lexicon import Lexicon
from megaphase.data_tools.synthetic.world import (
    ADJECTIVES_PER_TOPIC,
    ADVERBS,
    DETERMINERS,
    NOUNS_PER_TOPIC,
    PREPOSITIONS,
    TENSES,
    TOPICS,
    VERBS_PER_TOPIC,
    Dice,
    World,
    Zipf,
)
from megaphase.utils.files import atomic_write_text, make_directory

DEFAULT_LANGUAGES = {"alda": 1_500_000, "boreth": 1_500_000, "cimri": 300_000, "dovan": 300_000}
"""Bytes of text in each language: two with much text, two with little."""

_CHARACTERS = 3
_SENTENCES = (3, 10)


def write_languages(
    out: Path, *, seed: int, languages: Mapping[str, int] = DEFAULT_LANGUAGES
) -> dict[str, Path]:
    """Write `out/NAME.jsonl` for each language and return the paths by name.

    Each line is an object with `id` and `text`. The files depend only on the arguments, and a
    language's file only on its own size and its position in `languages`.

    Args:
        out: a directory, created if it is missing; existing files are replaced.
        seed: determines the world, the words and the texts.
        languages: bytes of UTF-8 text for each language; the last document may exceed it.

    Raises InputError if the directory cannot be created.
    """
    make_directory(out)
    world = World.build(seed)
    paths = {}
    for number, (name, text_bytes) in enumerate(languages.items()):
        author = Author(world, Lexicon.invent(seed, name, number), Dice(seed, "text", name))
        rows = (
            json.dumps({"id": f"{name}-{i}", "text": text}, ensure_ascii=False) + "\n"
            for i, text in enumerate(author.documents(text_bytes))
        )
        paths[name] = out / f"{name}.jsonl"
        atomic_write_text(paths[name], "".join(rows))
    return paths


@dataclass(frozen=True)
class _Noun:
    """A noun as used in one document; `adjective` is the one that always describes it."""

    concept: int
    plural: bool
    adjective: int


@dataclass
class _Scene:
    """The state of one document; `subject` is the last subject, to which a pronoun may refer."""

    topic: int
    tense: int
    characters: list[_Noun]
    subject: _Noun


class Author:
    """Writes documents in one language."""

    def __init__(self, world: World, lexicon: Lexicon, dice: Dice) -> None:
        self._world = world
        self._words = lexicon
        self._dice = dice
        self._topics = Zipf(TOPICS)
        self._nouns = Zipf(NOUNS_PER_TOPIC)
        self._verbs = Zipf(VERBS_PER_TOPIC)
        self._adjectives = Zipf(ADJECTIVES_PER_TOPIC)
        self._adverbs = Zipf(ADVERBS)
        self._prepositions = Zipf(PREPOSITIONS)
        self._determiners = Zipf(DETERMINERS)

    def documents(self, text_bytes: int) -> Iterator[str]:
        """Yield documents until their UTF-8 text reaches `text_bytes` bytes."""
        written = 0
        while written < text_bytes:
            document = self.document()
            written += len(document.encode())
            yield document

    def document(self) -> str:
        """Return a title that names the first character, and a line of sentences."""
        topic = self._topics.draw(self._dice)
        characters = [self._noun(topic) for _ in range(_CHARACTERS)]
        tense = self._dice.below(TENSES)
        scene = _Scene(topic, tense, characters, subject=characters[0])
        title = " ".join(self._with_adjective(characters[0]))
        least, most = _SENTENCES
        sentences = (self._sentence(scene) for _ in range(least + self._dice.below(most - least)))
        return f"{title}\n{' '.join(sentences)}"

    def _noun(self, topic: int) -> _Noun:
        return _Noun(
            concept=topic * NOUNS_PER_TOPIC + self._nouns.draw(self._dice),
            plural=self._dice.chance(0.3),
            adjective=topic * ADJECTIVES_PER_TOPIC + self._adjectives.draw(self._dice),
        )

    def _sentence(self, scene: _Scene) -> str:
        if self._dice.chance(0.2):
            first, second = self._dice.choose(self._words.pairs)
            return f"{first} {self._clause(scene)}, {second} {self._clause(scene)}."
        return f"{self._clause(scene)}."

    def _clause(self, scene: _Scene) -> str:
        subject = self._subject(scene)
        verb, transitive = self._verb(scene)
        rest = self._phrase(self._any_noun(scene), scene) if transitive else []
        if self._dice.chance(0.3):
            rest = [*rest, *self._place(scene)]
        if self._dice.chance(0.25):
            rest = [*rest, self._words.adverbs[self._adverbs.draw(self._dice)]]
        words = [*subject, *rest, verb] if self._words.verb_last else [*subject, verb, *rest]
        return " ".join(words).replace(" ,", ",").rstrip(",")

    def _subject(self, scene: _Scene) -> list[str]:
        """Return a pronoun for the last subject, or a noun phrase that becomes the last subject."""
        if self._dice.chance(0.25):
            return [self._words.pronouns[self._agreement(scene.subject)]]
        scene.subject = self._any_noun(scene)
        phrase = self._phrase(scene.subject, scene)
        return phrase + self._relative_clause(scene) if self._dice.chance(0.2) else phrase

    def _any_noun(self, scene: _Scene) -> _Noun:
        if self._dice.chance(0.6):
            return self._dice.choose(scene.characters)
        elsewhere = self._dice.chance(0.2)
        return self._noun(self._topics.draw(self._dice) if elsewhere else scene.topic)

    def _verb(self, scene: _Scene) -> tuple[str, bool]:
        """Return a verb for the last subject, and whether it takes an object."""
        if self._dice.chance(0.6):
            concept = self._dice.choose(self._world.noun_verbs[scene.subject.concept])
        else:
            concept = scene.topic * VERBS_PER_TOPIC + self._verbs.draw(self._dice)
        endings = self._words.tense[scene.tense], self._agreeing(scene.subject)
        return self._words.verbs[concept] + "".join(endings), self._world.transitive[concept]

    def _relative_clause(self, scene: _Scene) -> list[str]:
        """Return a clause between the subject and the words that agree with it."""
        relative = self._words.relatives[self._agreement(scene.subject)]
        verb, transitive = self._verb(scene)
        rest = self._phrase(self._dice.choose(scene.characters), scene) if transitive else []
        words = [*rest, verb] if self._words.verb_last else [verb, *rest]
        return [",", relative, *words, ","]

    def _place(self, scene: _Scene) -> list[str]:
        preposition = self._words.prepositions[self._prepositions.draw(self._dice)]
        phrase = self._phrase(self._any_noun(scene), scene)
        return [*phrase, preposition] if self._words.verb_last else [preposition, *phrase]

    def _phrase(self, noun: _Noun, scene: _Scene) -> list[str]:
        adjective = self._dice.chance(0.5 if noun in scene.characters else 0.2)
        words = self._with_adjective(noun) if adjective else [self._noun_word(noun)]
        if self._dice.chance(0.6):
            stem = self._words.determiners[self._determiners.draw(self._dice)]
            return [stem + self._agreeing(noun), *words]
        return words

    def _with_adjective(self, noun: _Noun) -> list[str]:
        adjective = self._words.adjectives[noun.adjective] + self._agreeing(noun)
        if self._words.adjective_first:
            return [adjective, self._noun_word(noun)]
        return [self._noun_word(noun), adjective]

    def _noun_word(self, noun: _Noun) -> str:
        return self._words.nouns[noun.concept] + (self._words.plural if noun.plural else "")

    def _agreeing(self, noun: _Noun) -> str:
        return self._words.agreement[self._agreement(noun)]

    def _agreement(self, noun: _Noun) -> int:
        return 2 * self._world.noun_class[noun.concept] + noun.plural
