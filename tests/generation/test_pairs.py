"""Translation pairs from text to corpus: source, tag, target, EOD."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_support import CORPORA, corpus_bytes, make_tokenizer, megatron_documents
from typer.testing import CliRunner

from megaphase.corpus import Corpus
from megaphase.corpus.format import document_hash
from megaphase.data_tools.commands import data_app
from megaphase.data_tools.corpora.verify import verify_corpus
from megaphase.data_tools.text import Reading
from megaphase.data_tools.tokenization.tokenize import tokenize
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError

PAIRS = [("one two", "un deux"), ("one two", "eins"), ("<fr> three", "trois <fr>"), ("four", "")]


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write_pairs(path: Path, pairs=PAIRS) -> Path:
    path.write_text("".join(json.dumps({"src": s, "tgt": t}) + "\n" for s, t in pairs))
    return path


def test_a_document_is_source_tag_target(tok: Path, tmp_path: Path) -> None:
    manifest = tokenize(
        [write_pairs(tmp_path / "a.jsonl")],
        tok,
        tmp_path / "en-fr",
        reading=Reading(pair=("src", "tgt")),
        tag="fr",
        workers=2,
    )
    tokenizer = Tokenizer.load(tok)
    tag = tokenizer.tags["fr"]
    kept = PAIRS[:3]
    expected = [
        [*tokenizer.encode(source), tag, *tokenizer.encode(target), tokenizer.eod]
        for source, target in kept
    ]
    documents = megatron_documents(tmp_path / "en-fr")
    assert documents == expected
    assert all(document.count(tag) == 1 for document in documents)
    assert (manifest.kind, manifest.tag, manifest.skipped_empty) == ("translation", tag, 1)
    assert manifest.text_bytes == sum(len((s + t).encode()) for s, t in kept)
    hashes = Corpus.open(tmp_path / "en-fr").hashes.tobytes()
    assert hashes == b"".join(document_hash(source.encode()) for source, _ in kept)
    assert verify_corpus(tmp_path / "en-fr") == manifest


def test_the_command(tok: Path, tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "a.jsonl")
    arguments = ["tokenize", str(path), "--tokenizer", str(tok), "--out", str(tmp_path / "x")]
    keys = ["--source-key", "src", "--target-key", "tgt"]
    for extra, message in (
        (
            [*keys],
            "--tag: translation pairs need a tag for the target; the tokenizer's tags are fr, hi",
        ),
        ([*keys, "--tag", "de"], "--tag: the tokenizer has no tag 'de'; the tokenizer's tags are"),
        (["--tag", "fr"], "--tag: only translation pairs have a tag; leave it out"),
        (keys[:2], "--target-key: a pair has two keys; give both or none"),
    ):
        result = CliRunner().invoke(data_app, [*arguments, *extra])
        assert isinstance(result.exception, InputError)
        assert message in str(result.exception)
    tokenizer = Tokenizer.load(tok)
    for tag, token in (("hi", tokenizer.tags["hi"]), ("reserved_2", tokenizer.reserved_tags[2])):
        result = CliRunner().invoke(data_app, [*arguments, *keys, "--tag", tag, "--overwrite"])
        assert result.exit_code == 0, result.output
        assert Corpus.open(tmp_path / "x").manifest.tag == token


def test_exact_pairs_are_duplicates_and_sources_alone_are_not(tok: Path, tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "a.jsonl", [*PAIRS[:2], PAIRS[0]])
    manifest = tokenize(
        [path],
        tok,
        tmp_path / "x",
        reading=Reading(pair=("src", "tgt")),
        tag="fr",
        workers=1,
        drop_duplicates=True,
    )
    assert (manifest.documents, manifest.skipped_duplicates, manifest.kind) == (2, 1, "translation")


@pytest.mark.skipif(not CORPORA.exists(), reason="../shared/corpora is not there")
def test_real_pairs(tok: Path, tmp_path: Path) -> None:
    path = CORPORA / "translation" / "en-eu.jsonl.gz"
    for workers in (1, 2):
        manifest = tokenize(
            [path],
            tok,
            tmp_path / str(workers),
            reading=Reading(pair=("src", "tgt")),
            tag="fr",
            workers=workers,
        )
    assert manifest.documents == 1_703
    assert corpus_bytes(tmp_path / "1") == corpus_bytes(tmp_path / "2")
