"""How well a vocabulary serves each language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from megaphase.tokenizer import Fertility, Tokenizer

# A language with so much less than the best one, or so many characters that the vocabulary lacks,
# learns and is generated at a multiple of the cost.
_BAD_SHARE_OF_BEST = 0.5
_BAD_SHARE_SPELLED = 0.05


def measure_fertility(tokenizer: Tokenizer, texts: Sequence[str], *, held_out: bool) -> Fertility:
    """How finely `texts` are cut."""
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
    """Languages with less than half the bytes a token of the best one, or with more than 5 % of
    the tokens spelling characters that the vocabulary lacks; the worst first."""
    best = max((it.bytes_per_token for it in languages.values()), default=0.0)
    return [
        name
        for name, fertility in _worst_first(languages)
        if fertility.bytes_per_token < _BAD_SHARE_OF_BEST * best
        or (fertility.spelled or 0.0) > _BAD_SHARE_SPELLED
    ]


def fertility_table(languages: Mapping[str, Fertility], *, given_text: bool = False) -> Table:
    """One row a language, the worst served first; `given_text` is neither of the training."""
    table = Table(title="How the vocabulary serves each language", title_justify="left")
    table.add_column("language")
    for column in ("bytes per token", "tokens per word", "spelled in bytes", "measured on"):
        table.add_column(column, justify="right")
    for language, fertility in _worst_first(languages):
        kind = "held-out text" if fertility.held_out else "training text"
        table.add_row(
            language,
            f"{fertility.bytes_per_token:.2f}",
            f"{fertility.tokens_per_word:.2f}",
            "" if fertility.spelled is None else f"{100 * fertility.spelled:.1f}%",
            f"{fertility.sample_bytes / 1000:,.0f} kB of {'text' if given_text else kind}",
        )
    return table


def _worst_first(languages: Mapping[str, Fertility]) -> list[tuple[str, Fertility]]:
    return sorted(languages.items(), key=lambda item: item[1].bytes_per_token)
