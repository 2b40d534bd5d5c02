"""Pairs of a translation task that are not trained on, as prompts and references."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megaphase.config.run import RunConfig
from megaphase.corpus import Corpus
from megaphase.corpus.integrity import check_document, check_files
from megaphase.plan.split import HashRange, hashes_of_test_split, held_out_hashes
from megaphase.plan.task_corpora import open_task_corpus
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError
from megaphase.utils.validation_errors import hint

_DOCUMENTS_AT_A_TIME = 1 << 20

PairsSplit = Literal["validation", "test"]


@dataclass(frozen=True)
class TranslationPair:
    """prompt: the tokens of the source and the tag, after which the model generates."""

    prompt: list[int]
    source: str
    reference: str


def held_out_pairs(
    config: RunConfig,
    task: str,
    tokenizer: Tokenizer,
    samples: int | None,
    split: PairsSplit = "validation",
) -> list[TranslationPair]:
    """Return pairs of a task that training never sees, those with the smallest hashes first.

    The hashes are those of the sources, so the choice depends neither on the seed nor on the order
    of the corpus.

    Args:
        samples: number of pairs; None: all of the split. May be more than there are.
        split: from which they are taken.

    Raises:
        InputError: there is no such task, it is not a translation task, its corpus is missing,
            damaged or made with another tokenizer, or nothing is held out, or in its test split.
    """
    if task not in config.tasks:
        raise InputError(
            config.where("tasks"), f"no task {task!r}", hint(task, config.tasks, "the tasks are")
        )
    if config.tasks[task].kind != "translation":
        raise InputError(
            config.where(f"tasks.{task}.kind"),
            f"is {config.tasks[task].kind}, not translation",
            hint("", translation_tasks(config), "the translation tasks are"),
        )
    corpus = open_task_corpus(config, task, tokenizer)
    check_files([corpus])
    if split == "test":
        key, fraction = config.test_key(task), config.test_fraction(task)
        hashes, taken = hashes_of_test_split(fraction), "takes for the test split"
        if not fraction:
            problem = f"is missing: {task} has no test split"
            raise InputError(config.where(key), problem, "add it, for a new run")
    else:
        key, fraction = config.held_out_key(task), config.held_out_fraction(task)
        hashes, taken = held_out_hashes(fraction), "holds out"
    documents = _lowest_documents(corpus, hashes, samples)
    if not len(documents):
        raise InputError(
            config.where(key),
            f"{fraction:g} {taken} none of the pairs of {corpus.prefix}",
            "raise it",
        )
    tag = corpus.manifest.tag
    assert tag is not None, "open_task_corpus has checked it"
    return [_pair(corpus, int(document), tag, tokenizer) for document in documents]


def translation_tasks(config: RunConfig) -> list[str]:
    """Return the run file's translation tasks in its order."""
    return [name for name, task in config.tasks.items() if task.kind == "translation"]


def _lowest_documents(corpus: Corpus, wanted: HashRange, samples: int | None) -> np.ndarray:
    """Return the indices of the wanted documents with the smallest hashes, in that order."""
    found = np.empty(0, np.int64)
    for first in range(0, len(corpus.hashes), _DOCUMENTS_AT_A_TIME):
        hashes = corpus.hashes[first : first + _DOCUMENTS_AT_A_TIME]
        found = np.append(found, first + np.flatnonzero(wanted.holds(hashes)))
        found = found[np.argsort(corpus.hashes[found], kind="stable")][:samples]
    return found


def _pair(corpus: Corpus, number: int, tag: int, tokenizer: Tokenizer) -> TranslationPair:
    check_document(corpus, number)
    document = corpus.document(number).tolist()
    if tag not in document:
        problem = f"document {number:,} has no tag between source and target"
        raise InputError(corpus.prefix, problem, "tokenize again")
    target = document.index(tag) + 1
    return TranslationPair(
        document[:target],
        tokenizer.decode(document[: target - 1]),
        tokenizer.decode(document[target:]),
    )
