"""Sample the lines of each language on which a tokenizer is trained."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from zlib import crc32

from megaphase.data_tools.text import (
    InputPath,
    Reading,
    display_name,
    read_chunks,
    read_documents,
)
from megaphase.utils.errors import InputError
from megaphase.utils.progress import Advance

# sentencepiece drops longer sentences (4,192 bytes; a character has at most 4 bytes).
LONGEST_SENTENCE = 1024

# One sentence in this many is held out to measure how well the vocabulary serves the language.
_HELD_OUT_ONE_IN = 64
_EVALUATION_SENTENCES = 10_000


@dataclass
class Survey:
    """Counts over the text of one language.

    Attributes:
        characters: number of characters in the sentences for training.
        sentences: number of sentences for training.
        held_out: sentences held out from training, at most 10,000.
        first: the first sentences for training, at most 10,000.
    """

    characters: int = 0
    sentences: int = 0
    held_out: list[str] = field(default_factory=list)
    first: list[str] = field(default_factory=list)

    @property
    def evaluation_text(self) -> list[str]:
        """The held-out sentences or, if there are none, some that were trained on."""
        return self.held_out or self.first


def survey_language(
    language: str, files: Sequence[InputPath], reading: Reading, advance: Advance = lambda *_: None
) -> Survey:
    """Read all of a language's text once; raise InputError if it has none."""
    survey = Survey()
    for sentence, held_out in _sentences(files, reading, advance):
        if not held_out:
            survey.characters += len(sentence)
            survey.sentences += 1
        kept = survey.held_out if held_out else survey.first
        if len(kept) < _EVALUATION_SENTENCES:
            kept.append(sentence)
    if not survey.sentences:
        raise _no_text(language, files)
    return survey


def uses_per_sentence(
    surveys: Mapping[str, Survey], temperature: float, max_sentences: int
) -> dict[str, float]:
    """Return how often each language's sentences are used, on average.

    The languages' shares of the characters are smoothed: p ∝ n^(1/temperature). The sample has as
    many characters as the text, unless that would be more than `max_sentences` sentences.
    """
    total = sum(survey.characters for survey in surveys.values())
    smoothed = {name: survey.characters ** (1 / temperature) for name, survey in surveys.items()}
    scale = total / sum(smoothed.values())
    uses = {name: scale * smoothed[name] / survey.characters for name, survey in surveys.items()}
    sentences = sum(uses[name] * survey.sentences for name, survey in surveys.items())
    return {name: use * min(1.0, max_sentences / sentences) for name, use in uses.items()}


def sample_sentences(
    language: str, files: Sequence[InputPath], reading: Reading, uses: float, seed: int
) -> Iterator[str]:
    """Yield the training sentences in order, each floor(uses) times or, at random, once more."""
    # Python hashes a string seed in the same way on every platform.
    generator = random.Random(f"{seed} {language}")
    whole, rest = divmod(uses, 1.0)
    for sentence, held_out in _sentences(files, reading):
        if not held_out:
            for _ in range(int(whole) + (generator.random() < rest)):
                yield sentence


def first_sentences(language: str, files: Sequence[InputPath], reading: Reading) -> list[str]:
    """Return the first 10,000 sentences, for measuring; raise InputError if there are none."""
    sentences = (sentence for sentence, _ in _sentences(files, reading))
    first = list(islice(sentences, _EVALUATION_SENTENCES))
    if not first:
        raise _no_text(language, files)
    return first


def sentences_of(text: str) -> Iterator[str]:
    """Yield the lines of a text that are not blank, with long ones split."""
    for line in text.split("\n"):
        if line and not line.isspace():
            for start in range(0, len(line), LONGEST_SENTENCE):
                yield line[start : start + LONGEST_SENTENCE]


def _no_text(language: str, files: Sequence[InputPath]) -> InputError:
    names = ", ".join(map(display_name, files))
    return InputError(names, f"no text of {language!r}", "give files that hold text")


def _sentences(
    files: Sequence[InputPath], reading: Reading, advance: Advance = lambda *_: None
) -> Iterator[tuple[str, bool]]:
    """Yield each sentence, and whether it is held out; the first one never is."""
    is_first = True
    for chunk in chain.from_iterable(read_chunks(path, reading) for path in files):
        for document in read_documents(chunk, reading):
            assert isinstance(document, str)
            for sentence in sentences_of(document):
                held_out = crc32(sentence.encode()) % _HELD_OUT_ONE_IN == 0
                yield sentence, held_out and not is_first
                is_first = False
        advance(chunk.file_bytes, len(chunk.data))
