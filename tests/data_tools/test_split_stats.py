"""`data split` and `data stats`."""

from __future__ import annotations

import io
import random
from collections import Counter
from pathlib import Path
from statistics import median_low

import numpy as np
import pytest
from data_support import edit_bytes, files_of, make_tokenizer, megatron_documents, write_jsonl
from rich.console import Console
from typer.testing import CliRunner

from megaphase.corpus import Corpus, CorpusWriter
from megaphase.corpus.format import document_hash
from megaphase.data_tools.commands import data_app
from megaphase.data_tools.corpora.split import split
from megaphase.data_tools.corpora.stats import corpus_stats, stats_tables, tokenizer_of
from megaphase.data_tools.corpora.verify import verify_corpus
from megaphase.data_tools.tokenization.tokenize import tokenize
from megaphase.plan.stream import Stream
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError

WORDS = ["one", "two", "three", "vier", "fünf", "sechs"]


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def texts() -> list[str]:
    chance = random.Random(2)
    return [" ".join(chance.choices(WORDS, k=chance.randint(1, 4))) for _ in range(300)]


@pytest.fixture
def corpus(tok: Path, tmp_path: Path, texts: list[str]) -> Path:
    tokenize([write_jsonl(tmp_path / "a.jsonl", texts)], tok, tmp_path / "en", workers=1)
    return tmp_path / "en"


def test_both_parts_are_whole_and_in_order(corpus: Path, tmp_path: Path, texts) -> None:
    train, held_out = split(corpus, tmp_path / "train", tmp_path / "test", 0.25)
    is_held_out = [
        int.from_bytes(document_hash(text.encode()), "little") < 0.25 * 2**64 for text in texts
    ]
    every = megatron_documents(corpus)
    for name, manifest, side in (("train", train, False), ("test", held_out, True)):
        expected = [
            document for document, held in zip(every, is_held_out, strict=True) if held == side
        ]
        assert megatron_documents(tmp_path / name) == expected
        assert verify_corpus(tmp_path / name) == manifest
        assert manifest.text_bytes == sum(
            len(text.encode())
            for text, held in zip(texts, is_held_out, strict=True)
            if held == side
        )


def test_the_held_out_part_is_the_one_that_training_holds_out(tmp_path: Path) -> None:
    with CorpusWriter(tmp_path / "en", tokenizer_hash="t", vocab_size=999, eod=0) as writer:
        for i in range(200):
            writer.add_document([1, 2, 3], f"text {i}")
    split(tmp_path / "en", tmp_path / "train", tmp_path / "test", 0.1)
    stream = Stream(
        "en", Corpus.open(tmp_path / "en"), seed=1, seq_len=4, fraction=0.1, split="validation"
    )
    assert len(Corpus.open(tmp_path / "test").lengths) == stream.documents
    assert 0 < stream.documents < 200


def test_a_part_that_would_be_empty_or_exists_is_refused(corpus: Path, tmp_path: Path) -> None:
    before = files_of(tmp_path)
    train, test = tmp_path / "train", tmp_path / "test"
    for places, fraction, message in (
        ((train, test), 1e-9, r"1e-09 holds out none of the 300 documents of .*en; raise it"),
        ((train, test), 1.5, "1.5 is not between 0 and 1"),
        ((train, train), 0.1, "must be three different prefixes"),
        ((corpus, test), 0.1, "must be three different prefixes"),
    ):
        with pytest.raises(InputError, match=message):
            split(corpus, *places, fraction)
    assert files_of(tmp_path) == before
    split(corpus, train, test, 0.3)
    with pytest.raises(InputError, match=r"train\.json: exists already"):
        split(corpus, train, tmp_path / "other", 0.3)


def test_a_damaged_corpus_is_not_split(corpus: Path, tmp_path: Path) -> None:
    edit_bytes(Path(f"{corpus}.sum"), 4, b"xyz")
    before = files_of(tmp_path)
    with pytest.raises(InputError, match=r"en\.sum: was altered at document 0"):
        split(corpus, tmp_path / "train", tmp_path / "test", 0.3)
    assert files_of(tmp_path) == before


