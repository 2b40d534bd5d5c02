"""Corpora that are altered at unchanged size: found before they are used, and named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from corpus_support import read_everything, write_pairs
from data_support import edit_bytes, rehash, rewrite_manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_support import (
    TOKENIZER_HASH,
    build_plan,
    phase,
    random_lengths,
    read_held_out,
    write_corpus,
    write_run,
)

from megaphase.config.run import RunConfig
from megaphase.corpus import Corpus, CorpusWriter, DocumentBatch, integrity
from megaphase.corpus._checksums import block_checksums
from megaphase.corpus.integrity import check_document, check_files, wrong_tokens
from megaphase.distributed.all_ranks import result_or_fault
from megaphase.plan.spec import verified_corpora
from megaphase.utils.errors import InputError

BLOCK = 1024
STEPS = 40


def flip(path: Path, position: int) -> None:
    """Alter one bit of a file."""
    edit_bytes(path, position, bytes([path.read_bytes()[position] ^ 1]))


def forget_blocks(prefix: Path) -> None:
    """Make a corpus like one of an earlier version, without .blocks and hash in its manifest."""
    path = Path(f"{prefix}.json")
    manifest = json.loads(path.read_text())
    del manifest["files"][".blocks"], manifest["hash"]
    path.write_text(json.dumps(manifest))
    Path(f"{prefix}.blocks").unlink()


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    """Make texts and pairs of several blocks, read more than once within the run's steps."""
    write_corpus(tmp_path / "en", random_lengths(60, 60, 1), seed=1)
    write_pairs(tmp_path / "en-fr", 70)
    return write_run(
        tmp_path,
        ["en"],
        tasks={"en": {"corpus": "en"}, "en-fr": {"corpus": "en-fr", "kind": "translation"}},
        model={"preset": "gpt-3m", "seq_len": 32},
        phases=[phase("joint", STEPS, {"rates": {"en": 0.5, "en-fr": 0.5}})],
    )


def crc32c(data: bytes) -> int:
    """CRC-32C bit by bit, as RFC 3720 defines it."""
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


@pytest.mark.parametrize("instruction", [True, False])
def test_checksums_are_crc32c(instruction):
    """The first are the examples of RFC 3720, appendix B.4."""
    examples = {
        bytes(32): 0x8A9136AA,
        b"\xff" * 32: 0x62A8AB43,
        bytes(range(32)): 0x46DD794E,
        b"123456789": 0xE3069283,
    }
    random = np.random.default_rng(5)
    for size in (1, 7, 8, 1023, 1024):
        data = random.bytes(size)
        examples[data] = crc32c(data)
    for data, expected in examples.items():
        assert block_checksums(np.frombuffer(data, np.uint8), instruction).tolist() == [expected]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 3 * BLOCK), min_size=1, max_size=8),
    st.sampled_from([60_000, 70_000]),
)
def test_blocks_are_checksums_of_a_kibibyte_each(tmp_path_factory, lengths, vocab_size):
    prefix = tmp_path_factory.mktemp("blocks") / "en"
    with CorpusWriter(prefix, tokenizer_hash="t", vocab_size=vocab_size, eod=0) as writer:
        for length in lengths:  # each written by itself
            writer.add_document(np.arange(length) % 5000, "x")
    data = Path(f"{prefix}.bin").read_bytes()
    expected = [crc32c(data[first : first + BLOCK]) for first in range(0, len(data), BLOCK)]
    assert np.fromfile(f"{prefix}.blocks", "<u4").tolist() == expected


