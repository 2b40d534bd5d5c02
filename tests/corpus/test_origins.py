"""Every document's own id and file, through all tools that make corpora from text or corpora."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
from data_support import corpus_bytes, edit_bytes, make_tokenizer
from typer.testing import CliRunner

from megaphase.corpus import Corpus, CorpusWriter, Manifest
from megaphase.corpus.origins import Origin
from megaphase.data_tools.corpora.merge import merge
from megaphase.data_tools.corpora.split import split
from megaphase.data_tools.corpora.verify import verify_corpus
from megaphase.data_tools.shards import ShardChoice
from megaphase.data_tools.tokenization.tokenize import tokenize
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], dict[str, Origin]]:
    """Make files of every kind; return them and each document's origin, by its text."""
    folder, chance = tmp_path_factory.mktemp("text"), random.Random(4)
    expected: dict[str, Origin] = {}

    def text(name: str, own_id: str | None) -> str:
        made = f"{len(expected)} " + " ".join(chance.choices("abcde", k=20))
        expected[made] = Origin(own_id, name)
        return made

    ids: list[object] = ["wiki-3", 17, "Zürich ⟨1⟩", "", None, 2.5, True, ["x"], "a\nb", 10**30]
    known = ["wiki-3", "17", "Zürich ⟨1⟩", None, None, None, None, None, "a\nb", str(10**30)]
    with gzip.open(folder / "a.jsonl.gz", "wt") as file:
        for own_id, said in zip(ids, known, strict=True):
            file.write(json.dumps({"id": own_id, "text": text("a.jsonl.gz", said)}) + "\n")
        half = text("a.jsonl.gz", "\\ud83d!")
        file.write('{"text": "%s", "id": "\\ud83d!"}\n' % half)  # noqa: UP031
        file.write(json.dumps({"id": "no token", "text": ""}) + "\n")
    (folder / "b.txt").write_text("\n\n".join(text("b.txt", None) for _ in range(5)))
    many = ({"text": text("c.jsonl", f"c{i}"), "id": f"c{i}"} for i in range(300))
    (folder / "c.jsonl").write_text("".join(json.dumps(each) + "\n" for each in many))
    return [folder / "a.jsonl.gz", folder / "b.txt", folder / "c.jsonl"], expected


def origins_of(prefix: Path, tok: Path) -> dict[str, Origin]:
    corpus, tokenizer = Corpus.open(prefix), Tokenizer.load(tok)
    assert corpus.origins is not None
    found = {
        tokenizer.decode(corpus.document(number)): corpus.origins[number]
        for number in range(len(corpus.lengths))
    }
    assert len(found) == len(corpus.lengths)
    return found


def test_of_every_kind_of_file_and_id(texts, tok, tmp_path):
    inputs, expected = texts
    tokenize(inputs, tok, tmp_path / "all", workers=2)
    assert origins_of(tmp_path / "all", tok) == expected
    verify_corpus(tmp_path / "all")


