"""Conversations packed into samples, and their targets, compared with a slow reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_support import member_key, permutation
from translation_support import packed

from megaphase.plan import _builder
from megaphase.utils.targets import IGNORED_TARGET

FILLER = 59_999
DOCUMENT = st.lists(st.tuples(st.integers(4, 60_000), st.booleans()), min_size=1, max_size=30)


def expected_row(pieces, chats, seq_len, apart):
    """The inputs and targets of a sample of pieces (document, first token, last token)."""
    tokens, scored = [], []
    for document, first, last in pieces:
        for place in range(first, last):
            token, mark = chats[document][place]
            tokens.append(token)
            # The first token of a later part was the last target of the part before; the first of
            # a document has nothing to be predicted from, if documents are apart.
            unpreceded = place == first and (apart or place > 0)
            scored.append(mark and not unpreceded)
    blank = seq_len + 1 - len(tokens)
    inputs = (tokens + [FILLER] * blank)[:seq_len]
    targets = [t if s else IGNORED_TARGET for t, s in zip(tokens, scored, strict=True)][1:]
    return inputs, (targets + [IGNORED_TARGET] * (blank + 1))[:seq_len]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(DOCUMENT, min_size=1, max_size=20),
    st.integers(0, 2**64 - 1),
    st.integers(1, 40),
    st.booleans(),
)
def test_marked_tokens_alone_are_targets(chats, key, seq_len, apart):
    lengths = np.array([len(each) for each in chats], np.int32)
    tokens = np.array([token for each in chats for token, _ in each], np.uint16)
    marks = np.array([mark for each in chats for _, mark in each], np.uint8)
    offsets = 2 * (np.cumsum(lengths, dtype=np.int64) - lengths)
    hashes = np.arange(len(chats), dtype=np.uint64)
    stream = _builder.Stream(
        tokens, offsets, lengths, hashes, 0, 2**64 - 1, key, seq_len, is_target=marks
    )
    samples = packed(lengths.tolist(), permutation(len(chats), member_key(key, 0)), seq_len)
    starts, walk, found = np.empty((len(samples) + 1, 2), np.uint32), stream.walk(0), 0
    while not walk.at_end:
        found += walk.fill(starts[found:], 1 << 20)
    assert found == len(samples)
    rows = np.arange(len(samples))
    inputs, targets, documents = (np.zeros((len(samples), seq_len), np.int64) for _ in range(3))
    stream.read(
        starts[:-1], len(samples), rows, rows, inputs, targets, FILLER, IGNORED_TARGET,
        documents if apart else None,
    )  # fmt: skip
    for row, pieces in enumerate(samples):
        expected = expected_row(pieces, chats, seq_len, apart)
        assert (inputs[row].tolist(), targets[row].tolist()) == expected


def test_marks_of_another_size_are_refused():
    tokens = np.arange(6, dtype=np.uint16)
    arrays = (np.array([0, 6]), np.array([3, 3], np.int32), np.array([1, 2], np.uint64))
    with pytest.raises(ValueError, match="is_target has a mark for every token"):
        _builder.Stream(tokens, *arrays, 0, 9, 1, 4, is_target=np.ones(5, np.uint8))
    with pytest.raises(ValueError, match="pairs have a tag, chats have marks"):
        _builder.Stream(tokens, *arrays, 0, 9, 1, 4, tag=1, is_target=np.ones(6, np.uint8))
