"""What an extended tokenizer has in common with the one that it extends."""

from __future__ import annotations

from megaphase.tokenizer.tokenizer import Tokenizer
from megaphase.utils.errors import InputError


def pieces_replaced(extended: Tokenizer, base: Tokenizer) -> list[list[int]]:
    """Return for each new token the base's ids that it replaces, in the order of the new ids, which
    begin at `extended.record.extends.vocab_size`.

    They are the ids with which the base encodes the new token's text where no other token crosses
    its ends: exact also for byte-level tokens that begin or end within a character, and for pieces
    that begin with a space (U+2581 in the vocabulary). No list is empty.

    Raises InputError if `extended` does not extend `base`.
    """
    extends = extended.record.extends
    if extends is None:
        remedy = "make it with `megaphase tokenizer extend`"
        raise InputError(extended.path, "does not extend another tokenizer", remedy)
    if extends.tokenizer_hash != base.fingerprint:
        problem = f"extends another tokenizer than {base.path}"
        remedy = f"extend that one: megaphase tokenizer extend {base.path}"
        raise InputError(extended.path, problem, remedy)
    new = range(extends.vocab_size, extended.vocab_size)
    return [base.encode_spelling(extended.spelling(token)) for token in new]