def test_of_parquet_rows(tok, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = {"text": ["one", "two"], "id": [3, None]}
    pq.write_table(pa.table(rows), tmp_path / "n.parquet")
    rows = {"id": ["a", "b"], "text": ["three", "four"]}
    pq.write_table(pa.table(rows), tmp_path / "s.parquet")
    other = {"text": ["five"], "id": [{"of": "another kind"}]}
    pq.write_table(pa.table(other), tmp_path / "o.parquet")
    inputs = [tmp_path / f"{name}.parquet" for name in "nso"]
    tokenize(inputs, tok, tmp_path / "rows", workers=1)
    assert origins_of(tmp_path / "rows", tok) == {
        "one": Origin("3", "n.parquet"),
        "two": Origin(None, "n.parquet"),
        "three": Origin("a", "s.parquet"),
        "four": Origin("b", "s.parquet"),
        "five": Origin(None, "o.parquet"),
    }


def test_they_go_with_the_documents(texts, tok, tmp_path):
    """Through shards, merging, duplicates, another order and two parts."""
    inputs, expected = texts
    tokenize(inputs, tok, tmp_path / "all", workers=1)
    shards = [ShardChoice(number, 3) for number in range(3)]
    for shard in shards:
        tokenize(inputs, tok, tmp_path / "all2", workers=1, shard=shard)
    merge([shard.prefix(tmp_path / "all2") for shard in shards], tmp_path / "merged")
    assert corpus_bytes(tmp_path / "merged") == corpus_bytes(tmp_path / "all")
    assert Path(tmp_path / "merged.ids").read_bytes() == Path(tmp_path / "all.ids").read_bytes()

    # The files have other numbers in a corpus of the last two.
    tokenize(inputs[1:], tok, tmp_path / "some", workers=1)
    merge(
        [tmp_path / "some", tmp_path / "all"],
        tmp_path / "once",
        drop_duplicates=True,
        shuffle_seed=3,
    )
    assert Manifest.read(tmp_path / "once").sources == ["b.txt", "c.jsonl", "a.jsonl.gz"]
    assert origins_of(tmp_path / "once", tok) == expected

    split(tmp_path / "once", tmp_path / "train", tmp_path / "held", 0.2)
    train, held = origins_of(tmp_path / "train", tok), origins_of(tmp_path / "held", tok)
    assert train | held == expected
    assert not train.keys() & held.keys()


def test_a_large_shuffle_keeps_them(texts, tok, tmp_path, monkeypatch):
    inputs, expected = texts
    monkeypatch.setattr("megaphase.data_tools.corpora.shuffle._BUCKET_BYTES", 4_000)
    tokenize(inputs, tok, tmp_path / "all", workers=1, shuffle_seed=8)
    assert origins_of(tmp_path / "all", tok) == expected


def write_without(prefix: Path, tok: Path, documents: int) -> None:
    """Write a corpus as an earlier version did."""
    tokenizer = Tokenizer.load(tok)
    with CorpusWriter(
        prefix,
        tokenizer_hash=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        sources=["old.txt"],
    ) as writer:
        for number in range(documents):
            text = f"old {number}"
            writer.add_document(tokenizer.encode_arrays([text])[0], text)


def test_corpora_that_do_not_tell(texts, tok, tmp_path):
    inputs, expected = texts
    write_without(tmp_path / "old", tok, 4)
    assert Corpus.open(tmp_path / "old").origins is None
    assert not (tmp_path / "old.sources").exists()
    merge([tmp_path / "old"], tmp_path / "again")
    assert Corpus.open(tmp_path / "again").origins is None
    tokenize(inputs[:1], tok, tmp_path / "new", workers=1)
    for order in ([tmp_path / "old", tmp_path / "new"], [tmp_path / "new", tmp_path / "old"]):
        merge(order, tmp_path / "both", overwrite=True, shuffle_seed=1)
        found = [*origins_of(tmp_path / "both", tok).values()]
        assert found.count(Origin(None, None)) == 4
        told = [origin for text, origin in expected.items() if origin.source == "a.jsonl.gz"]
        assert sorted(map(str, found)) == sorted(map(str, [*told, *[Origin(None, None)] * 4]))
    # When one replaces another, nothing of the other remains.
    merge([tmp_path / "old"], tmp_path / "both", overwrite=True)
    assert not (tmp_path / "both.sources").exists()
    assert not (tmp_path / "both.ids").exists()


@pytest.mark.parametrize("suffix", [".sources", ".ids"])
def test_damage_is_found(texts, tok, tmp_path, suffix):
    tokenize(texts[0], tok, tmp_path / "all", workers=1)
    path = Path(f"{tmp_path / 'all'}{suffix}")
    edit_bytes(path, 12 if suffix == ".ids" else 30, b"\xff\xff\xff")
    with pytest.raises(InputError, match="was altered"):
        verify_corpus(tmp_path / "all")
    with pytest.raises(InputError, match=r"has no valid origin for document|do not ascend"):
        [Corpus.open(tmp_path / "all").origins[number] for number in range(4)]  # type: ignore[index]
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        assert Corpus.open(tmp_path / "all").origins


def test_inspect_shows_them(texts, tok, tmp_path):
    from typer import Typer

    from megaphase.data_tools.corpora.commands import inspect_corpus_command

    app = Typer()
    app.command()(inspect_corpus_command)
    tokenize(texts[0], tok, tmp_path / "all", workers=1)
    prefix = str(tmp_path / "all")
    size = Path(f"{prefix}.ids").stat().st_size
    shown = CliRunner().invoke(app, [prefix], terminal_width=200)
    assert f"the file of each document, and {size:,} bytes of ids" in shown.stdout
    for number, said in ((0, "id wiki-3, from a.jsonl.gz"), (3, "from a.jsonl.gz")):
        arguments = [prefix, "--tokenizer", str(tok), "--document", str(number)]
        shown = CliRunner().invoke(app, arguments)
        assert shown.stderr == f"document {number}: {said}\n"
        assert shown.stdout.startswith(f"{number} ")
    write_without(tmp_path / "old", tok, 1)
    shown = CliRunner().invoke(
        app, [str(tmp_path / "old"), "--tokenizer", str(tok), "--document", "0"]
    )
    assert shown.stderr == "document 0: its origin is not recorded\n"
