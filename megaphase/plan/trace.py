"""Show the samples of a training step: the task, the epoch and the documents of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megaphase.chats.marked_text import MARKS_EXPLAINED, marked_text
from megaphase.corpus.integrity import check_document
from megaphase.corpus.origins import Origin
from megaphase.plan.plan import Plan, Starts
from megaphase.tokenizer import Tokenizer
from megaphase.utils.names import printable


@dataclass(frozen=True)
class TracedPiece:
    """Tokens [first, last) of a document; `document` is its index in its corpus."""

    document: int
    first: int
    last: int


@dataclass(frozen=True)
class TracedSample:
    """One row of a step's global batch.

    Attributes:
        ordinal: the sample's number in its task's stream, from the start of the run.
        epoch: epoch of the stream, from 0.
        number: index of the sample among the `of` samples of its epoch, in token order, from 0.
        pieces: the pieces of its seq_len + 1 tokens (fewer at an epoch's end, and if translation
            pairs leave room).
    """

    row: int
    task: str
    ordinal: int
    epoch: int
    number: int
    of: int
    pieces: list[TracedPiece]


def find_step(phase_steps: Sequence[int], step: int) -> tuple[int, int]:
    """Return the phase of a step and its number in that phase, given the phases' lengths.

    Steps count from 1 over all phases. Raises IndexError if there is no such step.
    """
    if step < 1:
        raise IndexError(step)
    before = 0
    for number, steps in enumerate(phase_steps):
        if step <= before + steps:
            return number, step - before
        before += steps
    raise IndexError(step)


def trace_step(
    plan: Plan, phase: int, phase_step: int, starts: Starts | None = None
) -> list[TracedSample]:
    """Return the samples of a step (from 1) of a phase, in the order of the global batch.

    For `starts` see Plan.samples.
    """
    batch, step = plan.spec.phases[phase].batch, phase_step - 1
    planned = plan.samples(phase, batch.samples_before(step), batch.samples_at(step), starts)
    traced = []
    for task, rows in planned.by_task():
        part, name = planned.start.part(task), plan.tasks[task]
        for row, ordinal in zip(rows.tolist(), planned.ordinals[rows].tolist(), strict=True):
            at = part.locate(ordinal)
            pieces = [
                TracedPiece(document, first, first + tokens)
                for fragment in at.fragments
                for document, first, tokens in fragment
            ]
            traced.append(TracedSample(row, name, ordinal, at.epoch, at.number, at.of, pieces))
    return sorted(traced, key=lambda sample: sample.row)


def sample_texts(plan: Plan, sample: TracedSample, tokenizer: Tokenizer) -> list[str]:
    """Return the text of every piece; a character that is cut at a piece's edge becomes U+FFFD.

    Source and target are separated by an arrow; of conversations, control tokens are shown, and
    what has a loss is put into marks. Raises InputError if a document was altered.
    """
    corpus = plan.spec.streams[sample.task].corpus
    texts = []
    for piece in sample.pieces:
        check_document(corpus, piece.document)
        tokens = corpus.document(piece.document)[piece.first : piece.last]
        if corpus.targets is not None:
            targets = corpus.targets_of(piece.document)[piece.first : piece.last]
            texts.append(marked_text(tokenizer, tokens, targets))
            continue
        sides = _source_and_target(tokens, corpus.manifest.tag)
        texts.append(" → ".join(tokenizer.decode(side) for side in sides))
    return texts


def _source_and_target(tokens: np.ndarray, tag: int | None) -> list[np.ndarray]:
    """Split tokens at the tag; return all of them if there is no tag."""
    if tag is None or tag not in tokens:
        return [tokens]
    boundary = int(np.argmax(tokens == tag))
    return [tokens[:boundary], tokens[boundary + 1 :]]


def sample_origins(plan: Plan, sample: TracedSample) -> list[Origin]:
    """Return the origin of the document of every piece, as far as its corpus records it."""
    origins = plan.spec.streams[sample.task].corpus.origins
    unknown = Origin(None, None)
    return [unknown if origins is None else origins[piece.document] for piece in sample.pieces]


def _origin_in_words(origin: Origin) -> str:
    return " in ".join(printable(each) for each in origin if each is not None)


def trace_table(plan: Plan, samples: list[TracedSample]) -> Table:
    """Return a table with one line per sample; documents as `number[first token:last token]`, with
    their ids and files if the corpora record them."""
    table = Table(box=box.SIMPLE, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("row", justify="right")
    table.add_column("task", overflow="fold")
    table.add_column("epoch", justify="right")
    table.add_column("sample", justify="right")
    table.add_column("documents [tokens]", overflow="fold")
    origins = [[_origin_in_words(o) for o in sample_origins(plan, sample)] for sample in samples]
    any_origin = any(map(any, origins))
    if any_origin:
        table.add_column("their ids in their files", overflow="fold")
    for sample, words in zip(samples, origins, strict=True):
        cells: list[str | Text] = [
            str(sample.row),
            Text(sample.task),
            str(sample.epoch),
            f"{sample.number:,} of {sample.of:,}",
            Text(" ".join(f"{p.document}[{p.first}:{p.last}]" for p in sample.pieces)),
        ]
        table.add_row(*cells, *([Text(", ".join(filter(None, words)))] if any_origin else []))
    return table


def print_texts(
    console: Console, plan: Plan, samples: list[TracedSample], tokenizer: Tokenizer
) -> None:
    """Print the text of the samples, document by document."""
    if any(plan.spec.streams[sample.task].corpus.targets is not None for sample in samples):
        console.print(f"Of conversations, {MARKS_EXPLAINED}.", style="cyan", markup=False)
    for sample in samples:
        console.print(
            f"\nrow {sample.row}: {sample.task}, epoch {sample.epoch}, "
            f"sample {sample.number:,} of {sample.of:,}",
            style="bold",
            markup=False,
        )
        texts = sample_texts(plan, sample, tokenizer)
        origins = sample_origins(plan, sample)
        for piece, origin, text in zip(sample.pieces, origins, texts, strict=True):
            words = f" ({_origin_in_words(origin)})" if any(origin) else ""
            heading = f"document {piece.document}{words}, tokens {piece.first} to {piece.last}:"
            console.print(heading, style="cyan", markup=False)
            console.print(text.strip("\n"), markup=False, soft_wrap=True)


def sample_as_json(
    sample: TracedSample, texts: list[str] | None, origins: list[Origin] | None = None
) -> dict[str, Any]:
    """Return a sample as JSON; `texts` and `origins`, if given, are those of its pieces."""
    documents: list[dict[str, Any]] = [
        {"document": piece.document, "first_token": piece.first, "last_token": piece.last}
        for piece in sample.pieces
    ]
    for document, origin in zip(documents, origins or [], strict=False):
        document |= {key: value for key, value in origin._asdict().items() if value is not None}
    for document, text in zip(documents, texts or [], strict=False):
        document["text"] = text
    return {
        "row": sample.row,
        "task": sample.task,
        "ordinal": sample.ordinal,
        "epoch": sample.epoch,
        "sample": sample.number,
        "samples_per_epoch": sample.of,
        "documents": documents,
    }
