"""The compiled builder on invented arrays, valid and invalid; also run under sanitizers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_support import member_key, permutation

from megaphase.plan import _builder

FILLER, IGNORED = -3, -100
HASHES = st.integers(0, 2**64 - 1)
RANGES = st.tuples(HASHES, HASHES)  # those whose last is below their first are empty
ALL = (0, 2**64 - 1)


def test_the_builder_under_test_is_the_one_that_was_asked_for():
    wanted = os.environ.get("MEGAPHASE_BUILDER")
    assert wanted is None or Path(_builder.__file__) == Path(wanted).resolve()


@dataclass(frozen=True)
class Arrays:
    """A corpus that exists only in memory: token i of all is i."""

    lengths: np.ndarray
    hashes: np.ndarray
    tokens: np.ndarray
    byte_offsets: np.ndarray

    def stream(self, hashes: tuple[int, int], key: int, seq_len: int) -> _builder.Stream:
        return _builder.Stream(
            self.tokens,
            self.byte_offsets,
            self.lengths,
            self.hashes,
            *hashes,
            key,
            seq_len,
        )


@st.composite
def arrays(draw) -> Arrays:
    lengths = draw(st.lists(st.integers(0, 30) | st.just(0), min_size=1, max_size=40))
    hashes = draw(st.lists(HASHES, min_size=len(lengths), max_size=len(lengths)))
    tokens = np.arange(sum(lengths), dtype=draw(st.sampled_from([np.uint16, np.int32])))
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return Arrays(
        np.array(lengths, draw(st.sampled_from([np.int32, np.int64]))),
        np.array(hashes, np.uint64),
        tokens,
        (starts * tokens.itemsize).astype(np.int64),
    )


def joined(corpus: Arrays, hashes: tuple[int, int], key: int, epoch: int) -> list[int]:
    """Return an epoch's tokens, one document after the other."""
    ends = np.cumsum(corpus.lengths)
    order = permutation(len(corpus.lengths), member_key(key, epoch))
    return [
        token
        for document in order
        if hashes[0] <= int(corpus.hashes[document]) <= hashes[1]
        for token in range(ends[document] - corpus.lengths[document], ends[document])
    ]


