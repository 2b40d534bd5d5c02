"""Compare how an extended tokenizer and its base encode the same texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from rich.table import Table

from megaphase.data_tools.tokenizers.fertility import measure_fertility
from megaphase.tokenizer import Fertility, Tokenizer


class Comparison(NamedTuple):
    """Texts of one language, encoded by the base and by the extended tokenizer.

    Attributes:
        before, after: the fertility of each.
        texts: number of texts.
        same_texts: how many are encoded as before.
        same_tokens: share of the base's tokens that are the same at the same place.
        unexplained: how many texts are encoded otherwise though no new token occurs in them.
    """

    before: Fertility
    after: Fertility
    texts: int
    same_texts: int
    same_tokens: float
    unexplained: int


def compare(
    base: Tokenizer, extended: Tokenizer, texts: Sequence[str], *, held_out: bool
) -> Comparison:
    """Encode texts with both tokenizers."""
    pairs = list(zip(base.encode_arrays(texts), extended.encode_arrays(texts), strict=True))
    sizes = extended.token_bytes()
    same = [np.array_equal(old, new) for old, new in pairs]
    unexplained = [
        not equal and bool((new < base.vocab_size).all())
        for equal, (_, new) in zip(same, pairs, strict=True)
    ]
    kept = sum(
        len(old) if equal else _same_tokens(old, new, sizes)
        for equal, (old, new) in zip(same, pairs, strict=True)
    )
    return Comparison(
        before=measure_fertility(base, texts, held_out=held_out),
        after=measure_fertility(extended, texts, held_out=held_out),
        texts=len(texts),
        same_texts=sum(same),
        same_tokens=kept / max(sum(len(old) for old, _ in pairs), 1),
        unexplained=sum(unexplained),
    )


def comparison_table(languages: Mapping[str, Comparison]) -> Table:
    """Return a table with a row per language: before → after the extension."""
    table = Table(title="Each language before and after the extension", title_justify="left")
    table.add_column("language")
    for column in ("tokens per word", "bytes per token", "spelled in bytes"):
        table.add_column(column, justify="right")
    for column in ("texts as before", "tokens as before", "measured on"):
        table.add_column(column, justify="right")
    for language, it in languages.items():
        kind = "held-out text" if it.after.held_out else "training text"
        table.add_row(
            language,
            f"{it.before.tokens_per_word:.2f} → {it.after.tokens_per_word:.2f}",
            f"{it.before.bytes_per_token:.2f} → {it.after.bytes_per_token:.2f}",
            f"{_percent(it.before.spelled)} → {_percent(it.after.spelled)}",
            _percent(it.same_texts / it.texts),
            _percent(it.same_tokens),
            f"{it.after.sample_bytes / 1000:,.0f} kB of {kind}",
        )
    return table


def _same_tokens(old: np.ndarray, new: np.ndarray, sizes: np.ndarray) -> int:
    """Return how many tokens of `old` occur in `new` at the same place of the text."""
    places = [np.stack([np.cumsum(sizes[ids]), ids], axis=1) for ids in (old, new)]
    first, second = ({tuple(row) for row in each.tolist()} for each in places)
    return len(first & second)


def _percent(share: float | None) -> str:
    return f"{100 * (share or 0.0):.1f}%"
