"""Measure how well a vocabulary serves each language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from megaphase.tokenizer import Fertility, Tokenizer

# Bytes per token are not comparable across scripts: a letter of Hindi has three bytes, one of
# English has one. Words are comparable, unless a language puts no spaces between them.
_MOST_BYTES_OF_WORD = 40
# With a fertility this many times the best one's, training and generation cost a multiple.
_BAD_TIMES_BEST = 2.0
_BAD_SHARE_SPELLED = 0.05


def measure_fertility(tokenizer: Tokenizer, texts: Sequence[str], *, held_out: bool) -> Fertility:
    """Measure into how many tokens `texts` are split."""
    tokens = spelled = 0
    is_spelled = tokenizer.is_spelled()
    for ids in tokenizer.encode_arrays(texts):
        tokens += len(ids)
        spelled += int(is_spelled[ids].sum())
    sample_bytes = sum(len(text.encode()) for text in texts)
    words = sum(len(text.split()) for text in texts)
    return Fertility(
        bytes_per_token=sample_bytes / max(tokens, 1),
        tokens_per_word=tokens / max(words, 1),
        spelled=spelled / max(tokens, 1),
        sample_bytes=sample_bytes,
        held_out=held_out,
    )


def badly_served(languages: Mapping[str, Fertility]) -> list[str]:
    """Return the languages with more than twice the tokens per word of the best one, or with more
    than 5 % of the tokens spelling characters that the vocabulary lacks; the worst first."""
    with_words = [it.tokens_per_word for it in languages.values() if _has_words(it)]
    most = _BAD_TIMES_BEST * min(with_words, default=0.0)
    bad = [
        name
        for name, fertility in languages.items()
        if (_has_words(fertility) and fertility.tokens_per_word > most)
        or (fertility.spelled or 0.0) > _BAD_SHARE_SPELLED
    ]
    return sorted(bad, key=lambda name: -languages[name].tokens_per_word)


def fertility_table(languages: Mapping[str, Fertility], *, given_text: bool = False) -> Table:
    """Return a table with a row per language, the worst first; `given_text`: the user's text."""
    table = Table(title="How the vocabulary serves each language", title_justify="left")
    table.add_column("language")
    for column in ("bytes per token", "tokens per word", "spelled in bytes", "measured on"):
        table.add_column(column, justify="right")
    bad = badly_served(languages)
    others = sorted(languages.keys() - set(bad), key=lambda name: _tokens_per_word(languages[name]))
    for language in (*bad, *reversed(others)):
        fertility = languages[language]
        kind = "held-out text" if fertility.held_out else "training text"
        table.add_row(
            language,
            f"{fertility.bytes_per_token:.2f}",
            f"{fertility.tokens_per_word:.2f}" if _has_words(fertility) else "no spaces",
            "" if fertility.spelled is None else f"{100 * fertility.spelled:.1f}%",
            f"{fertility.sample_bytes / 1000:,.0f} kB of {'text' if given_text else kind}",
        )
    return table


def _tokens_per_word(fertility: Fertility) -> float:
    """Return the mean number of tokens per word; 0 if the language does not separate words."""
    return fertility.tokens_per_word if _has_words(fertility) else 0.0


def _has_words(fertility: Fertility) -> bool:
    """Return whether the language puts spaces between its words."""
    return fertility.bytes_per_token * fertility.tokens_per_word <= _MOST_BYTES_OF_WORD
