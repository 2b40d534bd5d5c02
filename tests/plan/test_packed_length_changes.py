"""Packed pairs whose samples change their length, compared with a list of predictions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from length_changes import ReferencePackedDraws, packed_row
from translation_support import TAG, ReferencePackedStream, write_pairs

from megaphase.corpus import Corpus
from megaphase.plan.packed_stream import PackedStream
from megaphase.plan.position import SampleKind, StreamPosition
from megaphase.plan.task_stream import TaskStream

FILLER = 59_999

PAIRS = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=12)
SEGMENTS = st.lists(
    st.tuples(st.sampled_from([1, 2, 4, 7, 12, 20]), st.integers(0, 12)), min_size=1, max_size=6
)


def index_of(stream: TaskStream, last: StreamPosition) -> np.ndarray:
    parts = []
    for number, size in enumerate(stream.index_sizes(StreamPosition(), last)):
        starts = np.zeros((size, 2), np.uint32)
        walk, done = stream.walk(number), 0
        while done < size:
            done += walk.fill(starts[done:], 100)
        parts.append(starts)
    return np.concatenate(parts) if parts else np.zeros((0, 2), np.uint32)


@settings(max_examples=60, deadline=None)
@given(PAIRS, SEGMENTS, st.booleans(), st.integers(0, 5))
def test_samples_are_those_of_the_reference(lengths, segments, together, before):
    with TemporaryDirectory() as folder:
        pairs = write_pairs(Path(folder) / "x", lengths)
        stream = PackedStream(
            "x",
            Corpus.open(Path(folder) / "x"),
            seed=7,
            seq_len=3,
            fraction=0.0,
            tag=TAG,
            attend_across_documents=together,
        )
        draws = ReferencePackedDraws(ReferencePackedStream("x", pairs, 3, 0.0))
        # The first segments are those of another run.
        before = min(before, len(segments) - 1)
        own = TaskStream.of(stream, [SampleKind(seq_len) for seq_len, _ in segments[before:]])
        last = StreamPosition().after(SampleKind(1), 1)
        index, start = index_of(own, last), StreamPosition()
        seen: Counter[tuple[int, int, int]] = Counter()
        for number, (seq_len, samples) in enumerate(segments):
            kind, expected = SampleKind(seq_len), draws.draw(seq_len, samples)
            seen.update(
                (epoch, document, place)
                for epoch, pieces in expected
                for document, first, end in pieces
                for place in range(first, end - 1)
            )
            if number >= before and samples:
                part = own.part(start, kind, index)
                arrays = [np.full((samples, seq_len), -7) for _ in range(3)]
                ordinals = start.samples + np.arange(samples)
                part.read(ordinals, np.arange(samples), *arrays[:2], FILLER, arrays[2])
                for i, (epoch, pieces) in enumerate(expected):
                    row = packed_row(pieces, pairs, seq_len, FILLER)
                    assert (
                        tuple(each[i].tolist() for each in arrays[: 2 if together else 3])
                        == (row[: 2 if together else 3])
                    )
                    at = part.locate(int(ordinals[i]))
                    [found] = at.fragments
                    assert at.epoch == epoch
                    assert [(d, first, first + n) for d, first, n in found] == pieces
            start = start.after(kind, samples)
    assert set(seen.values()) <= {1}
    epochs = Counter(epoch for epoch, *_ in seen)
    predictions = sum(source + target + 1 for source, target in lengths)
    assert all(epochs[epoch] == predictions for epoch in range(max(epochs, default=0)))
