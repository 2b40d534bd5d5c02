"""Corpora, plans and counts beyond 32 bits: sparse files of the real size."""

from __future__ import annotations

import dataclasses
import json
import mmap
from pathlib import Path

import numpy as np
import pytest
from plan_support import (
    TOKENIZER_HASH,
    derived_key,
    images,
    member_key,
    random_lengths,
    write_corpus,
)

from megaphase.corpus import Corpus
from megaphase.corpus.format import CODE_OF_DTYPE, HEADER, MAGIC, VERSION
from megaphase.plan import _builder
from megaphase.plan.batch_schedule import BatchSchedule
from megaphase.plan.build import build_index
from megaphase.plan.index import block_size
from megaphase.plan.mixture import MixtureConfig
from megaphase.plan.plan import Plan
from megaphase.plan.position import SampleKind
from megaphase.plan.spec import PhaseSpec, PlanSpec
from megaphase.plan.stream import Stream

DOCUMENTS = 2**31 + 1000
SEQ_LEN = 8
FULL = 40  # documents that have tokens; all others are empty
LENGTH = 20


def write_at(path: Path, offset: int, array: np.ndarray) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(array.tobytes())


def sparse(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        file.truncate(size)


@pytest.fixture(scope="module")
def huge(tmp_path_factory) -> tuple[Corpus, list[int]]:
    """Make a corpus of over 2^31 documents; return it and the documents with tokens, by slot."""
    folder = tmp_path_factory.mktemp("huge")
    key = member_key(derived_key(7, "documents", "training", "en"), 0)
    # In the first slots of epoch 0 and at the last document.
    documents = images(DOCUMENTS, key, list(range(FULL - 1)))
    documents = [each for each in documents if each != DOCUMENTS - 1]
    prefix = folder / "en"
    lengths_at = HEADER.size
    offsets_at = lengths_at + 4 * DOCUMENTS
    boundaries_at = offsets_at + 8 * DOCUMENTS
    paths = {suffix: Path(f"{prefix}{suffix}") for suffix in (".bin", ".idx", ".hash", ".sum")}
    try:
        sparse(paths[".idx"], boundaries_at + 8 * (DOCUMENTS + 1))
        sparse(paths[".hash"], 8 * DOCUMENTS)
        sparse(paths[".sum"], 8 * DOCUMENTS)
    except OSError as error:
        pytest.skip(f"no sparse files of {8 * DOCUMENTS:,} bytes here ({error.strerror})")
    dtype = np.dtype(np.uint16)
    header = HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[dtype], DOCUMENTS, DOCUMENTS + 1)
    write_at(paths[".idx"], 0, np.frombuffer(header, np.uint8))
    in_order = sorted([*documents, DOCUMENTS - 1])
    for number, document in enumerate(in_order):
        write_at(paths[".idx"], lengths_at + 4 * document, np.array([LENGTH], np.int32))
        start = np.array([number * LENGTH * dtype.itemsize], np.int64)
        write_at(paths[".idx"], offsets_at + 8 * document, start)
    write_at(paths[".idx"], boundaries_at + 8 * DOCUMENTS, np.array([DOCUMENTS], np.int64))
    np.arange(len(in_order) * LENGTH, dtype=dtype).tofile(paths[".bin"])
    manifest = {
        "tokenizer_hash": TOKENIZER_HASH, "vocab_size": 60_000, "eod": 0, "dtype": "uint16",
        "documents": DOCUMENTS, "tokens": len(in_order) * LENGTH, "text_bytes": 1, "sources": [],
        "files": {
            suffix: {"bytes": path.stat().st_size, "hash": "0"} for suffix, path in paths.items()
        },
    }  # fmt: skip
    Path(f"{prefix}.json").write_text(json.dumps(manifest))
    if sum(path.stat().st_blocks for path in paths.values()) * 512 > 2**30:
        pytest.skip("this file system stores holes")
    return dataclasses.replace(Corpus.open(prefix), hashes=zeros(8 * DOCUMENTS)), documents


