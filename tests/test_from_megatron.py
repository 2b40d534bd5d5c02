"""Corpora to and from Megatron-LM: its own builder writes what we read, its reader reads ours."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from data_support import corpus_bytes, files_of, make_tokenizer, megatron_index, write_jsonl

from megaphase.corpus import Corpus
from megaphase.data_tools.corpora.from_megatron import from_megatron
from megaphase.data_tools.corpora.verify import verify
from megaphase.data_tools.tokenization.tokenize import tokenize
from megaphase.errors import InputError
from megaphase.tokenizer import Tokenizer

TEXTS = ["one two", "drei\nvier ▁ fünf", "😀" * 40, *(f"text number {n}" * 9 for n in range(80))]


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def ours(tok: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ours")
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
    """Every document a list of sequences of tokens."""
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
def test_what_megatron_wrote_becomes_what_tokenizing_gives(megatron, tok, ours, tmp_path, workers):
    eod = Tokenizer.load(tok).eod
    documents = [[[*tokens, eod]] for tokens in encoded(tok)]
    source = written_by_megatron(megatron, tmp_path / "old", documents)
    manifest = from_megatron(source, tok, tmp_path / "en", workers=workers)
    found, expected = corpus_bytes(tmp_path / "en"), corpus_bytes(ours)
    for suffix in (".bin", ".idx", ".hash"):
        assert found[suffix] == expected[suffix], suffix
    made = Corpus.open(ours).manifest
    assert (manifest.text_bytes, manifest.documents) == (made.text_bytes, made.documents)
    assert manifest.fingerprint == made.fingerprint
    verify(tmp_path / "en")


@pytest.mark.parametrize("dtype", [np.uint16, np.int64])
def test_sequences_are_joined_and_eod_is_added(megatron, tok, ours, tmp_path, dtype):
    eod = Tokenizer.load(tok).eod
    documents = [
        [tokens[:2], tokens[2:]] if len(tokens) > 2 else [tokens] for tokens in encoded(tok)
    ]
    documents.insert(3, [[eod]])
    source = written_by_megatron(megatron, tmp_path / "old", documents, dtype)
    manifest = from_megatron(source, tok, tmp_path / "en", workers=1)
    assert corpus_bytes(tmp_path / "en")[".bin"] == corpus_bytes(ours)[".bin"]
    assert manifest.skipped_empty == 1


def test_megatron_reads_ours(megatron, tok, ours):
    eod = Tokenizer.load(tok).eod
    dataset = megatron.IndexedDataset(str(ours))
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
        ([5, 6], 3, "old.bin: document 0 ends at token 3, the file at 2"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_left(tok, tmp_path, tokens, says, problem):
    source = index_of_one(tmp_path / "old", tokens, says)
    with pytest.raises(InputError) as error:
        from_megatron(source, tok, tmp_path / "out" / "en", workers=1)
    assert problem in str(error.value)
    assert files_of(tmp_path / "out") == []


def test_a_missing_file_is_named(tok, tmp_path):
    with pytest.raises(InputError, match=r"old\.idx: no such file"):
        from_megatron(tmp_path / "old", tok, tmp_path / "en", workers=1)
    index_of_one(tmp_path / "old", [1], 1)
    (tmp_path / "old.bin").unlink()
    with pytest.raises(InputError, match=r"old\.bin: no such file"):
        from_megatron(tmp_path / "old", tok, tmp_path / "en", workers=1)
