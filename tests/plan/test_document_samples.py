"""Samples that begin where documents begin, over changes of the cut and the length in an epoch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_support import (
    Documents,
    build_plan,
    derived_key,
    member_key,
    permutation,
    phase,
    random_lengths,
    write_corpus,
    write_run,
)
from test_document_packing import best_fit
from translation_support import random_pairs, write_pairs

from megaphase.config.run import RunConfig
from megaphase.corpus import Corpus
from megaphase.plan import document_table
from megaphase.plan import stream as texts
from megaphase.plan.dataset import read_step
from megaphase.plan.plan import Plan
from megaphase.plan.position import SampleKind, StreamPosition
from megaphase.plan.stream import Stream
from megaphase.plan.task_stream import TaskStream
from megaphase.plan.trace import trace_step
from megaphase.utils.targets import IGNORED_TARGET

FRACTION, FILLER, BOS = 0.2, 59_999, 59_998


def make_stream(folder: Path, lengths: list[int], **options) -> tuple[Stream, Documents]:
    written = write_corpus(folder / "en", lengths, first_token=10)
    return open_stream(folder, **options), written


def open_stream(folder: Path, **options) -> Stream:
    settings = {"seed": 7, "seq_len": 8, "fraction": FRACTION}
    return Stream("en", Corpus.open(folder / "en"), **(settings | options))


def index_of(stream: TaskStream, last: StreamPosition) -> np.ndarray:
    """Return the task's index up to a position, as a plan stores it."""
    parts = [np.empty((0, 2), stream.start_dtype)]
    for epoch, size in enumerate(stream.index_sizes(StreamPosition(), last)):
        walk, starts, done = stream.walk(epoch), np.empty((size, 2), stream.start_dtype), 0
        while done < size:
            done += walk.fill(starts[done:], 1000)
        parts.append(starts)
    return np.concatenate(parts)


Sample = tuple[int, list[int], list[int], list[list[tuple[int, int, int]]]]


def samples_of(stream: TaskStream, segments: list[tuple[SampleKind, int]]) -> list[Sample]:
    """Return epoch, inputs, targets and fragments of every sample of these segments."""
    last = StreamPosition()
    for kind, count in segments:
        last = last.after(kind, count)
    starts = index_of(stream, last)
    found: list[Sample] = []
    position = StreamPosition()
    for kind, count in segments:
        part = stream.part(position, kind, starts)
        ordinals = np.arange(position.samples, position.samples + count)
        inputs, targets, numbers = (np.zeros((count, kind.seq_len), np.int64) for _ in range(3))
        part.read(ordinals, np.arange(count), inputs, targets, FILLER, numbers)
        for row, ordinal in enumerate(ordinals.tolist()):
            at = part.locate(ordinal)
            assert 0 <= at.number < at.of
            found.append((at.epoch, inputs[row].tolist(), targets[row].tolist(), at.fragments))
        position = position.after(kind, count)
    return found


KINDS = st.builds(SampleKind, st.integers(1, 20), st.sampled_from(["tokens", "documents"]))


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(document_table, "PACKING_WINDOW", 7)
    monkeypatch.setattr("megaphase.plan.document_stream.PACKING_WINDOW", 7)
    monkeypatch.setattr(texts, "SAMPLE_WINDOW", 4)
    monkeypatch.setattr("megaphase.plan.document_stream.SAMPLE_WINDOW", 4)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=12, max_size=25),
    st.lists(st.tuples(KINDS, st.integers(1, 9)), min_size=1, max_size=6),
    st.booleans(),
    st.booleans(),
)
def test_every_target_is_one_once_in_an_epoch_whatever_changes(lengths, segments, bos, together):
    with TemporaryDirectory() as folder:
        corpus, written = make_stream(
            Path(folder), lengths, bos=BOS if bos else None, attend_across_documents=together
        )
        if corpus.tokens < 2:
            return
        # The last kind finishes the epoch and begins another one.
        segments = [*segments, (segments[-1][0], 2 * corpus.tokens)]
        stream = TaskStream.of(corpus, [kind for kind, _ in segments])
        samples = samples_of(stream, segments)
    here = written.on_side("training", FRACTION)
    documents = [written.tokens(d) for d in range(len(lengths)) if here[d]]
    last = max(epoch for epoch, *_ in samples)
    assert last >= 1
    for epoch in range(last):
        scored = Counter(
            t for e, _, targets, _ in samples if e == epoch for t in targets if t != IGNORED_TARGET
        )
        assert set(scored.values()) <= {1}
        missing = {token for each in documents for token in each} - set(scored)
        assert missing <= {each[0] for each in documents}
        if bos and all(kind.cut == "documents" for kind, _ in segments):
            assert not missing
    for _, inputs, targets, fragments in samples:
        known = [
            written.tokens(document)[first : first + n]
            for fragment in fragments
            for document, first, n in fragment
        ]
        inside = {token for piece in known for token in piece} | {BOS, FILLER}
        assert set(inputs) <= inside
        assert set(targets) <= inside | {IGNORED_TARGET}
        # A target follows its input in their document, or begins one.
        begins = {written.tokens(document)[0] for document in range(len(lengths))}
        for token, target in zip(inputs, targets, strict=True):
            assert target in (IGNORED_TARGET, token + 1) or target in begins