def zeros(size: int) -> np.ndarray:
    """Return u64 [size / 8] that takes no memory: reading 17 GB of holes in a file takes a
    minute."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, size, flags=flags, prot=mmap.PROT_READ)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint64)


@pytest.mark.slow
def test_a_corpus_of_over_2_to_the_31_documents_is_cut_into_samples(huge):
    corpus, documents = huge
    assert max(documents) > 2**30
    stream = Stream("en", corpus, seed=7, seq_len=SEQ_LEN, fraction=0.0)
    assert (stream.documents, stream.tokens) == (len(documents) + 1, (len(documents) + 1) * LENGTH)
    in_order = sorted([*documents, DOCUMENTS - 1])
    tokens = [
        token
        for document in documents
        for token in range(
            in_order.index(document) * LENGTH, (in_order.index(document) + 1) * LENGTH
        )
    ]
    # The last document's slot is far away, so the samples stop before it.
    samples = (len(tokens) - 1) // SEQ_LEN
    starts = stream.first_starts(samples)
    rows = np.arange(samples)
    inputs, targets = (np.zeros((samples, SEQ_LEN), np.int64) for _ in range(2))
    stream.read(starts, rows, rows, inputs, targets, 0)
    assert inputs.flatten().tolist() == tokens[: samples * SEQ_LEN]
    assert targets.flatten().tolist() == tokens[1 : samples * SEQ_LEN + 1]


def test_a_phase_of_2_to_the_40_samples_is_found_its_way_in(tmp_path):
    """The last block of a blend of 2^40 samples, in files that are holes except for that block."""
    samples, tasks = 2**40, 3
    block = block_size(tasks)
    order_path, counts_path = tmp_path / "tasks", tmp_path / "counts"
    try:
        sparse(order_path, 2 * samples)
        sparse(counts_path, 8 * tasks * (samples // block))
    except OSError as error:
        pytest.skip(f"no sparse files of {2 * samples:,} bytes here ({error.strerror})")
    before = [2**39, 2**38, 2**38 - block]
    last = np.random.default_rng(1).integers(0, tasks, block).astype(np.uint16)
    write_at(order_path, 2 * (samples - block), last)
    write_at(counts_path, 8 * tasks * (samples // block - 1), np.array(before, np.int64))
    order = np.asarray(np.memmap(order_path, np.uint16, mode="r"))
    counts = np.asarray(np.memmap(counts_path, np.int64, mode="r")).reshape(-1, tasks)
    ordinals = np.empty(5, np.int64)
    _builder.phase_ordinals(order, counts, block, samples - 5, ordinals)
    expected = []
    for position in range(block - 5, block):
        task = int(last[position])
        expected.append(before[task] + int((last[:position] == task).sum()))
    assert ordinals.tolist() == expected


def test_ordinals_beyond_2_to_the_40_have_a_place_in_an_epoch():
    per_epoch, window = 10**7 + 3, 1 << 16
    ordinals = np.array([2**40, 2**40 + 1, 2**62])
    numbers = _builder.shuffle_samples(ordinals, per_epoch, window, 99)
    for ordinal, number in zip(ordinals.tolist(), numbers.tolist(), strict=True):
        epoch, position = divmod(ordinal, per_epoch)
        first = position // window * window
        size = min(window, per_epoch - first)
        key = member_key(member_key(99, epoch), first // window)
        [place] = images(size, key, [position - first])
        assert number == epoch * per_epoch + first + place


def test_a_blend_goes_on_beyond_2_to_the_32_turns_of_a_task():
    """Weights whose periods do not fit 32 bits, and turns that begin beyond 2^61."""
    weights = [2**62 - 3, 1, 2]
    blend = _builder.DeadlineBlend(weights)
    tasks, counts = np.zeros(4096, np.uint16), np.zeros((4, 3), np.int64)
    blend.fill(tasks, counts, 1024)
    # Deadlines of the first turns of the two rare tasks lie 2^62 and 2^61 slots away.
    assert np.bincount(tasks, minlength=3)[1:].max() <= 1
    assert blend.position == 4096


def test_more_tokens_than_63_bits_count_are_an_overflow_and_no_wrap():
    lengths = np.full(3, 2**62, np.int64)
    arguments = (np.zeros(3, np.int64), lengths, np.zeros(3, np.uint64), 0, 0, 1, 8)
    stream = _builder.Stream(np.zeros(1, np.uint16), *arguments)
    with pytest.raises(OverflowError, match=r"2\^63"):
        stream.totals()


def test_a_document_of_more_than_2_to_the_32_tokens_needs_64_bit_starts():
    lengths, hashes = np.array([2**33], np.int64), np.zeros(1, np.uint64)
    stream = _builder.Stream(
        np.zeros(1, np.uint16), np.zeros(1, np.int64), lengths, hashes, 0, 0, 1, 2**31
    )
    walk = stream.walk(0)
    walk.fill(np.zeros((1, 2), np.uint32), 10)
    with pytest.raises(OverflowError, match=r"2\^32"):
        walk.fill(np.zeros((4, 2), np.uint32), 10)
    walk, starts = stream.walk(0), np.zeros((4, 2), np.uint64)
    walk.fill(starts, 10)
    assert walk.fill(starts, 10) == 4
    assert starts.tolist() == [[0, 0], [0, 2**31], [0, 2**32], [0, 3 * 2**31]]


@pytest.mark.slow
def test_a_plan_of_65535_tasks(tmp_path):
    names = [f"t{number}" for number in range(65_535)]
    corpora = []
    for number in range(4):
        prefix = tmp_path / f"c{number}"
        write_corpus(prefix, random_lengths(60 + 20 * number, 90, number), seed=number)
        corpora.append(Corpus.open(prefix))
    streams = {
        name: Stream(name, corpora[number % 4], seed=1, seq_len=256, fraction=0.0)
        for number, name in enumerate(names)
    }
    phases = [
        PhaseSpec(
            "one",
            40_000,
            BatchSchedule.constant(4),
            MixtureConfig(temperature=3.3),
            "",
            "balanced",
            1,
            SampleKind(256),
        ),
        PhaseSpec(
            "two",
            70_000,
            BatchSchedule.constant(4),
            MixtureConfig(unimax=True, max_epochs=2),
            "",
            "random",
            2,
            SampleKind(256),
        ),
    ]
    spec = PlanSpec(streams, streams, phases, 256, "f" * 32, dict.fromkeys(names, 0))
    build_index(spec, tmp_path / "index", lambda *_: None)
    plan = Plan(spec, tmp_path / "index")
    for number, phase in enumerate(plan.phases):
        assert sum(phase.counts) == phase.samples
        planned = plan.samples(number, phase.samples - 4000, 4000)
        ends = np.array(phase.starts) + phase.counts
        last = np.unique(planned.tasks[::-1], return_index=True)
        assert (planned.ordinals[::-1][last[1]] == ends[last[0]] - 1).all()
    inputs, targets = (np.zeros((4000, 256), np.int64) for _ in range(2))
    plan.read(planned, inputs, targets, 0)
    assert (inputs[:, 1:] == inputs[:, :-1] + 1).any(axis=1).all()
