"""Which lines of which language a tokenizer is trained on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megaphase.corpus.format import document_hash
from megaphase.data_tools.progress import Advance
from megaphase.data_tools.text_files import documents_of, read_chunks
from megaphase.errors import InputError

# sentencepiece drops longer sentences (4,192 bytes; a character has at most 4).
LONGEST_SENTENCE = 1024

# One document in so many is kept out, to measure how well the vocabulary serves the language.
_HELD_OUT_ONE_IN = 64
_EVALUATION_CHARACTERS = 1 << 20


@dataclass
class Survey:
    """The text of one language, counted.

    Attributes:
        characters: of the documents for training.
        sentences: how many `sentences_of` cuts them into.
        held_out: texts kept out of training, at most about a million characters.
        first: the first texts for training, at most as many characters.
    """

    characters: int = 0
    sentences: int = 0
    held_out: list[str] = field(default_factory=list)
    first: list[str] = field(default_factory=list)

    @property
    def evaluation_texts(self) -> list[str]:
        """The held-out texts, or, where there is none, texts that were trained on."""
        return self.held_out or self.first


def survey_language(
    language: str, files: Sequence[Path], json_key: str, advance: Advance
) -> Survey:
    """Read all of a language's text once; InputError where it has none."""
    survey = Survey()
    for path in files:
        for chunk in read_chunks(path):
            for text in documents_of(chunk, json_key):
                _count(survey, text)
            advance(chunk.file_bytes, len(chunk.data))
    if not survey.sentences:
        names = ", ".join(str(path) for path in files)
        raise InputError(names, f"no text of {language!r} to train on", "give files that hold text")
    return survey


def uses_per_sentence(
    surveys: Mapping[str, Survey], temperature: float, max_sentences: int
) -> dict[str, float]:
    """How often each language's sentences are used, on average.

    The languages' shares of the characters are smoothed: p ∝ n^(1/temperature). The whole sample
    has as many characters as the text, unless that is more than `max_sentences` sentences.
    """
    total = sum(survey.characters for survey in surveys.values())
    smoothed = {name: survey.characters ** (1 / temperature) for name, survey in surveys.items()}
    scale = total / sum(smoothed.values())
    uses = {name: scale * smoothed[name] / survey.characters for name, survey in surveys.items()}
    sentences = sum(uses[name] * survey.sentences for name, survey in surveys.items())
    return {name: use * min(1.0, max_sentences / sentences) for name, use in uses.items()}


def sample_sentences(
    language: str, files: Sequence[Path], json_key: str, uses: float, seed: int
) -> Iterator[str]:
    """The language's sentences in order, each used floor(uses) times or once more, by chance."""
    # Seeded by text, which Python hashes alike on every platform.
    generator = random.Random(f"{seed} {language}")
    whole, rest = divmod(uses, 1.0)
    for path in files:
        for chunk in read_chunks(path):
            for text in documents_of(chunk, json_key):
                if not _is_held_out(text):
                    for sentence in sentences_of(text):
                        for _ in range(int(whole) + (generator.random() < rest)):
                            yield sentence


def sentences_of(text: str) -> Iterator[str]:
    """The lines of a text that are not blank, long ones cut."""
    for line in text.split("\n"):
        if line and not line.isspace():
            for start in range(0, len(line), LONGEST_SENTENCE):
                yield line[start : start + LONGEST_SENTENCE]


def _count(survey: Survey, text: str) -> None:
    if _is_held_out(text):
        texts = survey.held_out
    else:
        survey.characters += len(text)
        survey.sentences += sum(1 for _ in sentences_of(text))
        texts = survey.first
    if text and sum(map(len, texts)) < _EVALUATION_CHARACTERS:
        texts.append(text)


def _is_held_out(text: str) -> bool:
    return int.from_bytes(document_hash(text.encode()), "little") % _HELD_OUT_ONE_IN == 0
