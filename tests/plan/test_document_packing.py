"""Documents packed best-fit: the C++ compared with a slow reference in Python."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_support import member_key, permutation

from megaphase.plan import _builder
from megaphase.utils.targets import IGNORED_TARGET

FILLER, BOS = 59_999, 59_998
HASHES = st.integers(0, 2**64 - 1)

Part = tuple[int, int, int]  # document, first target in it, targets


def best_fit(parts: list[Part], seq_len: int, bos: bool) -> list[list[Part]]:
    """Return the samples: best fit over a list of the rooms left, sorted."""

    def room_for(first: int) -> int:
        return seq_len if bos or first else seq_len + 1

    full: list[list[list[Part]]] = []
    rests = []
    for document, first, targets in parts:
        full.append([])
        while targets > (room := room_for(first)):
            full[-1].append([(document, first, room)])
            first, targets = first + room, targets - room
        rests.append((document, first, targets))
    samples: list[list[int]] = []  # of numbers of parts, the first one placed first
    rooms: list[tuple[int, int, int]] = []  # room, minus the time since when, sample
    for now, number in enumerate(sorted(range(len(rests)), key=lambda i: -rests[i][2])):
        _, first, targets = rests[number]
        at = bisect_left(rooms, (targets, -(10**9), 0))
        if at == len(rooms):
            room, sample = room_for(first), len(samples)
            samples.append([])
        else:
            room, _, sample = rooms.pop(at)
        samples[sample].append(number)
        insort(rooms, (room - targets, -now, sample))
    opened = {sample[0]: sample for sample in samples}
    found: list[list[Part]] = []
    for number in range(len(parts)):
        found += full[number]
        if sample := opened.get(number, []):
            found.append([rests[i] for i in sorted(sample, key=lambda i: (rests[i][1] > 0, i))])
    return found


def packed(parts: list[Part], seq_len: int, bos: bool) -> list[list[Part]]:
    array = np.array(parts, np.int64).reshape(-1, 3)
    members, sizes = _builder.pack_parts(array, seq_len, bos)
    ends = np.cumsum(sizes)
    assert ends[-1:].tolist() == ([len(members)] if len(sizes) else [])
    return [[tuple(m) for m in each.tolist()] for each in np.split(members, ends[:-1])][
        : len(sizes)
    ]


PARTS = st.lists(
    st.tuples(st.integers(0, 9), st.sampled_from([0, 0, 1, 5]), st.integers(1, 60)), max_size=60
)


@settings(max_examples=300, deadline=None)
@given(PARTS, st.integers(1, 40), st.booleans())
def test_parts_are_packed_as_by_the_reference(parts, seq_len, bos):
    assert packed(parts, seq_len, bos) == best_fit(parts, seq_len, bos)


@pytest.mark.parametrize(("seq_len", "longest"), [(63, 30), (64, 200), (4095, 900), (5000, 9000)])
def test_many_parts_are_packed_as_by_the_reference(seq_len, longest):
    lengths = np.random.default_rng(seq_len).integers(1, longest, 5000).tolist()
    parts = [(number, 0, length) for number, length in enumerate(lengths)]
    samples = packed(parts, seq_len, False)
    assert samples == best_fit(parts, seq_len, False)
    fewest = sum(lengths) / (seq_len + 1)
    assert fewest <= len(samples) <= 1.02 * fewest + 2


@settings(max_examples=100, deadline=None)
@given(PARTS, st.integers(1, 40), st.booleans())
def test_every_target_is_packed_once_and_nothing_that_fits_is_cut(parts, seq_len, bos):
    parts = [(number, first, targets) for number, (_, first, targets) in enumerate(parts)]
    samples = packed(parts, seq_len, bos)
    members = [member for sample in samples for member in sample]
    covered = Counter((d, t) for d, first, n in members for t in range(first, first + n))
    assert covered == Counter((d, t) for d, first, n in parts for t in range(first, first + n))
    for sample in samples:
        starts_a_document = sample[0][1] == 0 and not bos
        assert sum(targets for _, _, targets in sample) <= seq_len + starts_a_document
    pieces = Counter(document for document, _, _ in members)
    for document, first, targets in parts:
        if targets <= seq_len + (first == 0 and not bos):
            assert pieces[document] == 1


def in_memory(
    documents: list[list[int]], hashes: list[int], read: tuple[int, int], key: int, seq_len: int,
    bos: bool,
) -> _builder.Stream:  # fmt: skip
    lengths = np.array([len(each) for each in documents], np.int32)
    tokens = np.array([token for each in documents for token in each], np.uint16)
    offsets = 2 * (np.cumsum(lengths, dtype=np.int64) - lengths)
    return _builder.Stream(
        tokens, offsets, lengths, np.array(hashes, np.uint64), *read, key, seq_len,
        bos=BOS if bos else None,
    )  # fmt: skip


@st.composite
def corpora(draw) -> tuple[list[list[int]], list[int]]:
    """Return documents, in which no token occurs twice, and their hashes."""
    lengths = draw(st.lists(st.integers(0, 30), min_size=1, max_size=25))
    ends = np.cumsum(lengths).tolist()
    documents = [list(range(end - n, end)) for end, n in zip(ends, lengths, strict=True)]
    hashes = draw(st.lists(HASHES, min_size=len(lengths), max_size=len(lengths)))
    return documents, hashes


def walked(stream, epoch: int, ranges: list[tuple[int, int]], at_once: int) -> list[Part]:
    walk, found = stream.part_walk(epoch, ranges), []
    while not walk.at_end:
        parts = np.empty((at_once, 3), np.int64)
        found += [tuple(part) for part in parts[: walk.fill(parts, at_once)].tolist()]
    return found


@settings(max_examples=200, deadline=None)
@given(
    corpora(), st.tuples(HASHES, HASHES), HASHES, st.integers(0, 3),
    st.lists(st.integers(0, 400), max_size=12, unique=True), st.integers(1, 9),
)  # fmt: skip
def test_a_walk_finds_the_parts_of_ranges(corpus, read, key, epoch, bounds, at_once):
    documents, hashes = corpus
    stream = in_memory(documents, hashes, read, key, 8, False)
    bounds = sorted(bounds)[: len(bounds) // 2 * 2]
    ranges = list(zip(bounds[::2], bounds[1::2], strict=True))
    expected: list[Part] = []
    order = permutation(len(documents), member_key(key, epoch))
    joined = [(d, t) for d in order if read[0] <= hashes[d] <= read[1]
              for t in range(len(documents[d]))]  # fmt: skip
    for first, last in ranges:
        for document, token in joined[first:last]:
            if expected and expected[-1][0] == document and token != 0 and joined[first] != (
                document, token,
            ):  # fmt: skip
                expected[-1] = (document, expected[-1][1], expected[-1][2] + 1)
            else:
                expected.append((document, token, 1))
    assert walked(stream, epoch, ranges, at_once) == expected


def expected_row(
    sample: list[Part], documents: list[list[int]], seq_len: int, bos: bool, apart: bool
) -> tuple[list[int], list[int], list[int]]:
    """Return inputs, targets and documents of a sample, position by position."""
    row: list[tuple[int, int, int]] = []
    for number, (document, first, targets) in enumerate(sample):
        for token in range(first, first + targets):
            target = documents[document][token]
            if token > 0:
                row.append((documents[document][token - 1], target, number))
            elif bos:
                row.append((BOS, target, number))
            elif number > 0:
                other, other_first, n = sample[number - 1]
                whole = other_first + n == len(documents[other])
                scored = target if whole and not apart else IGNORED_TARGET
                row.append((documents[other][other_first + n - 1], scored, number - 1))
    row += [(FILLER, IGNORED_TARGET, row[-1][2] if row else 0)] * (seq_len - len(row))
    inputs, found, numbers = (list(each) for each in zip(*row, strict=True))
    return inputs, found, numbers


def read_parts(stream, samples: list[list[Part]], seq_len: int, apart: bool):
    parts = np.array([part for sample in samples for part in sample], np.int64).reshape(-1, 3)
    sizes = np.array([len(sample) for sample in samples], np.int64)
    inputs, targets, numbers = (np.full((len(samples), seq_len), -7) for _ in range(3))
    rows = np.arange(len(samples))[::-1].copy()
    stream.read_parts(
        parts, sizes, rows, inputs, targets, FILLER, IGNORED_TARGET, numbers if apart else None
    )
    assert apart or (numbers == -7).all()
    return [tuple(a[row].tolist() for a in (inputs, targets, numbers)) for row in rows]


@settings(max_examples=200, deadline=None)
@given(corpora(), HASHES, st.integers(1, 40), st.booleans(), st.booleans())
def test_rows_are_those_of_the_reference(corpus, key, seq_len, bos, apart):
    documents, hashes = corpus
    stream = in_memory(documents, hashes, (0, 2**64 - 1), key, seq_len, bos)
    samples = packed(walked(stream, 0, [(0, 10**6)], 7), seq_len, bos)
    rows = read_parts(stream, samples, seq_len, apart)
    for row, sample in zip(rows, samples, strict=True):
        expected = expected_row(sample, documents, seq_len, bos, apart)
        assert row[:2] == expected[:2]
        assert not apart or row[2] == expected[2]
    scored = Counter(t for row in rows for t in row[1] if t != IGNORED_TARGET)
    assert set(scored.values()) <= {1}
    begins = {
        documents[part[0]][0]
        for sample in samples
        for number, part in enumerate(sample)
        if part[1] == 0 and not bos and (apart or number == 0)
    }
    assert set(scored) == {token for each in documents for token in each} - begins


@settings(max_examples=150, deadline=None)
@given(
    corpora(),
    st.lists(st.tuples(*[st.integers(-3, 40)] * 3), min_size=1, max_size=5),
    st.integers(-(2**40), 2**40) | st.integers(-9, 9),
)
def test_wrong_parts_are_an_error_and_no_crash(corpus, parts, shift):
    documents, hashes = corpus
    lengths = np.array([len(each) for each in documents], np.int64)
    tokens = np.array([token for each in documents for token in each], np.uint16)
    offsets = 2 * (np.cumsum(lengths) - lengths) + shift
    stream = _builder.Stream(
        tokens, offsets, lengths, np.array(hashes, np.uint64), 0, 2**64 - 1, 1, 9
    )
    try:
        rows = read_parts(stream, [parts], 9, True)
    except IndexError:
        return
    assert len(rows) == 1


def test_what_cannot_be_packed_is_refused():
    for wrong in ([(0, 0, 0)], [(0, -1, 3)]):
        with pytest.raises(ValueError, match="targets"):
            packed(wrong, 8, False)
    stream = in_memory([[1, 2, 3]], [1], (0, 2**64 - 1), 1, 8, False)
    with pytest.raises(ValueError, match="ascending"):
        stream.part_walk(0, [(3, 5), (4, 6)])
