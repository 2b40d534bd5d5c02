"""Positions in a stream: equal ones have equal segments, and JSON gives them back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaphase.plan.position import SampleKind, Segment, StreamPosition

KINDS = st.builds(SampleKind, st.integers(1, 3), st.sampled_from(["tokens", "documents"]))
STEPS = st.lists(st.tuples(KINDS, st.integers(0, 5)), max_size=8)


def position(steps: list[tuple[SampleKind, int]]) -> StreamPosition:
    found = StreamPosition()
    for kind, samples in steps:
        found = found.after(kind, samples)
    return found


@given(STEPS)
def test_a_position_is_a_list_of_kinds_one_a_sample(steps):
    found = position(steps)
    one_by_one = [kind for kind, samples in steps for _ in range(samples)]
    assert [s.kind for s in found.segments for _ in range(s.samples)] == one_by_one
    assert found == position([(kind, 1) for kind in one_by_one])
    assert found.samples == len(one_by_one)
    assert found.tokens == sum(kind.seq_len for kind in one_by_one)
    assert StreamPosition.from_json(found.to_json()) == found


@given(STEPS, KINDS)
def test_the_samples_of_a_kind_that_end_here(steps, kind):
    found = position(steps)
    start = found.start_of(kind)
    assert start.after(kind, found.samples - start.samples) == found
    assert not start.segments or start.segments[-1].kind != kind
    assert found.is_plain(kind) == all(used == kind for used, samples in steps if samples)


@pytest.mark.parametrize(
    "value",
    [
        [[8, "tokens"]],
        [["8", "tokens", 1]],
        [[8, "words", 1]],
        [[0, "tokens", 1]],
        [[8, "tokens", -1]],
    ],
)
def test_what_is_no_position_is_refused(value):
    with pytest.raises((TypeError, ValueError)):
        StreamPosition.from_json(value)


def test_no_samples_are_no_segment():
    assert StreamPosition().after(SampleKind(8), 0) == StreamPosition()
    assert position([(SampleKind(8), 2)]).segments == (Segment(SampleKind(8), 2),)
