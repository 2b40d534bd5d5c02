"""Corpora to and from Megatron-LM: each program reads the corpora that the other one writes."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from data_support import corpus_bytes, make_tokenizer, megatron_index, write_jsonl

from megaphase.corpus import Corpus
from megaphase.data_tools.corpora.from_megatron import corpus_from_megatron
from megaphase.data_tools.corpora.verify import verify_corpus
from megaphase.data_tools.tokenization.tokenize import tokenize
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError

TEXTS = ["one two", "drei\nvier ▁ fünf", "😀" * 40, *(f"text number {n}" * 9 for n in range(80))]


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def native(tok: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    tokenize([write_jsonl(folder / "en.jsonl", TEXTS)], tok, folder / "en", workers=1)
    return folder / "en"


@pytest.fixture(scope="module")
def megatron():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("megatron.core.datasets.indexed_dataset")


def written_by_megatron(
    megatron, prefix: Path, documents: list[list[list[int]]], dtype: type = np.int32
) -> Path:
    """Write each document as a list of sequences of tokens."""
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        for tokens in sequences:
            builder.add_item(torch.tensor(tokens))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def encoded(tok: Path) -> list[list[int]]:
    return [Tokenizer.load(tok).encode(text) for text in TEXTS]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_megatron_wrote_becomes_what_tokenizing_gives(
    megatron, tok, native, tmp_path, workers
):
    eod = Tokenizer.load(tok).eod
    documents = [[[*tokens, eod]] for tokens in encoded(tok)]
    source = written_by_megatron(megatron, tmp_path / "old", documents)
    manifest = corpus_from_megatron(source, tok, tmp_path / "en", workers=workers)
    found, expected = corpus_bytes(tmp_path / "en"), corpus_bytes(native)
    for suffix in (".bin", ".idx", ".hash"):
        assert found[suffix] == expected[suffix], suffix
    made = Corpus.open(native).manifest
    assert (manifest.text_bytes, manifest.documents) == (made.text_bytes, made.documents)
    assert manifest.fingerprint == made.fingerprint
    verify_corpus(tmp_path / "en")


@pytest.mark.parametrize("dtype", [np.uint16, np.int64])
def test_sequences_are_joined_and_eod_is_added(megatron, tok, native, tmp_path, dtype):
    eod = Tokenizer.load(tok).eod
    documents = [
        [tokens[:2], tokens[2:]] if len(tokens) > 2 else [tokens] for tokens in encoded(tok)
    ]
    documents.insert(3, [[eod]])
    source = written_by_megatron(megatron, tmp_path / "old", documents, dtype)
    manifest = corpus_from_megatron(source, tok, tmp_path / "en", workers=1)
    assert corpus_bytes(tmp_path / "en")[".bin"] == corpus_bytes(native)[".bin"]
    assert manifest.skipped_empty == 1


def test_megatron_reads_ours(megatron, tok, native):
    eod = Tokenizer.load(tok).eod
    dataset = megatron.IndexedDataset(str(native))
    assert len(dataset) == len(TEXTS)
    assert [dataset[i].tolist() for i in range(len(dataset))] == [
        [*tokens, eod] for tokens in encoded(tok)
    ]
    assert dataset.document_indices.tolist() == list(range(len(TEXTS) + 1))


def index_of_one(prefix: Path, tokens: list[int], says: int) -> Path:
    Path(f"{prefix}.idx").write_bytes(megatron_index(4, [says], 4, [0, 1]))
    np.array(tokens, np.int32).tofile(f"{prefix}.bin")
    return prefix


@pytest.mark.parametrize(
    ("tokens", "says", "problem"),
    [
        ([5, 6, 70_000], 3, "old.bin: document 0 has the token 70000, the vocabulary ends at"),
        ([5, -1, 7], 3, "old.bin: document 0 has the token -1, the vocabulary ends at"),
        ([5, 6], 3, "old.bin: is truncated: 8 bytes, old.idx says 12; copy both files again"),
        ([5, 6, 7, 8], 3, "old.bin: is too long: 16 bytes, old.idx says 12; copy both files again"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_left(tok, tmp_path, tokens, says, problem):
    source = index_of_one(tmp_path / "old", tokens, says)
    with pytest.raises(InputError) as error:
        corpus_from_megatron(source, tok, tmp_path / "out" / "en", workers=1)
    assert problem in str(error.value)
    assert list((tmp_path / "out").glob("*")) == []


def test_a_missing_file_is_named(tok, tmp_path):
    with pytest.raises(InputError, match=r"old\.idx: no such file"):
        corpus_from_megatron(tmp_path / "old", tok, tmp_path / "en", workers=1)
    index_of_one(tmp_path / "old", [1], 1)
    (tmp_path / "old.bin").unlink()
    with pytest.raises(InputError, match=r"old\.bin: no such file"):
        corpus_from_megatron(tmp_path / "old", tok, tmp_path / "en", workers=1)


@pytest.mark.parametrize(("bytes_more", "fault"), [(1, "too long"), (-1, "truncated")])
def test_a_file_of_odd_length_is_named(tok, tmp_path, bytes_more, fault):
    source = index_of_one(tmp_path / "old", [5, 6, 7], 3)
    tokens = (tmp_path / "old.bin").read_bytes()
    (tmp_path / "old.bin").write_bytes((tokens + b"\1")[: len(tokens) + bytes_more])
    with pytest.raises(InputError, match=rf"old\.bin: is {fault}: {12 + bytes_more} bytes, old"):
        corpus_from_megatron(source, tok, tmp_path / "en", workers=1)


def test_an_index_of_another_dtype_is_found_by_the_size(tok, tmp_path):
    source = index_of_one(tmp_path / "old", [5, 6, 7], 3)
    for code, itemsize, fault in ((8, 2, "too long"), (5, 8, "truncated")):
        (tmp_path / "old.idx").write_bytes(megatron_index(code, [3], itemsize, [0, 1]))
        with pytest.raises(InputError, match=rf"old\.bin: is {fault}: 12 bytes, old\.idx says"):
            corpus_from_megatron(source, tok, tmp_path / "en", workers=1)


@pytest.mark.parametrize(
    ("lengths", "offsets", "indices", "problem"),
    [
        ([2, -1, 2], [0, 8, 4], [0, 1, 2, 3], "sequence 1 has a negative length"),
        ([2, 1], [0, 4], [0, 1, 2], "sequence 1 does not begin where the one before it ends"),
        ([2, 1], [0, 12], [0, 1, 2], "sequence 1 does not begin where the one before it ends"),
        ([2, 1], [0, 9], [0, 1, 2], "sequence 1 does not begin where the one before it ends"),
        ([3], [-4], [0, 1], "sequence 0 does not begin where the one before it ends"),
        ([1, 1, 1], [0, 4, 8], [0, 2, 1, 3], "document_indices do not ascend at document 1"),
        ([1, 1, 1], [0, 4, 8], [0, 9, 3], "document_indices do not ascend at document 1"),
        ([1, 1, 1], [0, 4, 8], [0, -1, 2, 3], "document_indices do not ascend at document 0"),
    ],
)
def test_an_index_that_megatron_would_not_write_is_named(
    tok, tmp_path, lengths, offsets, indices, problem
):
    index = megatron_index(4, lengths, 4, indices)
    begin = 34 + 4 * len(lengths)
    offset_bytes = np.array(offsets, "<i8").tobytes()
    index = index[:begin] + offset_bytes + index[begin + len(offset_bytes) :]
    (tmp_path / "old.idx").write_bytes(index)
    np.array([5, 6, 7], np.int32).tofile(tmp_path / "old.bin")
    with pytest.raises(InputError) as error:
        corpus_from_megatron(tmp_path / "old", tok, tmp_path / "en", workers=1)
    assert str(error.value) == f"{tmp_path / 'old.idx'}: its {problem}; copy both files again"


def test_document_indices_say_where_documents_begin(tok, tmp_path):
    """As many documents as sequences, but not one each: two, then none, then one."""
    (tmp_path / "old.idx").write_bytes(megatron_index(4, [1, 2, 1], 4, [0, 2, 2, 3]))
    np.array([5, 6, 7, 8], np.int32).tofile(tmp_path / "old.bin")
    manifest = corpus_from_megatron(tmp_path / "old", tok, tmp_path / "en", workers=1)
    eod = Tokenizer.load(tok).eod
    corpus = Corpus.open(tmp_path / "en")
    assert [corpus.document(i).tolist() for i in range(2)] == [[5, 6, 7, eod], [8, eod]]
    assert (manifest.documents, manifest.skipped_empty) == (2, 1)