@settings(max_examples=150, deadline=None)
@given(
    arrays(),
    RANGES,
    HASHES,
    st.integers(1, 50),
    st.integers(0, 3),
    st.sampled_from([np.uint32, np.uint64]),
)
def test_any_corpus_is_cut_into_samples(corpus, hashes, key, seq_len, epoch, unit):
    stream = corpus.stream(hashes, key, seq_len)
    expected = joined(corpus, hashes, key, epoch)
    assert stream.totals()[1] == len(expected)
    samples = max(0, -(-(len(expected) - 1) // seq_len))
    walk = stream.walk(epoch)
    starts, done = np.zeros((samples, 2), unit), 0
    while done < samples:
        done += walk.fill(starts[done:], 3)
    inputs, targets = (np.zeros((samples, seq_len), np.int64) for _ in range(2))
    numbers = epoch * max(samples, 1) + np.arange(samples)
    index = np.zeros(((epoch + 1) * samples, 2), unit)
    index[epoch * samples :] = starts
    rows = np.arange(samples)
    stream.read(index, max(samples, 1), numbers, rows, inputs, targets, FILLER, IGNORED)
    for p in range(samples):
        sample = expected[p * seq_len : (p + 1) * seq_len + 1]
        missing = seq_len + 1 - len(sample)
        assert inputs[p].tolist() == (sample + [FILLER] * missing)[:seq_len]
        assert targets[p].tolist() == sample[1:] + [IGNORED] * missing
        pieces = stream.pieces(epoch, *(int(each) for each in starts[p]))
        assert sum(tokens for _, _, tokens in pieces) == len(sample)


ANY_INTEGER = st.integers(0, 60) | st.integers(0, 2**32 - 1)


@settings(max_examples=150, deadline=None)
@given(
    arrays(),
    st.lists(st.tuples(ANY_INTEGER, ANY_INTEGER), min_size=1, max_size=8),
    st.lists(st.integers(-2, 9), min_size=1, max_size=8),
    st.integers(-3, 12),
    st.integers(0, 2**62),
    st.integers(-(2**40), 2**40),
)
def test_a_wrong_index_or_corpus_is_an_error_and_no_crash(
    corpus, starts, numbers, row, lost, shift
):
    tokens = corpus.tokens[: max(0, len(corpus.tokens) - lost % 50)]
    offsets = corpus.byte_offsets + (shift if lost % 3 == 0 else 0)
    broken = Arrays(corpus.lengths - (lost % 2), corpus.hashes, tokens, offsets)
    stream = broken.stream((2**62, 2**64 - 1), 5, 7)
    inputs, targets = (np.zeros((8, 7), np.int64) for _ in range(2))
    index = np.array(starts, np.uint32)
    numbers_array = np.array(numbers, np.int64)
    rows = np.full(len(numbers), row, np.int64)
    try:
        stream.read(index, 3, numbers_array, rows, inputs, targets, FILLER, IGNORED)
    except (IndexError, ValueError):
        return
    assert 0 <= row < 8
    assert all(0 <= number < len(starts) for number in numbers)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 2**62), max_size=40),
    st.integers(0, 3000),
    st.sampled_from([1, 3, 64, 100, 1024]),
    st.booleans(),
)
def test_any_weights_make_a_blend_or_are_refused(weights, samples, block, random):
    make = (lambda w: _builder.RandomBlend(w, 7)) if random else _builder.DeadlineBlend
    if not 0 < sum(weights) <= 2**62:
        with pytest.raises(ValueError, match="weight"):
            make(weights)
        return
    blend = make(weights)
    tasks = np.zeros(samples, np.uint16)
    counts = np.zeros((-(-samples // block), len(weights)), np.int64)
    blend.fill(tasks, counts, block)
    assert blend.position == samples
    assert blend.counts == np.bincount(tasks, minlength=len(weights)).tolist()
    for first in {0, samples // 2, max(samples - 1, 0)}:
        ordinals = np.empty(samples - first, np.int64)
        _builder.phase_ordinals(tasks, counts, block, first, ordinals)
        for task, ordinal in zip(tasks[first:].tolist()[:3], ordinals.tolist(), strict=False):
            assert weights[task] > 0
            assert ordinal < blend.counts[task]


def test_arrays_of_wrong_shape_or_size_are_refused():
    lengths, hashes = np.ones(4, np.int32), np.zeros(4, np.uint64)
    tokens, offsets = np.zeros(4, np.uint16), np.arange(0, 8, 2)
    arguments = [tokens, offsets, lengths, hashes, *ALL, 1, 8]

    def with_(position: int, value: object) -> list:
        return [value if i == position else each for i, each in enumerate(arguments)]

    for position in (1, 2, 3):
        with pytest.raises(ValueError, match="differ in size"):
            _builder.Stream(*with_(position, arguments[position][:3]))
    with pytest.raises(ValueError, match="one dimension"):
        _builder.Stream(*with_(2, lengths.reshape(2, 2)))
    with pytest.raises(ValueError, match="seq_len"):
        _builder.Stream(*with_(7, 0))
    with pytest.raises(TypeError):
        _builder.Stream(*with_(0, tokens.astype(np.float32)))
    stream = _builder.Stream(*arguments)
    with pytest.raises(ValueError, match="starts is"):
        stream.walk(0).fill(np.zeros(4, np.uint32), 5)
    blend = _builder.DeadlineBlend([1, 2])
    with pytest.raises(ValueError, match="row for every block"):
        blend.fill(np.zeros(9, np.uint16), np.zeros((1, 2), np.int64), 8)
    with pytest.raises(ValueError, match="column for every task"):
        blend.fill(np.zeros(8, np.uint16), np.zeros((1, 3), np.int64), 8)
    tasks, counts = np.array([0, 5], np.uint16), np.zeros((1, 2), np.int64)
    with pytest.raises(ValueError, match="no column"):
        _builder.phase_ordinals(tasks, counts, 8, 0, np.zeros(2, np.int64))


def test_the_arrays_live_as_long_as_what_reads_them():
    lengths, hashes = np.full(100, 9, np.int32), np.zeros(100, np.uint64)
    tokens, offsets = np.arange(900, dtype=np.uint16), np.arange(0, 1800, 18)
    walk = _builder.Stream(tokens, offsets, lengths, hashes, *ALL, 1, 8).walk(0)
    del lengths, hashes, tokens, offsets
    trash = [np.full(100, 77, np.int64) for _ in range(50)]
    starts = np.zeros((113, 2), np.uint32)
    assert walk.fill(starts, 1000) == 0  # it first marks which are read
    assert walk.fill(starts, 1000) == 113
    assert (starts[:, 1] < 9).all()
    assert len(trash) == 50
