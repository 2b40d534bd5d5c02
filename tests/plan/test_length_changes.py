"""Streams whose samples change their length, compared with a reference that lists positions."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from length_changes import ReferenceDraws, ReferenceRows, Sample
from plan_support import Documents, ReferenceStream

from megaphase.corpus import Corpus
from megaphase.plan.position import SampleKind, StreamPosition
from megaphase.plan.stream import Stream
from megaphase.plan.stream_part import LocatedSample, StreamPart
from megaphase.plan.task_stream import TaskStream

FILLER = 59_999
BOS = 59_998
WINDOW = "megaphase.plan.stream.SAMPLE_WINDOW"

Segments = list[tuple[int, int]]  # seq_len and samples


def in_memory(lengths: list[int], **options: object) -> tuple[Stream, ReferenceStream]:
    """Return the stream of documents of which none is held out, and its reference."""
    ends, tokens = np.cumsum(lengths), np.arange(sum(lengths), dtype=np.uint16)
    hashes = np.full(len(lengths), 2**64 - 1, np.uint64)
    corpus = Corpus(
        prefix=Path("in-memory"),
        manifest=SimpleNamespace(vocab_size=60_000),  # type: ignore[arg-type]
        tokens=tokens,
        lengths=np.array(lengths, np.int32),
        byte_offsets=2 * (ends - lengths),
        hashes=hashes,
    )
    stream = Stream("x", corpus, seed=7, seq_len=3, fraction=0.5, **options)  # type: ignore[arg-type]
    documents = Documents(lengths, hashes.tolist(), 0)
    return stream, ReferenceStream("x", documents, 3, 0.5)


def index_of(stream: TaskStream, first: StreamPosition, last: StreamPosition) -> np.ndarray:
    """Return the index between two positions, with nonsense for the epochs before the first."""
    parts = []
    for epoch, size in enumerate(stream.index_sizes(first, last)):
        starts = np.full((size, 2), 2**31, np.uint32)
        walk, done = stream.walk(epoch), 0
        while done < size and epoch >= stream.first_indexed_epoch(first):
            done += walk.fill(starts[done:], 100)
        parts.append(starts)
    return np.concatenate(parts) if parts else np.zeros((0, 2), np.uint32)


def position(segments: Segments) -> StreamPosition:
    at = StreamPosition()
    for seq_len, samples in segments:
        at = at.after(SampleKind(seq_len), samples)
    return at


def read_rows(part: StreamPart, ordinals: np.ndarray, seq_len: int) -> list[tuple[list[int], ...]]:
    arrays = [np.full((len(ordinals), seq_len), -7) for _ in range(3)]
    rows = np.random.default_rng(len(ordinals)).permutation(len(ordinals))
    part.read(ordinals, rows, *arrays[:2], FILLER, arrays[2])
    return list(zip(*(array[rows].tolist() for array in arrays), strict=True))


LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=9).filter(lambda each: sum(each) > 3)
SEGMENTS = st.lists(
    st.tuples(st.sampled_from([1, 2, 3, 5, 8, 13]), st.integers(0, 25)), min_size=1, max_size=6
)


@st.composite
def phases_that_end_early(draw: st.DrawFn) -> tuple[Segments, list[int], int]:
    """Return the planned phases, the samples each really has, and how many are of another run."""
    planned = draw(SEGMENTS)
    actual = [draw(st.just(n) | st.integers(0, n)) for _, n in planned]
    before = draw(st.integers(0, len(planned) - 1))
    return (
        planned,
        [n if i < before else m for i, ((_, n), m) in enumerate(zip(planned, actual, strict=True))],
        before,
    )


@settings(max_examples=150, deadline=None)
@given(
    LENGTHS, phases_that_end_early(), st.integers(1, 6), st.booleans(), st.sampled_from([None, BOS])
)
@example([4, 9, 2, 7], ([(8, 1), (2, 3), (5, 1), (2, 40)], [1, 3, 1, 40], 0), 4, False, None)
@example([1, 2, 1, 1], ([(1, 0), (1, 1), (2, 2)], [0, 1, 2], 0), 3, False, BOS)
def test_samples_are_those_of_the_reference(lengths, phases, window, together, bos):
    planned, actual, before = phases
    stream, reference = in_memory(lengths, attend_across_documents=together, bos=bos)
    draws = ReferenceDraws(sum(lengths) - 1, window, reference)
    rows = ReferenceRows(reference, not together, bos)
    with patch(WINDOW, window):
        own = TaskStream(stream, [SampleKind(seq_len) for seq_len, _ in planned[before:]])
        first = position(planned[:before])
        index = index_of(own, first, position(planned))
        seen: Counter[tuple[int, int]] = Counter()
        for number, ((seq_len, _), samples) in enumerate(zip(planned, actual, strict=True)):
            expected = draws.draw(seq_len, samples)
            seen.update((epoch, p) for epoch, positions in expected for p in positions)
            if number < before:
                continue
            lengths_so_far = [(L, n) for (L, _), n in zip(planned[:number], actual, strict=False)]
            start, kind = position(lengths_so_far), SampleKind(seq_len)
            part = own.part(start, kind, index)
            ordinals = start.samples + np.arange(samples)
            found = read_rows(part, ordinals, seq_len)
            for ordinal, row, sample in zip(ordinals.tolist(), found, expected, strict=True):
                inputs, targets, documents = rows.row(sample, seq_len, FILLER)
                assert row[0] == inputs
                assert row[1] == targets
                if not together:
                    # No number comes back: equal ones attend to each other wherever they are.
                    assert row[2] == sorted(row[2])
                    assert document_starts(row[2]) == document_starts(documents)
                assert_located(part.locate(ordinal), rows, sample)
    # Every position of an epoch that is over is used exactly once, none of the last one twice.
    assert set(seen.values()) <= {1}
    epochs = Counter(epoch for epoch, _ in seen)
    assert all(epochs[epoch] == sum(lengths) - 1 for epoch in range(max(epochs, default=0)))


def document_starts(documents: list[int]) -> list[bool]:
    return [i == 0 or each != documents[i - 1] for i, each in enumerate(documents)]


def assert_located(at: LocatedSample, rows: ReferenceRows, sample: Sample) -> None:
    tokens, _ = rows.joined(sample[0])
    first_tokens = np.cumsum([0, *rows.stream.documents.lengths])
    found = [
        [int(first_tokens[document]) + first + i for document, first, n in pieces for i in range(n)]
        for pieces in at.fragments
    ]
    assert at.epoch == sample[0]
    assert 0 <= at.number < at.of
    assert [token for fragment in found for token in fragment[1:]] == [
        tokens[p + 1] for p in sample[1]
    ]
    assert [token for fragment in found for token in fragment[:-1]] == [
        tokens[p] for p in sample[1]
    ]


@settings(max_examples=100, deadline=None)
@given(LENGTHS, SEGMENTS, st.sampled_from([1, 2, 5, 13]), st.integers(0, 400), st.integers(1, 6))
@example(lengths=[17], segments=[(1, 0)], seq_len=5, hundredths=269, window=4)
@example(lengths=[1, 1, 1, 9, 20], segments=[(3, 12)], seq_len=13, hundredths=159, window=3)
def test_a_cap_counts_positions_of_the_corpus(lengths, segments, seq_len, hundredths, window):
    """A task has the samples left that reach the cap, to within one of them and what the shorter
    last sample of an epoch lacks, which may be among the last ones that are drawn."""
    stream, reference = in_memory(lengths)
    positions, cap = sum(lengths) - 1, Fraction(hundredths, 100)
    draws = ReferenceDraws(positions, window, reference)
    used = sum(len(p) for L, n in segments for _, p in draws.draw(L, n))
    with patch(WINDOW, window):
        own = TaskStream(stream, [SampleKind(L) for L, _ in segments])
        start = position(segments)
        assert own.epochs(start) == Fraction(used, positions)
        left = own.supply(SampleKind(seq_len), start).room(float(cap))
    more = sum(len(p) for _, p in draws.draw(seq_len, left))
    if used > cap * positions:
        assert left == 0
    else:
        assert abs(used + more - cap * positions) < seq_len + -positions % seq_len
