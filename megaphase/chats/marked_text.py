"""Tokens of conversations as text for people: with control tokens and marks of the targets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from megaphase.tokenizer import Tokenizer

BEGIN, END = "\u27e6", "\u27e7"  # mathematical white square brackets
MARKS_EXPLAINED = f"the loss is on what is between {BEGIN} and {END}"


def text_with_control_tokens(tokenizer: Tokenizer, tokens: Sequence[int] | np.ndarray) -> str:
    """Return the text of tokens, in which control tokens are spelled as in the vocabulary."""
    runs = groupby(map(int, tokens), key=lambda token: bool(tokenizer.spelling(token)))
    return "".join(
        tokenizer.decode(list(run)) if is_text else "".join(map(tokenizer.piece, run))
        for is_text, run in runs
    )


def marked_text(tokenizer: Tokenizer, tokens: np.ndarray, targets: np.ndarray) -> str:
    """Return the text of tokens [n] with control tokens, the targets of the loss between marks.

    targets: u8 [n], 1 where a token is a target.
    """
    parts = []
    for is_target, run in groupby(range(len(tokens)), key=lambda place: bool(targets[place])):
        text = text_with_control_tokens(tokenizer, tokens[list(run)])
        parts.append(f"{BEGIN}{text}{END}" if is_target else text)
    return "".join(parts)
