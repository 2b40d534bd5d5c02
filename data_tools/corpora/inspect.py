"""Describe a corpus for people to read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megaphase.chats.marked_text import MARKS_EXPLAINED, marked_text
from megaphase.corpus import Corpus, Manifest
from megaphase.corpus.integrity import check_document, check_files
from megaphase.corpus.manifest import IDS_SUFFIX, SOURCES_SUFFIX
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError
from megaphase.utils.names import printable

# At most this many documents, evenly spaced, are read for the distribution of lengths.
_LENGTHS_READ = 1 << 20
_PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
_BAR_WIDTH = 40


def describe(prefix: Path) -> RenderableType:
    """Return tables of the corpus's statistics and of the distribution of document lengths.

    Raises InputError if the corpus cannot be opened or has been altered. The tokens of a large
    corpus are not read.
    """
    corpus = Corpus.open(prefix)
    check_files([corpus])
    lengths = corpus.lengths[:: -(-len(corpus.lengths) // _LENGTHS_READ)]
    return Group(
        _figures(corpus),
        Text("\ntokens per document"),
        _percentiles(lengths),
        Text(""),
        _histogram(lengths),
    )


def document_text(prefix: Path, tokenizer_dir: Path, index: int) -> tuple[str, str]:
    """Return the text of document `index` (from 0) and a description of its origin.

    Of a conversation, control tokens are shown, and what has a loss is put into marks.

    Raises InputError if there is no such document, it was altered, or the corpus was made with
    another tokenizer.
    """
    corpus = Corpus.open(prefix)
    tokenizer = Tokenizer.load(tokenizer_dir)
    if tokenizer.fingerprint != corpus.manifest.tokenizer_hash:
        raise InputError(
            prefix,
            f"was made with another tokenizer ({corpus.manifest.tokenizer_hash}) than "
            f"{tokenizer_dir} ({tokenizer.fingerprint})",
            "give the tokenizer it was made with",
        )
    documents = len(corpus.lengths)
    if not 0 <= index < documents:
        raise InputError(
            "--document", f"{prefix} has no document {index}", f"choose 0 to {documents - 1}"
        )
    origin = "its origin is not recorded"
    if corpus.origins is not None:
        own_id, source = corpus.origins[index]
        known = [f"id {printable(own_id)}"] if own_id is not None else []
        known += [f"from {source}"] if source is not None else []
        origin = ", ".join(known) or origin
    check_document(corpus, index)
    description = f"document {index:,}: {origin}"
    if corpus.targets is None:
        return tokenizer.decode(corpus.document(index)), description
    text = marked_text(tokenizer, corpus.document(index), corpus.targets_of(index))
    return text, f"{description}; {MARKS_EXPLAINED}"


def _figures(corpus: Corpus) -> Table:
    manifest = corpus.manifest
    # EOD tokens represent no text.
    text_tokens = manifest.tokens - manifest.documents
    disk_bytes = sum(file.bytes for file in manifest.files.values())
    left_out = [
        f"{number:,} {kind} left out"
        for number, kind in ((manifest.skipped_empty, "empty"), (manifest.skipped_wrong, "wrong"))
        if number
    ]
    skipped = f" ({', '.join(left_out)})" if left_out else ""
    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("corpus", str(corpus.prefix)),
        ("documents", f"{manifest.documents:,}{skipped}"),
        ("kind", _kind(manifest)),
        ("tokens", f"{manifest.tokens:,} as {manifest.dtype}"),
        *_targets(corpus),
        ("text", f"{manifest.text_bytes:,} bytes of UTF-8"),
        ("bytes per token", f"{manifest.text_bytes / max(text_tokens, 1):.3f} (without EOD)"),
        ("on disk", f"{disk_bytes:,} bytes"),
        ("vocabulary", f"{manifest.vocab_size:,}, EOD is {manifest.eod}"),
        ("tokenizer hash", manifest.tokenizer_hash),
        ("fingerprint", corpus.fingerprint),
        ("sources", ", ".join(manifest.sources)),
        ("origins", _origins(manifest)),
    ):
        table.add_row(Text(name, style="bold"), Text(value))
    return table


def _kind(manifest: Manifest) -> str:
    if manifest.kind == "chat":
        ends = "not recorded" if manifest.turn_end is None else f"token {manifest.turn_end}"
        return f"chat: conversations; end of a turn: {ends}"
    if manifest.kind == "translation":
        return f"translation: pairs, with the tag {manifest.tag}"
    return "lm: texts"


def _targets(corpus: Corpus) -> list[tuple[str, str]]:
    if corpus.targets is None:
        return []
    count = int(np.count_nonzero(corpus.targets))
    return [("targets", f"{count:,} tokens have a loss, {count / corpus.manifest.tokens:.1%}")]


def _origins(manifest: Manifest) -> str:
    if SOURCES_SUFFIX not in manifest.files:
        return "not recorded"
    return f"the file of each document, and {manifest.files[IDS_SUFFIX].bytes:,} bytes of ids"


def _percentiles(lengths: np.ndarray) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    names = {0: "least", 50: "median", 100: "most"}
    for percentile in _PERCENTILES:
        table.add_column(names.get(percentile, f"{percentile}%"), justify="right")
    table.add_column("mean", justify="right")
    values = np.percentile(lengths, _PERCENTILES, method="nearest")
    table.add_row(*(f"{int(value):,}" for value in values), f"{lengths.mean():,.1f}")
    return table


def _histogram(lengths: np.ndarray) -> Table:
    """Return the share of the documents whose length is in each power of two."""
    exponents = np.frexp(lengths.astype(np.float64))[1] - 1
    counts = np.bincount(exponents)
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(justify="right")
    table.add_column()
    table.add_column(justify="right")
    for exponent in range(int(exponents.min()), len(counts)):
        low, high = 1 << exponent, (2 << exponent) - 1
        bar = "█" * round(_BAR_WIDTH * counts[exponent] / counts.max())
        share = f"{100 * counts[exponent] / len(lengths):.1f}%"
        table.add_row(f"{low:,} to {high:,}" if high > low else "1", bar, share)
    return table