@pytest.mark.parametrize(("seq_len", "longest", "bos"), [(8, 20, False), (32, 20, True)])
def test_an_epoch_is_packed_as_by_the_reference(tmp_path, seq_len, longest, bos):
    lengths = random_lengths(60, longest, 3)
    corpus, written = make_stream(tmp_path, lengths, bos=BOS if bos else None)
    kind = SampleKind(seq_len, "documents")
    stream = TaskStream.of(corpus, [kind])
    order = permutation(60, member_key(derived_key(7, "documents", "training", "en"), 0))
    here = written.on_side("training", FRACTION)
    parts = [(d, 0, lengths[d]) for d in order if here[d]]
    expected = []
    for first in range(0, len(parts), 7):
        expected += best_fit(parts[first : first + 7], seq_len, bos)
    pieces = [
        [(d, max(first - 1, 0), n + (first > 0)) for d, first, n in each] for each in expected
    ]
    of = stream.at(kind)
    assert of.samples_per_epoch == len(expected)
    for number, each in enumerate(pieces):
        assert of.sample_pieces(np.empty(0), number) == [[piece] for piece in each]
    for epoch in range(2):
        drawn = samples_of(stream, [(kind, 2 * len(expected))])
        found = [[piece for fragment in s[3] for piece in fragment] for s in drawn if s[0] == epoch]
        assert sorted(found) == sorted(pieces)
        assert found != pieces


def test_tables_are_stored_once_and_read_again(tmp_path):
    write_corpus(tmp_path / "en", random_lengths(200, 30, 3), first_token=10)
    kinds = [SampleKind(16), SampleKind(24, "documents"), SampleKind(12)]
    segments = list(zip(kinds, (9, 11, 5), strict=True))
    rows = []
    for folder in (None, tmp_path / "run" / "plan", tmp_path / "run" / "plan"):
        corpus = open_stream(tmp_path)
        corpus.tables.folder = folder
        rows.append(samples_of(TaskStream.of(corpus, kinds), segments))
    assert rows[0] == rows[1] == rows[2]
    tables = sorted((tmp_path / "run" / "plan").glob("documents-*/parts"))
    assert len(tables) == 2  # a whole epoch, and what is left of one
    before = [table.read_bytes() for table in tables]
    for table, content in zip(tables, before, strict=True):
        table.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said: list[str] = []
    corpus = open_stream(tmp_path)
    corpus.tables.folder, corpus.tables.say = tmp_path / "run" / "plan", said.append
    assert samples_of(TaskStream.of(corpus, kinds), segments) == rows[0]
    assert len(said) == 2
    assert all("parts has been altered; building the plan again" in each for each in said)
    assert [table.read_bytes() for table in tables] == before


PHASES = [
    phase("one", 6, {"rates": {"en": 0.5, "hi": 0.25, "pairs": 0.25}}),
    phase("two", 7, {"rates": {"en": 0.5, "hi": 0.25, "pairs": 0.25}}) | {"cut": "documents"},
    phase("three", 5, {"rates": {"en": 0.5, "hi": 0.25, "pairs": 0.25}}),
]


