"""Compare the statistics of several corpora, for choosing a mixture."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from megaphase.corpus import Corpus, Manifest
from megaphase.data_tools.corpora.duplicates import find_duplicates
from megaphase.data_tools.corpora.verify import checked_batches, size_of
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError
from megaphase.utils.progress import reading_progress

_TEMPERATURE = 3.3  # of the example run file, as in mT5
_MOST_COMMON = 12


@dataclass(frozen=True)
class CorpusStats:
    """Statistics from a full reading of a corpus.

    Attributes:
        duplicates: number of documents that repeat an earlier one.
        median_length: median document length in tokens.
        token_counts: int64 [vocabulary], how often each token occurs.
    """

    manifest: Manifest
    duplicates: int
    median_length: int
    token_counts: np.ndarray

    @property
    def vocabulary_used(self) -> float:
        """The fraction of the vocabulary's tokens that occur."""
        return float(np.mean(self.token_counts > 0))


def corpus_stats(prefix: Path, console: Console | None = None) -> CorpusStats:
    """Read a corpus completely and verify it on the way.

    Memory grows with the longest document and the vocabulary, not with the corpus. Raises
    InputError if the corpus is damaged.
    """
    corpus = Corpus.open(prefix)
    tokens = np.zeros(corpus.manifest.vocab_size, dtype=np.int64)
    lengths = np.zeros(int(corpus.lengths.max()) + 1, dtype=np.int64)
    with reading_progress(console, f"reading {prefix.name}", size_of(corpus)) as advance:
        for batch in checked_batches(corpus, lambda size: advance(size, size)):
            tokens += np.bincount(batch.tokens, minlength=len(tokens))
            lengths += np.bincount(batch.lengths, minlength=len(lengths))
    middle = (corpus.manifest.documents + 1) // 2
    return CorpusStats(
        corpus.manifest,
        int(find_duplicates([corpus], _writable_folder(prefix.parent)).sum()),
        int(np.searchsorted(np.cumsum(lengths), middle)),
        tokens,
    )


def _writable_folder(folder: Path) -> Path:
    """The folder for files without a name: that of the corpus, which has room for such, or the
    system's where it may only be read."""
    return folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())


def tokenizer_of(prefixes: Sequence[Path], tokenizer_dir: Path) -> Tokenizer:
    """Return the tokenizer.

    Raises InputError if a corpus was made with another one.
    """
    tokenizer = Tokenizer.load(tokenizer_dir)
    for prefix in prefixes:
        manifest = Manifest.read(prefix)
        made_with = manifest.tokenizer_hash, manifest.vocab_size
        if made_with != (tokenizer.fingerprint, tokenizer.vocab_size):
            problem = f"was made with another tokenizer than {tokenizer_dir}"
            raise InputError(prefix, problem, "give the tokenizer it was made with")
    return tokenizer


def stats_tables(stats: Mapping[Path, CorpusStats], tokenizer: Tokenizer | None) -> RenderableType:
    """Return tables of the statistics, and of the most common tokens if their tokenizer is
    given."""
    parts: list[RenderableType] = [_sizes(stats), _language(stats)]
    if tokenizer is not None:
        parts.append(_common_tokens(stats, tokenizer))
    return Group(*parts)


def _sizes(stats: Mapping[Path, CorpusStats]) -> Table:
    columns = (
        "documents",
        "duplicates",
        "tokens",
        "share",
        f"at T = {_TEMPERATURE}",
        "per document",
    )
    table = _table("sizes, in tokens, and shares in a mixture", columns)
    tokens = np.array([figures.manifest.tokens for figures in stats.values()], dtype=np.float64)
    smoothed = tokens ** (1 / _TEMPERATURE)
    shares = zip(tokens / tokens.sum(), smoothed / smoothed.sum(), strict=True)
    for (prefix, figures), (share, smoothed_share) in zip(stats.items(), shares, strict=True):
        manifest = figures.manifest
        table.add_row(
            escape(str(prefix)),
            f"{manifest.documents:,}",
            f"{figures.duplicates / manifest.documents:.1%}",
            f"{manifest.tokens:,}",
            f"{share:.1%}",
            f"{smoothed_share:.1%}",
            f"{figures.median_length:,}",
        )
    return table


def _language(stats: Mapping[Path, CorpusStats]) -> Table:
    table = _table("how well the vocabulary fits the text", ("bytes per token", "vocabulary used"))
    for prefix, figures in stats.items():
        manifest = figures.manifest
        text_tokens = manifest.tokens - manifest.documents
        table.add_row(
            escape(str(prefix)),
            f"{manifest.text_bytes / max(text_tokens, 1):.2f}",
            f"{figures.vocabulary_used:.1%}",
        )
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("corpus", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _common_tokens(stats: Mapping[Path, CorpusStats], tokenizer: Tokenizer) -> Table:
    table = _table("tokens", ("single bytes",))
    table.add_column("the most common tokens", overflow="fold")
    is_spelled = tokenizer.is_spelled()
    for prefix, figures in stats.items():
        counts = figures.token_counts.copy()
        counts[tokenizer.eod] = 0
        common = np.argsort(-counts, kind="stable")[:_MOST_COMMON]
        table.add_row(
            escape(str(prefix)),
            f"{counts[is_spelled].sum() / max(counts.sum(), 1):.2%}",
            escape(" ".join(repr(tokenizer.piece(int(token))) for token in common)),
        )
    return table
