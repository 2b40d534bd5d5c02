"""The corpora of a run's tasks, checked, and their streams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from megaphase.config.run import RunConfig
from megaphase.corpus import Corpus
from megaphase.corpus.manifest import MANIFEST_SUFFIX, corpus_file
from megaphase.plan.corpus_counts import CorpusCounts
from megaphase.plan.packed_stream import PackedStream
from megaphase.plan.split import Split
from megaphase.plan.stream import Stream
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError

# Runs with different seeds are measured on the same samples, so they can be compared.
MEASURING_SEED = 0


def open_task_corpus(config: RunConfig, task: str, tokenizer: Tokenizer) -> Corpus:
    """Open a task's corpus, and check it as `check_task_corpus` does."""
    corpus = Corpus.open(config.corpus(task))
    check_task_corpus(config, task, tokenizer, corpus)
    return corpus


def check_task_corpus(config: RunConfig, task: str, tokenizer: Tokenizer, corpus: Corpus) -> None:
    """Reject a corpus of another kind or tokenizer than in the run file.

    Raises:
        InputError: it is.
    """
    if corpus.manifest.tokenizer_hash != tokenizer.fingerprint:
        raise InputError(
            config.where(f"tasks.{task}.corpus"),
            f"{corpus.prefix} was tokenized with another tokenizer than {config.tokenizer}",
            "tokenize it again with that one, or name the other one under tokenizer",
        )
    _check_kind(config, task, corpus)


def _check_kind(config: RunConfig, task: str, corpus: Corpus) -> None:
    """Reject a corpus of another kind than the task's."""
    asked, found = config.tasks[task].kind, corpus.manifest.kind
    if asked != found:
        holds = {"lm": "texts", "translation": "translation pairs", "chat": "chats"}[found]
        raise InputError(
            config.where(f"tasks.{task}.kind"),
            f"is {asked}, but {corpus.prefix} holds {holds}",
            f"write kind: {found}, or name another corpus",
        )
    if (found == "translation") != (corpus.manifest.tag is not None):
        raise InputError(
            corpus_file(corpus.prefix, MANIFEST_SUFFIX),
            f"tag: {corpus.manifest.tag} does not go with kind: {found}",
            "tokenize again",
        )


def bos_token(config: RunConfig, tokenizer: Tokenizer) -> int | None:
    """Return the token that `bos` puts at the start of documents; None if it puts none there.

    Raises:
        InputError: the tokenizer has no such token.
    """
    if not (tokenizer.adds_bos if config.bos is None else config.bos):
        return None
    if tokenizer.bos is None:
        raise InputError(
            config.where("bos"),
            f"is true, but {config.tokenizer} has no token that begins a document",
            "leave it out",
        )
    return tokenizer.bos


def open_streams(
    config: RunConfig,
    corpora: Mapping[str, Corpus],
    bos: int | None,
    split: Split,
    counts: CorpusCounts | None = None,
) -> dict[str, Stream]:
    """Return the streams of a split by task, without tasks that have no documents in it by the run
    file: those without a test split."""
    stream_classes = {"lm": Stream, "translation": PackedStream, "chat": PackedStream}
    return {
        task: stream_classes[config.tasks[task].kind](
            task,
            corpus,
            seed=config.seed if split == "training" else MEASURING_SEED,
            seq_len=config.model.seq_len,
            fraction=config.held_out_fraction(task),
            split=split,
            test_fraction=config.test_fraction(task),
            subsample=config.tasks[task].trained_on,
            tag=corpus.manifest.tag,
            attend_across_documents=config.tasks[task].attends_across_documents,
            # A packed sample begins with a document, for which it has no place.
            bos=bos if config.tasks[task].kind == "lm" else None,
            counts=counts,
        )
        for task, corpus in corpora.items()
        if split != "test" or config.test_fraction(task)
    }


def check_task(
    config: RunConfig,
    task: str,
    training: Stream,
    held_out: Stream,
    test: Stream | None,
    known: CorpusCounts,
) -> None:
    """Reject a corpus with a damaged index, or too small to train, validate or test on."""
    corpus = training.corpus
    [found] = known.of(
        ["tokens of all documents", corpus.fingerprint],
        lambda: [int(np.sum(corpus.lengths, dtype=np.int64))],
    )
    stated = corpus.manifest.tokens
    if found != stated:
        raise InputError(
            f"{corpus.prefix}.idx",
            f"its lengths sum to {found:,.0f} tokens, the manifest says {stated:,}",
            "tokenize again",
        )
    # With packing, a single document makes a sample.
    if not isinstance(training, PackedStream) and stated <= training.seq_len:
        raise InputError(
            config.where(f"tasks.{task}.corpus"),
            f"{corpus.prefix} has {stated:,} tokens, fewer than one sample of seq_len + 1 = "
            f"{training.seq_len + 1:,}",
            "add text or lower model.seq_len",
        )
    key, fraction = config.held_out_key(task), config.held_out_fraction(task)
    _check_measured(config.where(key), held_out, f"{fraction:g} holds out", "validation", config)
    if test is not None:
        key, fraction = config.test_key(task), config.test_fraction(task)
        taken = f"{fraction:g} takes for the test split"
        _check_measured(config.where(key), test, taken, "test", config)
    _check_training(config, task, training, held_out)


def _documents(stream: Stream) -> str:
    return f"of the {stream.corpus.manifest.documents:,} documents of {stream.corpus.prefix}"


def _check_measured(
    where: str, stream: Stream, taken: str, split: Literal["validation", "test"], config: RunConfig
) -> None:
    """Reject a fraction that leaves nothing to measure; `taken`: how it takes documents."""
    of_documents = _documents(stream)
    if stream.tokens < 2:
        raise InputError(where, f"{taken} none {of_documents}", "raise it")
    samples = config.validation.samples if split == "validation" else config.test.samples
    if not stream.has_target(samples):
        raise InputError(
            where,
            f"{taken} {stream.documents:,} {of_documents}, and none of the {split} samples has a "
            "target",
            "raise it, or tokenize again",
        )


def _check_training(config: RunConfig, task: str, training: Stream, held_out: Stream) -> None:
    """Reject a held-out fraction or a subsample that leaves too little to train on."""
    packed = isinstance(training, PackedStream)
    if training.tokens > (0 if packed else training.seq_len):
        return
    subsample, of_documents = config.tasks[task].subsample, _documents(training)
    if subsample is None:
        key, change = config.held_out_key(task), "lower it"
        fraction = config.held_out_fraction(task)
        taken = f"{fraction:g} holds out {held_out.documents:,} {of_documents}"
        if test := config.test_fraction(task):
            taken += f", {config.test_key(task)} takes {test:g} of them for the test split"
    else:
        key, change = f"tasks.{task}.subsample", "raise it"
        taken = f"{subsample:g} takes {training.documents:,} {of_documents}"
    if packed:
        left, remedy = "none is left to train on", f"{change} or add text"
    else:
        left = (
            f"the {training.tokens:,} tokens that are left are fewer than one sample of "
            f"seq_len + 1 = {training.seq_len + 1:,}"
        )
        remedy = f"{change}, add text or lower model.seq_len"
    raise InputError(config.where(key), f"{taken}, and {left}", remedy)