def write_mixed_run(folder: Path, phases: list[dict]) -> RunConfig:
    for number, task in enumerate(["en", "hi"]):
        lengths = random_lengths(60, 30, number)
        write_corpus(folder / task, lengths, seed=number, first_token=number * 9000)
    write_pairs(folder / "pairs", random_pairs(60, 6, 5))
    tasks = {
        "en": {"corpus": "en"},
        "hi": {"corpus": "hi"},
        "pairs": {"corpus": "pairs", "kind": "translation"},
    }
    return write_run(folder, list(tasks), tasks=tasks, phases=phases)


def rows_of(plan: Plan, phase: int, steps: int, starts=None) -> list[tuple[int, ...]]:
    rows = []
    for step in range(steps):
        batch = read_step(plan, phase, step, 0, 1, FILLER, starts)
        for task, inputs, targets in zip(batch.tasks, batch.inputs, batch.targets, strict=True):
            rows.append((int(task), *inputs.tolist(), *targets.tolist()))
    return rows


def test_the_index_reaches_as_far_as_after_an_early_end(tmp_path):
    # The plan ends with epoch 0. If the first phase ends early, the samples of documents are packed
    # anew, and those that are drawn are fuller, so that the last phase begins epoch 1.
    lengths = [3, 5, 11, 9, 5, 8, 3, 7, 6, 9, 6, 4, 5, 1, 5, 9, 10, 5, 8, 5, 5, 3, 5, 5, 6, 3, 5, 7]
    corpus, _ = make_stream(tmp_path, [*lengths, 11, 8, 11, 8, 12, 3, 7, 1, 2, 10])
    even, packed = SampleKind(8), SampleKind(8, "documents")
    stream = TaskStream.of(corpus, [even, packed, even])
    planned = StreamPosition().after(even, 8).after(packed, 12).after(even, 5)
    assert stream.epochs(planned) == 1
    starts = index_of(stream, planned)
    begin = StreamPosition().after(even, 6).after(packed, 12)
    assert stream.epochs(begin.after(even, 5)) > 1
    part = stream.part(begin, even, starts)
    inputs, targets, numbers = (np.zeros((5, 8), np.int64) for _ in range(3))
    part.read(np.arange(18, 23), np.arange(5), inputs, targets, FILLER, numbers)
    assert (targets != IGNORED_TARGET).any(1).all()


def test_a_phase_with_documents_is_planned_traced_and_shortened(tmp_path):
    config = write_mixed_run(tmp_path, PHASES)
    plan = build_plan(config)
    summary = plan.summary()
    [first, second, third] = summary["phases"]
    assert second["cut"] == "documents"
    assert "cut" not in first | third
    for task in ("en", "hi"):
        assert 0 < second["tasks"][task]["padding"] < 0.5
        assert "padding" not in first["tasks"][task] | third["tasks"][task]
    assert "padding" not in second["tasks"]["pairs"]
    # Documents are whole, or pieces of longer ones.
    lengths = {task: plan.spec.streams[task].corpus.lengths for task in ("en", "hi")}
    for step in range(1, 8):
        for sample in trace_step(plan, 1, step):
            if sample.task != "pairs":
                assert sum(p.last - p.first for p in sample.pieces) <= 9 + len(sample.pieces)
                assert all(p.last <= lengths[sample.task][p.document] for p in sample.pieces)
    # Translation pairs are those of a run without the key.
    other = tmp_path / "other"
    other.mkdir()
    without = build_plan(
        write_mixed_run(other, [{k: v for k, v in p.items() if k != "cut"} for p in PHASES])
    )
    for number, steps in enumerate((6, 7, 5)):
        pairs = [row for row in rows_of(plan, number, steps) if row[0] == 2]
        assert pairs == [row for row in rows_of(without, number, steps) if row[0] == 2]
    # A phase that ends early leaves the rest to the next ones: their tables are built then.
    starts = plan.positions([3])
    fresh = Plan(plan.spec, plan.folder)
    early = rows_of(fresh, 1, 7, starts)
    shorter = tmp_path / "shorter"
    shorter.mkdir()
    planned = build_plan(write_mixed_run(shorter, [PHASES[0] | {"steps": 3}, *PHASES[1:]]))
    assert early == rows_of(planned, 1, 7)
    assert rows_of(fresh, 2, 5, plan.positions([3, 4])) == rows_of(
        planned, 2, 5, planned.positions([3, 4])
    )
