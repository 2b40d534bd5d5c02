"""Streams compared with a slow reference: every token once per epoch, reshuffled, none held out."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_support import (
    Documents,
    ReferenceStream,
    build_plan,
    member_key,
    permutation,
    phase,
    random_lengths,
    read_held_out,
    spec_of,
    write_corpus,
    write_run,
)

from megaphase.corpus import Corpus
from megaphase.plan import _builder
from megaphase.plan.stream import Stream
from megaphase.plan.task_documents import DOCUMENTS_PER_CALL
from megaphase.utils.targets import IGNORED_TARGET

SEQ_LEN = 8
FRACTION = 0.2
FILLER = 59_999


def permute(size: int, key: int) -> list[int]:
    """Return the keyed permutation of range(size), through its only interface in Python."""
    return _builder.shuffle_samples(np.arange(size), size, size, key).tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_a_keyed_permutation_is_a_bijection(size, key):
    assert sorted(permute(size, key)) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 17, 1000, 4096])
def test_a_keyed_permutation_is_that_of_the_reference(size):
    for key in (0, 3, 12345, 2**64 - 1):
        assert permute(size, key) == permutation(size, member_key(member_key(key, 0), 0))


@pytest.mark.parametrize("size", [2**16, 2**16 + 1, 300_007])
def test_large_permutations_are_bijections_without_pattern(size):
    images = np.array(permute(size, 99))
    assert np.array_equal(np.sort(images), np.arange(size))
    # Neighbours are far apart, and nothing of the order is left (4 sigma).
    assert abs(np.corrcoef(np.arange(size), images)[0, 1]) < 4 / size**0.5
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 4 / size**0.5
    assert (np.abs(np.diff(images)) < 3).mean() < 20 / size


def test_permutations_differ_by_key():
    assert len({tuple(permute(50, key)) for key in range(500)}) == 500


@pytest.mark.parametrize("size", [2, 3, 4])
def test_small_permutations_are_all_about_as_likely(size):
    draws = 12_000
    found = Counter(tuple(permute(size, key)) for key in range(draws))
    orders = {2: 2, 3: 6, 4: 24}[size]
    assert len(found) == orders
    assert max(found.values()) < 1.25 * draws / orders
    assert min(found.values()) > 0.75 * draws / orders


@pytest.mark.parametrize("size", [7, 40])
def test_every_position_goes_everywhere(size):
    draws = 8000
    images = np.array([permute(size, key) for key in range(draws)])
    for position in range(size):
        counts = np.bincount(images[:, position], minlength=size)
        chi_square = ((counts - draws / size) ** 2 / (draws / size)).sum()
        assert chi_square < size + 5 * (2 * size) ** 0.5


def make_stream(
    folder: Path, *, held_out: bool = False, documents: int = 60, longest: int = 30, **corpus: int
) -> tuple[Stream, ReferenceStream]:
    written = write_corpus(folder / "en", random_lengths(documents, longest, 5), **corpus)
    stream = Stream(
        "en",
        Corpus.open(folder / "en"),
        seed=7,
        seq_len=SEQ_LEN,
        fraction=FRACTION,
        split="validation" if held_out else "training",
    )
    side = "held out" if held_out else "training"
    return stream, ReferenceStream("en", written, SEQ_LEN, FRACTION, side=side)


def starts_of(stream: Stream, epoch: int, samples: int) -> np.ndarray:
    starts = np.empty((samples, 2), stream.start_dtype)
    walk, done = stream.walk(epoch), 0
    while done < samples and not walk.at_end:
        done += walk.fill(starts[done:], DOCUMENTS_PER_CALL)
    assert done == samples
    return starts


def read_epoch(stream: Stream, epoch: int) -> list[list[int]]:
    """Return all samples of an epoch in token order, as inputs and the one target beyond them."""
    samples = stream.samples_per_epoch
    index = np.zeros(((epoch + 1) * samples, 2), stream.start_dtype)
    index[epoch * samples :] = starts_of(stream, epoch, samples)
    inputs, targets = (np.full((samples, stream.seq_len), -7) for _ in range(2))
    rows = np.arange(samples)
    stream.read(index, epoch * samples + rows, rows, inputs, targets, FILLER)
    return as_samples(inputs, targets)


def as_samples(inputs: np.ndarray, targets: np.ndarray) -> list[list[int]]:
    """Return rows of a batch as samples of tokens; check that targets are shifted inputs."""
    samples = []
    for row, shifted in zip(inputs.tolist(), targets.tolist(), strict=True):
        length = len(row) - shifted.count(IGNORED_TARGET)
        assert shifted[length:] == [IGNORED_TARGET] * (len(row) - length)
        assert row[length + 1 :] == [FILLER] * (len(row) - length - 1)
        assert row[1 : length + 1] == shifted[: length if length < len(row) else -1]
        samples.append([row[0], *shifted[:length]])
    return samples


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize(
    "corpus",
    [
        {},
        {"vocab_size": 70_000, "first_token": 66_000},
        {"longest": 3},
        {"longest": 300, "documents": 20},
        {"longest": 5, "documents": 1100},
    ],
    ids=["u16", "i32", "shorter than a sample", "longer than many samples", "many"],
)
def test_samples_are_those_of_the_reference(tmp_path, corpus, held_out):
    stream, reference = make_stream(tmp_path, held_out=held_out, **corpus)
    assert stream.corpus.tokens.dtype == ("<i4" if "vocab_size" in corpus else "<u2")
    for epoch in (0, 1, 5):
        expected = reference.in_token_order(epoch)
        assert stream.samples_per_epoch == len(expected)
        assert read_epoch(stream, epoch) == expected


def test_documents_of_several_sequences_have_64_bit_lengths(tmp_path):
    stream, reference = make_stream(tmp_path)
    corpus = dataclasses.replace(stream.corpus, lengths=stream.corpus.lengths.astype(np.int64))
    wide = Stream("en", corpus, seed=7, seq_len=SEQ_LEN, fraction=FRACTION)
    assert read_epoch(wide, 2) == reference.in_token_order(2)


def test_documents_whose_lengths_need_more_than_16_bits(tmp_path):
    lengths = random_lengths(40, 30, 5)
    lengths[3:8] = [65_534, 65_535, 65_536, 65_537, 200_000]
    written = write_corpus(tmp_path / "en", lengths, vocab_size=500_000)
    stream = Stream("en", Corpus.open(tmp_path / "en"), seed=7, seq_len=500, fraction=FRACTION)
    reference = ReferenceStream("en", written, 500, FRACTION)
    for epoch in range(2):
        assert read_epoch(stream, epoch) == reference.in_token_order(epoch)


def test_a_walk_like_another_is_the_same(tmp_path):
    stream, _ = make_stream(tmp_path / "a", documents=600)
    other, _ = make_stream(tmp_path / "b", documents=600, longest=7)
    walks = [stream.walk(0), other.walk(0), stream.walk(3)]
    starts = np.empty((5, 2), stream.start_dtype)
    for walk in walks[:2]:
        while not walk.fill(starts, 100):
            pass
    for like in walks:  # of this stream, of another, and of this one before it has the lengths
        walk, found = stream.walk(1, like), []
        while not walk.at_end:
            found += starts[: walk.fill(starts, DOCUMENTS_PER_CALL)].tolist()
        assert found == starts_of(stream, 1, stream.samples_per_epoch).tolist()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=15), st.integers(1, 12))
def test_every_token_is_an_input_and_a_target_once_an_epoch(lengths, seq_len):
    total = sum(lengths)
    ends = np.cumsum(lengths)
    tokens = np.arange(total, dtype=np.uint16)
    hashes = np.full(len(lengths), 2**64 - 1, np.uint64)
    corpus = Corpus(
        prefix=Path("in-memory"),
        manifest=SimpleNamespace(vocab_size=total),  # type: ignore[arg-type]
        tokens=tokens,
        lengths=np.array(lengths, np.int32),
        byte_offsets=2 * (ends - lengths),
        hashes=hashes,
    )
    stream = Stream("x", corpus, seed=1, seq_len=seq_len, fraction=0.5)
    assert stream.samples_per_epoch == -(-(total - 1) // seq_len)
    if total < 2:
        return
    samples = read_epoch(stream, 0)
    inputs = Counter(token for sample in samples for token in sample[:-1])
    targets = Counter(token for sample in samples for token in sample[1:])
    assert set(inputs.values()) == set(targets.values()) == {1}
    assert len(inputs) == len(targets) == total - 1
    assert inputs.keys() | targets.keys() == set(range(total))


def test_epochs_never_mix_and_are_shuffled_anew(tmp_path):
    stream, _ = make_stream(tmp_path)
    epochs = [read_epoch(stream, epoch) for epoch in range(3)]
    for samples in epochs:
        assert sum(len(sample) - 1 for sample in samples) == stream.tokens - 1
    assert epochs[0] != epochs[1] != epochs[2]


def test_held_out_documents_and_training_documents_share_nothing(tmp_path):
    stream, reference = make_stream(tmp_path, documents=500)
    held_out = Stream(
        "en", stream.corpus, seed=7, seq_len=SEQ_LEN, fraction=FRACTION, split="validation"
    )
    seen = [
        {token for sample in read_epoch(side, 0) for token in sample} for side in (stream, held_out)
    ]
    documents = reference.documents
    is_held_out = documents.held_out(FRACTION)
    assert 50 < sum(is_held_out) < 150
    for document, held in enumerate(is_held_out):
        tokens = set(documents.tokens(document))
        assert tokens <= seen[held]
        assert not tokens & seen[not held]
    assert stream.documents + held_out.documents == 500
    assert stream.tokens + held_out.tokens == sum(documents.lengths)


def test_what_is_held_out_depends_on_the_text_alone(tmp_path):
    """Not on the order of documents, the seed or the name of the task."""
    lengths = random_lengths(100, 20, 1)
    first = write_corpus(tmp_path / "a", lengths, seed=3)
    again = Documents(lengths, list(reversed(first.hashes)), 0)
    assert first.held_out(FRACTION) == list(reversed(again.held_out(FRACTION)))
    sides = [
        Stream(
            task,
            Corpus.open(tmp_path / "a"),
            seed=seed,
            seq_len=4,
            fraction=0.2,
            split="validation",
        )
        for task, seed in [("en", 1), ("hi", 2)]
    ]
    tokens = [{t for sample in read_epoch(side, 0) for t in sample} for side in sides]
    assert tokens[0] == tokens[1]


def test_held_out_batches_are_the_first_samples_of_the_side(tmp_path):
    stream, reference = make_stream(tmp_path, held_out=True)
    for samples in (1, 5, 10**6):
        batch = read_held_out(stream, 3, samples, FILLER)
        expected = reference.in_token_order(0)[:samples]
        assert as_samples(batch.inputs.numpy(), batch.targets.numpy()) == expected
        assert set(batch.tasks.tolist()) == {3}


def test_ordinals_shuffle_samples_within_windows(tmp_path, monkeypatch):
    monkeypatch.setattr("megaphase.plan.stream.SAMPLE_WINDOW", 16)
    stream, reference = make_stream(tmp_path)
    per_epoch = stream.samples_per_epoch
    assert per_epoch > 3 * 16
    numbers = stream.in_token_order(np.arange(3 * per_epoch))
    by_number = [read_epoch(stream, epoch) for epoch in range(3)]
    found = [by_number[n // per_epoch][n % per_epoch] for n in numbers.tolist()]
    windowed = dataclasses.replace(reference, window=16)
    assert found == windowed.first(3 * per_epoch)
    backwards = stream.in_token_order(np.arange(3 * per_epoch)[::-1].copy())
    assert np.array_equal(backwards, numbers[::-1])


def test_an_index_holds_whole_windows_of_the_last_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr("megaphase.plan.stream.SAMPLE_WINDOW", 16)
    stream, _ = make_stream(tmp_path)
    per_epoch = stream.samples_per_epoch
    assert stream.index_sizes(0) == []
    assert stream.index_sizes(1) == [16]
    assert stream.index_sizes(17) == [32]
    assert stream.index_sizes(per_epoch) == [per_epoch]
    assert stream.index_sizes(per_epoch + 16) == [per_epoch, 16]
    assert stream.index_sizes(3 * per_epoch - 1) == [per_epoch, per_epoch, per_epoch]


def test_streams_go_on_across_phases(tmp_path):
    written = {
        name: write_corpus(tmp_path / name, random_lengths(80, 30, seed), first_token=seed * 9000)
        for seed, name in enumerate(["en", "hi", "eu"])
    }
    phases = [
        phase("one", 20, {"rates": {"en": 0.9, "hi": 0.1}}),
        phase("two", 30, {"rates": {"en": 0.3, "hi": 0.3, "eu": 0.4}}),
        phase("three", 60, {"rates": {"en": 1.0}}),
    ]
    plan = build_plan(write_run(tmp_path, list(written), phases=phases))
    found: dict[int, list[list[int]]] = {0: [], 1: [], 2: []}
    ordinals: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for number, steps in enumerate((20, 30, 60)):
        samples = plan.samples(number, 0, steps * 4)
        inputs, targets = (np.empty((steps * 4, SEQ_LEN), np.int64) for _ in range(2))
        plan.read(samples, inputs, targets, FILLER)
        for task, ordinal, sample in zip(
            samples.tasks, samples.ordinals, as_samples(inputs, targets), strict=True
        ):
            ordinals[task].append(ordinal)
            found[task].append(sample)
    for task, (name, documents) in enumerate(written.items()):
        assert ordinals[task] == list(range(len(ordinals[task])))
        reference = ReferenceStream(name, documents, SEQ_LEN, FRACTION)
        assert found[task] == reference.first(len(found[task]))
    assert (
        len(found[0]) > spec_of(write_run(tmp_path, list(written))).streams["en"].samples_per_epoch
    )


def test_a_walk_in_small_steps_is_the_same(tmp_path):
    stream, _ = make_stream(tmp_path)
    whole = starts_of(stream, 1, stream.samples_per_epoch)
    for samples, documents in [(1, 1), (3, 1), (1000, 1), (7, 5), (1, 1000)]:
        walk, found = stream.walk(1), []
        while not walk.at_end:
            starts = np.empty((samples, 2), stream.start_dtype)
            found += starts[: walk.fill(starts, documents)].tolist()
        assert found == whole.tolist()
        assert walk.fill(np.empty((5, 2), stream.start_dtype), 5) == 0


def test_pieces_are_what_is_read(tmp_path):
    stream, _ = make_stream(tmp_path)
    starts = stream.first_starts(stream.samples_per_epoch)
    tokens, offsets = np.asarray(stream.corpus.tokens), np.asarray(stream.corpus.byte_offsets)
    joined = []
    for slot, offset in starts.tolist():
        sample = []
        for document, first, length in stream.pieces(0, slot, offset):
            assert stream.corpus.lengths[document] >= first + length > first
            begin = offsets[document] // tokens.itemsize + first
            sample += tokens[begin : begin + length].tolist()
        joined.append(sample)
    assert joined == read_epoch(stream, 0)


def test_reading_outside_of_a_corpus_is_refused(tmp_path):
    stream, _ = make_stream(tmp_path)
    inputs, targets = (np.zeros((1, SEQ_LEN), np.int64) for _ in range(2))

    def read(slot: int, offset: int, row: int = 0, number: int = 0) -> None:
        starts = np.array([[slot, offset]], np.uint32)
        stream.read(starts, np.array([number]), np.array([row]), inputs, targets, FILLER)

    with pytest.raises(IndexError, match="outside its epoch"):
        read(10**6, 0)
    with pytest.raises(IndexError, match="outside the index"):
        read(0, 0, number=1)
    with pytest.raises(IndexError, match="outside the index"):
        read(0, 0, number=-1)
    with pytest.raises(ValueError, match="out of range"):
        read(0, 0, row=1)
    tokens = np.asarray(stream.corpus.tokens)[:5]
    cut = dataclasses.replace(stream.corpus, tokens=tokens, blocks=None)
    stream = Stream("en", cut, seed=7, seq_len=SEQ_LEN, fraction=FRACTION)
    with pytest.raises(IndexError, match="outside the token file"):
        read(0, 0)
