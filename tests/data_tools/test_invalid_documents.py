"""`data tokenize --on-error skip`: invalid documents are left out, counted and listed."""

from __future__ import annotations

import gzip
import io
import json
import re
from functools import partial
from pathlib import Path

import pytest
from data_support import corpus_bytes, files_of, make_tokenizer, write_jsonl
from rich.console import Console
from typer.testing import CliRunner

from megaphase.corpus import Corpus
from megaphase.data_tools.commands import data_app
from megaphase.data_tools.corpora.inspect import describe
from megaphase.data_tools.corpora.merge import merge
from megaphase.data_tools.text import read_chunks
from megaphase.data_tools.tokenization.tokenize import tokenize
from megaphase.utils.errors import InputError

GOOD = [f"text number {n} · नमस्ते" for n in range(300)]
WRONG = {
    1: (b"{not json", "is not valid JSON (Expecting property name enclosed in double quotes)"),
    7: (b'{"text": "caf\xe9"}', "is not UTF-8 text (byte 0xe9)"),
    8: (b'{"body": "x"}', "the key 'text' is missing; the keys are 'body'"),
    250: (b"[]", "is a list, not a JSON object"),
}


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Make the valid documents, with the invalid ones at their lines."""
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in GOOD]
    for number, (line, _) in WRONG.items():
        lines.insert(number - 1, line)
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def skipped(prefix: Path) -> list[dict]:
    return [json.loads(line) for line in Path(f"{prefix}.skipped.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_corpus_is_that_of_the_good_documents(tok, mixed, tmp_path, workers, monkeypatch):
    small_chunks = partial(read_chunks, chunk_bytes=2000)
    monkeypatch.setattr("megaphase.data_tools.tokenization.tokenize.read_chunks", small_chunks)
    manifest = tokenize([mixed], tok, tmp_path / "en", workers=workers, skip_wrong=True)
    good = write_jsonl(tmp_path / "good.jsonl", GOOD)
    tokenize([good], tok, tmp_path / "good", workers=1)
    found, expected = corpus_bytes(tmp_path / "en"), corpus_bytes(tmp_path / "good")
    for suffix in (".bin", ".idx", ".hash"):
        assert found[suffix] == expected[suffix], suffix
    assert (manifest.documents, manifest.skipped_wrong) == (len(GOOD), len(WRONG))
    assert skipped(tmp_path / "en") == [
        {
            "where": f"{mixed}:{number}",
            "problem": problem,
            "text": line.decode(errors="backslashreplace"),
        }
        for number, (line, problem) in WRONG.items()
    ]
    assert not Path(f"{tmp_path / 'good'}.skipped.jsonl").exists()


def test_without_it_a_wrong_one_ends_it_all(tok, mixed, tmp_path):
    with pytest.raises(InputError, match=r"mixed\.jsonl:\d+: is not"):
        tokenize([mixed], tok, tmp_path / "out" / "en", workers=1)
    assert files_of(tmp_path / "out") == []


def test_blocks_of_plain_text_are_skipped_one_by_one(tok, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\n\n\nthr\xffee\nfour\n\nfive\n\n\xfe\n")
    tokenize([path], tok, tmp_path / "en", workers=1, skip_wrong=True)
    (tmp_path / "b.txt").write_text("one\ntwo\n\nfive\n")
    tokenize([tmp_path / "b.txt"], tok, tmp_path / "b", workers=1)
    assert corpus_bytes(tmp_path / "en")[".bin"] == corpus_bytes(tmp_path / "b")[".bin"]
    assert skipped(tmp_path / "en") == [
        {
            "where": f"{path}:5",
            "problem": "is not UTF-8 text (byte 0xff)",
            "text": "thr\\xffee\nfour",
        },
        {"where": f"{path}:10", "problem": "is not UTF-8 text (byte 0xfe)", "text": "\\xfe"},
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt.gz"])
def test_a_document_of_more_than_16_mb_is_skipped(tok, tmp_path, name):
    large = "word " * (1 << 22)
    texts = [*GOOD[:2], large, *GOOD[2:]]
    if name == "a.jsonl":
        path = write_jsonl(tmp_path / name, texts)
    else:
        path = tmp_path / name
        path.write_bytes(gzip.compress("\n\n".join(texts).encode(), 1))
    with pytest.raises(InputError, match=r": a document of more than 16 MB begins here"):
        tokenize([path], tok, tmp_path / "out" / "en", workers=2)
    assert files_of(tmp_path / "out") == []
    found = tokenize([path], tok, tmp_path / "en", workers=2, skip_wrong=True)
    assert (found.documents, found.skipped_wrong) == (len(GOOD), 1)
    (record,) = skipped(tmp_path / "en")
    assert record["where"] == f"{path}:{3 if name == 'a.jsonl' else 5}"
    assert len(record["text"]) <= 1024
    tokenize([write_jsonl(tmp_path / "good.jsonl", GOOD)], tok, tmp_path / "good", workers=1)
    assert corpus_bytes(tmp_path / "en")[".bin"] == corpus_bytes(tmp_path / "good")[".bin"]


def test_where_all_is_wrong_there_is_no_corpus_and_no_list(tok, tmp_path):
    (tmp_path / "a.jsonl").write_text("[]\n{}\n")
    reason = f"{tmp_path / 'a.jsonl'}:1 is a list"
    message = f"the corpus would be empty: all 2 documents were skipped, the first because {reason}"
    with pytest.raises(InputError, match=re.escape(message)):
        tokenize([tmp_path / "a.jsonl"], tok, tmp_path / "out" / "en", workers=1, skip_wrong=True)
    assert files_of(tmp_path / "out") == []


def test_an_old_list_goes_with_the_old_corpus(tok, mixed, tmp_path):
    prefix = tmp_path / "en"
    tokenize([mixed], tok, prefix, workers=1, skip_wrong=True)
    good = write_jsonl(tmp_path / "good.jsonl", GOOD)
    manifest = tokenize([good], tok, prefix, workers=1, skip_wrong=True, overwrite=True)
    assert manifest.skipped_wrong == 0
    assert not Path(f"{prefix}.skipped.jsonl").exists()


def test_the_command_says_how_many_and_where(tok, mixed, tmp_path):
    prefix = tmp_path / "en"
    arguments = [
        "tokenize", str(mixed), "--tokenizer", str(tok), "--out", str(prefix), "--on-error", "skip",
    ]  # fmt: skip
    result = CliRunner().invoke(data_app, arguments)
    assert result.exit_code == 0, result.output
    assert (
        result.stdout.splitlines()[-1]
        == f"Invalid documents skipped: 4, see {prefix}.skipped.jsonl"
    )
    merge([prefix], tmp_path / "merged")
    assert Corpus.open(tmp_path / "merged").manifest.skipped_wrong == 4
    shown = io.StringIO()
    Console(file=shown, width=120).print(describe(tmp_path / "merged"))
    assert "300 (4 wrong left out)" in shown.getvalue()
