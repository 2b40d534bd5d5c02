"""Pairs packed into samples, and their targets, compared with slow references in Python."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_support import (
    ReferenceStream,
    member_key,
    permutation,
    random_lengths,
    read_held_out,
    write_corpus,
)
from translation_support import (
    TAG,
    ExpectedRow,
    ReferencePackedStream,
    expected_row,
    packed,
    random_pairs,
    scored_from,
    write_pairs,
)

from megaphase.corpus import Corpus
from megaphase.plan import _builder
from megaphase.plan.packed_stream import PackedStream
from megaphase.plan.stream import Stream
from megaphase.utils.targets import IGNORED_TARGET

FILLER = 59_999
SEQ_LEN = 8
FRACTION = 0.2
HASHES = st.integers(0, 2**64 - 1)
ALL = (0, 2**64 - 1)
# Tags are frequent, so that documents have none, one or several of them at any place.
WORDS = st.just(TAG) | st.integers(4, 60_000)


@dataclass(frozen=True)
class InMemory:
    """Documents without a corpus."""

    documents: list[list[int]]
    hashes: list[int]

    def stream(
        self, read: tuple[int, int], key: int, seq_len: int, tag: int | None
    ) -> _builder.Stream:
        lengths = np.array([len(each) for each in self.documents], np.int32)
        tokens = np.array([token for each in self.documents for token in each], np.uint16)
        offsets = 2 * (np.cumsum(lengths, dtype=np.int64) - lengths)
        hashes = np.array(self.hashes, np.uint64)
        return _builder.Stream(tokens, offsets, lengths, hashes, *read, key, seq_len, tag)


@st.composite
def in_memory(draw) -> InMemory:
    documents = draw(st.lists(st.lists(WORDS, max_size=30), min_size=1, max_size=25))
    hashes = draw(st.lists(HASHES, min_size=len(documents), max_size=len(documents)))
    return InMemory(documents, hashes)


def walked(stream: _builder.Stream, epoch: int, unit: type, at_once: int) -> np.ndarray:
    walk, parts = stream.walk(epoch), []
    while not walk.at_end:
        starts = np.empty((at_once, 2), unit)
        parts.append(starts[: walk.fill(starts, at_once)])
    return np.concatenate(parts)


def read_rows(
    stream: _builder.Stream, starts: np.ndarray, seq_len: int, apart: bool
) -> list[ExpectedRow]:
    samples = len(starts)
    inputs, targets, documents = (np.full((samples, seq_len), -7) for _ in range(3))
    rows = np.arange(samples)
    stream.read(
        starts, max(samples, 1), rows, rows, inputs, targets, FILLER, IGNORED_TARGET,
        documents if apart else None,
    )  # fmt: skip
    assert apart or (documents == -7).all()
    return as_rows(inputs, targets, documents)


def as_rows(*arrays: np.ndarray) -> list[ExpectedRow]:
    return [ExpectedRow(*row) for row in zip(*(array.tolist() for array in arrays), strict=True)]


@settings(max_examples=300, deadline=None)
@given(
    in_memory(),
    st.tuples(HASHES, HASHES),
    HASHES,
    st.integers(1, 40),
    st.sampled_from([np.uint32, np.uint64]),
    st.integers(1, 9),
)
def test_any_pairs_are_packed_as_by_the_reference(corpus, read, key, seq_len, unit, at_once):
    stream = corpus.stream(read, key, seq_len, TAG)
    here = [read[0] <= each <= read[1] for each in corpus.hashes]
    lengths = [len(d) if on_side else 0 for d, on_side in zip(corpus.documents, here, strict=True)]
    order = permutation(len(lengths), member_key(key, 0))
    samples = packed(lengths, order, seq_len)
    starts = walked(stream, 0, unit, at_once)
    slots = {document: slot for slot, document in enumerate(order)}
    assert starts.tolist() == [[slots[s[0][0]], s[0][1]] for s in samples]
    for start, sample in zip(starts.tolist(), samples, strict=True):
        pieces = stream.pieces(0, *start)
        assert [(d, first, first + tokens) for d, first, tokens in pieces] == sample
    scored = [scored_from(each) for each in corpus.documents]
    expected = [expected_row(s, corpus.documents, seq_len, FILLER, scored) for s in samples]
    assert read_rows(stream, starts, seq_len, apart=True) == expected


@settings(max_examples=100, deadline=None)
@given(in_memory(), HASHES, st.integers(1, 40))
def test_every_document_that_fits_is_whole_and_in_one_sample(corpus, key, seq_len):
    stream = corpus.stream(ALL, key, seq_len, TAG)
    starts = walked(stream, 0, np.uint32, 7)
    samples = [stream.pieces(0, *start) for start in starts.tolist()]
    assert all(1 <= sum(tokens for _, _, tokens in each) <= seq_len + 1 for each in samples)
    seen = Counter(document for sample in samples for document, _, _ in sample)
    for number, document in enumerate(corpus.documents):
        if 0 < len(document) <= seq_len + 1:
            assert seen[number] == 1
        else:
            assert seen[number] == max(0, -(-(len(document) - 1) // seq_len))
    targets = Counter(
        token
        for row in read_rows(stream, starts, seq_len, apart=False)
        for token in row.targets
        if token != IGNORED_TARGET
    )
    after_tags = Counter(t for d in corpus.documents for t in d[scored_from(d) :])
    assert targets == after_tags


@settings(max_examples=100, deadline=None)
@given(in_memory(), HASHES, st.integers(1, 40))
def test_texts_that_do_not_see_each_other_are_the_same_samples(corpus, key, seq_len):
    """Their documents are numbered, and their first tokens are no targets; nothing else changes."""
    stream = corpus.stream(ALL, key, seq_len, None)
    if stream.totals()[1] < 2:
        return
    starts = walked(stream, 0, np.uint32, 7)
    together, apart = (read_rows(stream, starts, seq_len, each) for each in (False, True))
    for start, one, other in zip(starts.tolist(), together, apart, strict=True):
        sample = [(d, first, first + tokens) for d, first, tokens in stream.pieces(0, *start)]
        scored = [0] * len(corpus.documents)
        assert one.inputs == other.inputs
        assert (
            one.targets == expected_row(sample, corpus.documents, seq_len, FILLER, scored).targets
        )
        scored = [1] * len(corpus.documents)
        assert other == expected_row(sample, corpus.documents, seq_len, FILLER, scored)


@settings(max_examples=150, deadline=None)
@given(
    in_memory(),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=5),
    st.integers(-(2**40), 2**40) | st.integers(-9, 9),
    st.integers(0, 9),
)
def test_a_wrong_index_or_corpus_is_an_error_and_no_crash(corpus, starts, shift, lost):
    lengths = np.array([len(each) + lost % 3 for each in corpus.documents])
    tokens = np.array([token for each in corpus.documents for token in each], np.uint16)
    offsets = 2 * (np.cumsum(lengths) - lengths) + shift
    hashes = np.array(corpus.hashes, np.uint64)
    stream = _builder.Stream(tokens[lost:], offsets, lengths, hashes, *ALL, 1, 7, TAG)
    try:
        rows = read_rows(stream, np.array(starts, np.uint32), 7, apart=True)
    except IndexError:
        return
    assert len(rows) == len(starts)


def test_a_tag_that_no_token_can_be_is_refused():
    for tag in (-1, 2**16):
        with pytest.raises(ValueError, match="tag"):
            InMemory([[1, 2]], [1]).stream(ALL, 1, 8, tag)


def test_documents_must_have_the_shape_of_the_inputs():
    stream = InMemory([[1, 2]], [1]).stream(ALL, 1, 8, TAG)
    rows, arrays = np.zeros(1, np.int64), [np.zeros((1, 8), np.int64) for _ in range(2)]
    starts = np.zeros((1, 2), np.uint32)
    for wrong in (np.zeros((1, 7), np.int64), np.zeros(8, np.int64)):
        with pytest.raises(ValueError, match="documents"):
            stream.read(starts, 1, rows, rows, *arrays, FILLER, IGNORED_TARGET, wrong)


def make_stream(folder, *, held_out=False, pairs=60, longest=6, **settings):
    written = write_pairs(folder / "en-fr", random_pairs(pairs, longest, 5))
    stream = PackedStream(
        "en-fr",
        Corpus.open(folder / "en-fr"),
        seed=7,
        seq_len=SEQ_LEN,
        fraction=FRACTION,
        split="validation" if held_out else "training",
        tag=TAG,
        **{"attend_across_documents": False, **settings},
    )
    side = "held out" if held_out else "training"
    return stream, ReferencePackedStream("en-fr", written, SEQ_LEN, FRACTION, side=side)


def read_ordinals(stream: Stream, ordinals: range) -> list[ExpectedRow]:
    """Read samples as a plan does: from an index of the size given by `index_sizes`."""
    sizes = stream.index_sizes(ordinals.stop)
    walks = [stream.walk(epoch) for epoch in range(len(sizes))]
    starts = np.concatenate([_filled(walk, n) for walk, n in zip(walks, sizes, strict=True)])
    inputs, targets, documents = (np.zeros((len(ordinals), SEQ_LEN), np.int64) for _ in range(3))
    numbers = stream.in_token_order(np.array(ordinals))
    stream.read(starts, numbers, np.arange(len(ordinals)), inputs, targets, FILLER, documents)
    return as_rows(inputs, targets, documents)


def _filled(walk: _builder.StreamWalk, samples: int) -> np.ndarray:
    starts, done = np.empty((samples, 2), np.uint32), 0
    while done < samples:
        done += walk.fill(starts[done:], 1000)
    return starts


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("longest", [2, 6, 50])
def test_every_epoch_has_the_same_samples_in_another_order(tmp_path, held_out, longest):
    stream, reference = make_stream(tmp_path, held_out=held_out, longest=longest)
    samples = stream.samples_per_epoch
    assert samples == len(reference.in_token_order())
    assert stream.index_sizes(3 * samples) == [samples]
    assert stream.index_sizes(1) == [samples]
    assert stream.index_sizes(0) == []
    rows = read_ordinals(stream, range(3 * samples))
    epochs = [rows[i * samples : (i + 1) * samples] for i in range(3)]
    for epoch, found in enumerate(epochs):
        assert found == reference.rows(reference.epoch(epoch), FILLER)
    assert samples < 5 or epochs[0] != epochs[1] != epochs[2]


def test_what_sees_other_documents_has_the_same_samples_and_no_numbers(tmp_path):
    stream, _ = make_stream(tmp_path)
    ordinals = range(stream.samples_per_epoch)
    apart = read_ordinals(stream, ordinals)
    stream.attend_across_documents = True
    together = read_ordinals(stream, ordinals)
    assert all(not any(row.documents) for row in together)
    assert any(any(row.documents) for row in apart)
    assert [row.inputs for row in together] == [row.inputs for row in apart]
    assert [row.targets for row in together] == [row.targets for row in apart]


def test_held_out_samples_are_the_first_that_are_packed(tmp_path):
    stream, reference = make_stream(tmp_path, held_out=True)
    for samples in (1, 3, 10**6):
        batch = read_held_out(stream, 2, samples, FILLER)
        expected = reference.rows(reference.in_token_order()[:samples], FILLER)
        documents = batch.inputs * 0 if batch.documents is None else batch.documents
        assert as_rows(batch.inputs, batch.targets, documents) == expected
        assert set(batch.tasks.tolist()) == {2}


def test_a_stream_knows_whether_anything_of_it_is_scored(tmp_path):
    pairs, _ = make_stream(tmp_path)
    assert pairs.has_target(1)
    options = {"seed": 1, "seq_len": 8, "fraction": FRACTION}
    without_tags = PackedStream("x", pairs.corpus, **options, tag=FILLER)
    assert not without_tags.has_target(10**6)
    write_corpus(tmp_path / "ones", [1] * 30)
    texts = Corpus.open(tmp_path / "ones")
    assert Stream("x", texts, **options).has_target(1)
    assert not Stream("x", texts, **options, attend_across_documents=False).has_target(100)


def test_texts_keep_their_samples_where_they_do_not_see_each_other(tmp_path):
    written = write_corpus(tmp_path / "en", random_lengths(60, 30, 5))
    stream = Stream(
        "en",
        Corpus.open(tmp_path / "en"),
        seed=7,
        seq_len=SEQ_LEN,
        fraction=FRACTION,
        attend_across_documents=False,
    )
    expected = ReferenceStream("en", written, SEQ_LEN, FRACTION).first(stream.samples_per_epoch)
    rows = read_ordinals(stream, range(stream.samples_per_epoch))
    assert [row.inputs for row in rows] == [
        (sample + [FILLER] * SEQ_LEN)[:SEQ_LEN] for sample in expected
    ]
    firsts = {written.tokens(document)[0] for document in range(60)}
    for row, sample in zip(rows, expected, strict=True):
        kept = [IGNORED_TARGET if token in firsts else token for token in sample[1:]]
        assert row.targets == (kept + [IGNORED_TARGET] * SEQ_LEN)[:SEQ_LEN]