def test_pairs_are_split_by_their_source(tmp_path: Path) -> None:
    """The same source in two languages, and several times in one, is in one part."""
    sources = [f"source {i % 40}" for i in range(120)]
    sides: dict[str, set[bool]] = {source: set() for source in sources}
    for language, tag in (("fr", 5), ("hi", 6)):
        with CorpusWriter(
            tmp_path / language, tokenizer_hash="t", vocab_size=999, eod=0, tag=tag
        ) as writer:
            for i, source in enumerate(sources):
                writer.add_document([100 + i % 40, tag, 200 + i], source)
        split(tmp_path / language, tmp_path / f"{language}-a", tmp_path / f"{language}-b", 0.3)
        for part in "ab":
            for source, *_ in megatron_documents(tmp_path / f"{language}-{part}"):
                sides[f"source {source - 100}"].add(part == "b")
            assert Corpus.open(tmp_path / f"{language}-{part}").manifest.tag == tag
    assert all(len(side) == 1 for side in sides.values())
    assert len(set.union(*sides.values())) == 2


def test_stats_are_those_of_a_slow_count(corpus: Path, texts: list[str]) -> None:
    stats = corpus_stats(corpus)
    documents = megatron_documents(corpus)
    counts = Counter(token for document in documents for token in document)
    assert {i: n for i, n in enumerate(stats.token_counts.tolist()) if n} == dict(counts)
    assert stats.duplicates == len(texts) - len(set(texts))
    assert stats.median_length == median_low(list(map(len, documents)))
    assert stats.vocabulary_used == len(counts) / stats.manifest.vocab_size


def test_a_damaged_corpus_has_no_stats(corpus: Path) -> None:
    edit_bytes(Path(f"{corpus}.bin"), 4, b"x")
    with pytest.raises(InputError, match=r"en\.bin: was altered in document 0"):
        corpus_stats(corpus)


def test_the_tables_compare_corpora(corpus: Path, tok: Path, tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "b.jsonl", ["one", "one", "\N{ROMAN NUMERAL ONE HUNDRED THOUSAND}"]
    )
    tokenize([path], tok, tmp_path / "xx", workers=1)
    result = CliRunner().invoke(
        data_app,
        ["stats", str(corpus), str(tmp_path / "xx"), "--tokenizer", str(tok)],
        env={"COLUMNS": "200"},
    )
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if f"{tmp_path / 'xx'}" in line]
    tokens = Corpus.open(tmp_path / "xx").manifest.tokens
    other = Corpus.open(corpus).manifest.tokens
    smoothed = tokens ** (1 / 3.3), other ** (1 / 3.3)
    assert rows[0][1:4] == ["3", "33.3%", f"{tokens}"]
    assert rows[0][4:6] == [
        f"{tokens / (tokens + other):.1%}",
        f"{smoothed[0] / sum(smoothed):.1%}",
    ]
    tokenizer = Tokenizer.load(tok)
    pieces = [tokenizer.piece(t) for each in megatron_documents(tmp_path / "xx") for t in each[:-1]]
    single_bytes = sum(piece.startswith("<0x") for piece in pieces) / len(pieces)
    assert rows[2][1] == f"{single_bytes:.2%}"
    assert 0 < single_bytes < 1
    other_tok = make_tokenizer(tmp_path / "other", seed=9)
    with pytest.raises(InputError, match="en: was made with another tokenizer than"):
        tokenizer_of([corpus], other_tok)


def test_stats_fit_a_terminal(corpus: Path, tok: Path, tmp_path: Path) -> None:
    screen = io.StringIO()
    (tmp_path / "a").mkdir()
    Console(file=screen, width=100).print(
        stats_tables({Path("data/en"): corpus_stats(corpus)}, tokenizer_of([corpus], tok))
    )
    assert "…" not in screen.getvalue()
    assert np.all(np.array(list(map(len, screen.getvalue().splitlines()))) <= 100)