@pytest.mark.parametrize("suffix", [".idx", ".hash", ".sum", ".blocks"])
def test_a_small_file_is_compared_at_every_start(run, suffix):
    verified_corpora(run)
    path = run.tasks["en"].corpus.with_name(f"en{suffix}")
    flip(path, path.stat().st_size // 2)
    with pytest.raises(InputError, match=rf"en\{suffix}: was altered: its hash differs from"):
        verified_corpora(run)


def test_processes_of_a_node_share_the_comparing(run):
    corpora = [Corpus.open(task.corpus) for task in run.tasks.values()]
    flip(Path(f"{corpora[1].prefix}.sum"), 5)
    found = [
        result_or_fault(lambda number=number: check_files(corpora, number, 3))
        for number in range(3)
    ]
    [error] = [each for each in found if each is not None]
    assert str(error).startswith(f"{corpora[1].prefix}.sum: was altered")


def test_a_small_bin_is_compared_whole_and_its_document_named(run):
    corpus = Corpus.open(run.tasks["en"].corpus)
    begin = int(corpus.byte_offsets[17])
    end = begin + 2 * int(corpus.lengths[17])
    flip(Path(f"{corpus.prefix}.bin"), begin + 1)
    named = re.escape(
        f"{corpus.prefix}.bin: was altered in document 17 (bytes {begin:,} to {end - 1:,}): its "
        "checksum is not the one in .sum; put back the file that was there, or tokenize again"
    )
    with pytest.raises(InputError, match=f"^{named}$"):
        verified_corpora(run)


@pytest.mark.parametrize("task", ["en", "en-fr"])
def test_altered_tokens_are_found_when_they_are_read(run, task, monkeypatch):
    monkeypatch.setattr(integrity, "SMALL_BIN_BYTES", 0)
    prefix = run.tasks[task].corpus
    expected = read_everything(build_plan(run))
    path = Path(f"{prefix}.bin")
    for position in range(0, path.stat().st_size, 97):
        flip(path, position)
        verified_corpora(run)
        corpus = Corpus.open(prefix)
        document = int(np.searchsorted(corpus.byte_offsets, position, side="right")) - 1
        where = rf"{task}\.bin: was altered in document {document} \(bytes "
        with pytest.raises(InputError, match=where):
            read_everything(build_plan(run))
        flip(path, position)
    assert read_everything(build_plan(run)) == expected


def test_a_bin_without_blocks_is_compared_whole_at_every_start(run, monkeypatch):
    """Such as corpora of an earlier version."""
    monkeypatch.setattr(integrity, "SMALL_BIN_BYTES", 0)
    prefix = run.tasks["en"].corpus
    expected = read_everything(build_plan(run))
    forget_blocks(prefix)
    verified_corpora(run)
    assert read_everything(build_plan(run)) == expected
    flip(Path(f"{prefix}.bin"), int(Corpus.open(prefix).byte_offsets[17]))
    with pytest.raises(InputError, match=r"en\.bin: was altered in document 17 \(bytes "):
        verified_corpora(run)


def test_held_out_tokens_are_checked(run, monkeypatch):
    monkeypatch.setattr(integrity, "SMALL_BIN_BYTES", 0)
    plan = build_plan(run)
    stream = plan.spec.held_out["en"]
    held_out = np.flatnonzero(stream.corpus.hashes < int(0.2 * 2**64))
    flip(Path(f"{stream.corpus.prefix}.bin"), int(stream.corpus.byte_offsets[held_out[0]]))
    with pytest.raises(InputError, match=rf"was altered in document {held_out[0]} "):
        read_held_out(build_plan(run).spec.held_out["en"], 0, 10**6, 0)


def test_a_block_that_agrees_with_its_documents_alone_is_named_by_its_bytes(run, monkeypatch):
    monkeypatch.setattr(integrity, "SMALL_BIN_BYTES", 0)
    prefix = run.tasks["en"].corpus
    flip(Path(f"{prefix}.blocks"), 5)
    rehash(prefix, ".blocks")
    named = (
        r"en\.bin: bytes 1,024 to 2,047 have another checksum than .*en\.blocks records; put back"
    )
    with pytest.raises(InputError, match=named):
        read_everything(build_plan(run))


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("side", ["training", "held out"])
def test_ids_beyond_the_vocabulary_are_found_when_they_are_read(run, side, blocks, monkeypatch):
    """With matching checksums, as from a faulty writer: no comparison of files finds it."""
    monkeypatch.setattr(integrity, "SMALL_BIN_BYTES", 0)
    prefix = run.tasks["en"].corpus
    before = Corpus.open(prefix)
    is_held_out = np.asarray(before.hashes) < int(0.2 * 2**64)
    document = int(np.flatnonzero(is_held_out == (side == "held out"))[3])
    tokens = np.array(before.tokens)
    tokens[int(before.byte_offsets[document]) // 2] = 60_000
    with CorpusWriter(
        prefix, tokenizer_hash=TOKENIZER_HASH, vocab_size=60_000, eod=0, overwrite=True
    ) as writer:
        text_bytes = np.array(before.sums["text_bytes"])
        hashes = np.array(before.hashes)
        writer.add_batch(DocumentBatch.of(tokens, np.array(before.lengths), hashes, text_bytes))
    if not blocks:
        forget_blocks(prefix)
    verified_corpora(run)
    message = (
        rf"en\.bin: document {document} has the token 60000, the vocabulary ends at 59999; tokenize"
    )
    with pytest.raises(InputError, match=message):
        read_everything(build_plan(run))


def test_a_document_that_is_shown_is_checked(run):
    corpus = Corpus.open(run.tasks["en"].corpus)
    check_document(corpus, 3)
    flip(Path(f"{corpus.prefix}.hash"), 8 * 3)
    with pytest.raises(InputError, match=r"en\.bin: was altered in document 3 "):
        check_document(corpus, 3)
    assert "document 3 " in str(wrong_tokens(corpus, 0, len(corpus.tokens)))


@pytest.mark.parametrize(
    ("key", "value"), [("tag", 5), ("tag", None), ("kind", "lm"), ("vocab_size", 65_000)]
)
def test_an_altered_manifest_is_found(run, key, value):
    prefix = run.tasks["en-fr"].corpus
    path = Path(f"{prefix}.json")
    whole = path.read_text()
    path.write_text(json.dumps({**json.loads(whole), key: value}))
    with pytest.raises(InputError, match=r"en-fr\.json: has been altered: its hash does not match"):
        Corpus.open(prefix)
    path.write_text(whole)
    rewrite_manifest(prefix, sources=["elsewhere"])
    assert Corpus.open(prefix).manifest.sources == ["elsewhere"]
