"""`data tokenize --shard I/N` and `data merge --shards` give the whole corpus, byte for byte."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
from data_support import CORPUS_FILES, corpus_bytes, files_of, make_tokenizer, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from megaphase.corpus import Manifest
from megaphase.data_tools.commands import data_app
from megaphase.data_tools.corpora.merge import merge
from megaphase.data_tools.shards import ShardChoice, existing_shards
from megaphase.data_tools.text import read_chunks
from megaphase.data_tools.tokenization import tokenize as module
from megaphase.data_tools.tokenization.tokenize import tokenize
from megaphase.utils.errors import InputError


@pytest.fixture(scope="module", params=["sentencepiece", "tokenizers"])
def tok(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), library=request.param)


def in_process(task, items, workers, *, with_children=False):
    """Return the results of an ordered pool without its processes."""
    yield from map(task, items)


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any),
    compressed=st.lists(st.booleans(), min_size=4, max_size=4),
    shards=st.integers(1, 9),
)
def test_shards_give_the_whole(tok, tmp_path, monkeypatch, sizes, compressed, shards) -> None:
    monkeypatch.setattr(module, "ordered_map", in_process)
    monkeypatch.setattr(
        module, "read_chunks", lambda *a, **options: read_chunks(*a, **options, chunk_bytes=100)
    )
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    inputs, number = [], 0
    for file, size in enumerate(sizes):
        texts = [f"document {number + i} " * (i % 5 + 1) for i in range(size)]
        number += size
        path = write_jsonl(tmp_path / f"{file}.jsonl", texts)
        if compressed[file]:
            path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
            path = path.with_suffix(".jsonl.gz")
        inputs.append(path)
    tokenize(inputs, tok, tmp_path / "whole", workers=1)
    for shard in range(shards):
        tokenize(inputs, tok, tmp_path / "en", workers=1, shard=ShardChoice(shard, shards))
    if shards > 1:
        merge(existing_shards(tmp_path / "en"), tmp_path / "en")
    assert corpus_bytes(tmp_path / "en") == corpus_bytes(tmp_path / "whole")


@pytest.fixture
def three(tok: Path, tmp_path: Path) -> Path:
    """Make three shards of a corpus and return its prefix."""
    path = write_jsonl(tmp_path / "text" / "a.jsonl", [f"number {i}" for i in range(50)])
    for number in range(3):
        tokenize([path], tok, tmp_path / "out" / "en", workers=1, shard=ShardChoice(number, 3))
    return tmp_path / "out" / "en"


@pytest.fixture(autouse=True)
def text_folder(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()


def test_shards_are_merged_all_and_in_order(three: Path) -> None:
    first, second, third = existing_shards(three)
    assert [path.name for path in (first, third)] == [
        "en.shard-00000-of-00003",
        "en.shard-00002-of-00003",
    ]
    for prefixes, message in (
        ([first, second], r"00001-of-00003\.json: shard 2 of 3 is missing after it"),
        ([second, third], r"00001-of-00003: is shard 1 of 3, and the ones before it are missing"),
        ([first, third, second], r"00002-of-00003: shard 1 of 3 is expected here"),
    ):
        with pytest.raises(InputError, match=message):
            merge(prefixes, three)
    assert merge([first, second, third], three).documents == 50
    assert Manifest.read(three).shard is None


def test_shards_of_other_text_do_not_belong(three: Path, tok: Path, tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "b.jsonl", [f"other {i}" for i in range(50)])
    tokenize([other], tok, three, workers=1, shard=ShardChoice(1, 3), overwrite=True)
    with pytest.raises(InputError, match=r"00001-of-00003: shard 1 of 3 is expected here"):
        merge(existing_shards(three), three)


def test_a_shard_that_is_there_is_not_made_again(three: Path, tok: Path, tmp_path: Path) -> None:
    prefix = existing_shards(three)[1]
    before = Path(f"{prefix}.bin").stat().st_mtime_ns
    path = tmp_path / "text" / "a.jsonl"
    manifest = tokenize([path], tok, three, workers=1, shard=ShardChoice(1, 3))
    assert manifest == Manifest.read(prefix)
    assert Path(f"{prefix}.bin").stat().st_mtime_ns == before
    path.write_text(json.dumps({"text": "other"}))
    with pytest.raises(InputError, match="exists already; pass --overwrite"):
        tokenize([path], tok, three, workers=1, shard=ShardChoice(1, 3))


def test_what_a_shard_cannot_do_is_said(tok: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "text" / "a.jsonl", ["one"])
    with pytest.raises(InputError, match=r"--shard: --dedup and --shuffle need all shards"):
        tokenize(
            [path], tok, tmp_path / "en", workers=1, shard=ShardChoice(0, 2), drop_duplicates=True
        )
    with pytest.raises(InputError, match="standard input cannot be divided"):
        tokenize([Path("-")], tok, tmp_path / "en", workers=1, shard=ShardChoice(0, 2))
    for text in ("3/3", "x", "1", "-1/3", "0/0"):
        with pytest.raises(InputError, match=f"--shard: '{text}' is not a valid shard; give I/N"):
            ShardChoice.parse(text)
    with pytest.raises(InputError, match=r"no en\.shard-… was found next to it; make them with"):
        existing_shards(tmp_path / "en")


def test_the_commands(three: Path) -> None:
    first = existing_shards(three)[0]
    for suffix in (".bin", ".idx", ".hash", ".sum", ".blocks", ".json"):
        shutil.copy(f"{first}{suffix}", f"{three}.shard-00000-of-00002{suffix}")
    arguments = ["merge", "--shards", "--out", str(three), "--remove"]
    result = CliRunner().invoke(data_app, arguments)
    assert "there are shards of a division by 2 and 3 next to it" in str(result.exception)
    for path in three.parent.glob("*-of-00002.*"):
        path.unlink()
    result = CliRunner().invoke(data_app, arguments)
    assert result.exit_code == 0, result.output
    assert " 50 " in result.stdout
    assert files_of(three.parent) == CORPUS_FILES


def test_sources_of_one_name_stay_apart(tok: Path, tmp_path: Path) -> None:
    """As a pattern over folders gives them."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    inputs = [
        write_jsonl(tmp_path / folder / "00.jsonl", [f"{folder} {i}" for i in range(9)])
        for folder in ("a", "b")
    ]
    tokenize(inputs, tok, tmp_path / "whole", workers=1)
    for shard in range(2):
        tokenize(inputs, tok, tmp_path / "en", workers=1, shard=ShardChoice(shard, 2))
    merge(existing_shards(tmp_path / "en"), tmp_path / "en")
    assert corpus_bytes(tmp_path / "en") == corpus_bytes(tmp_path / "whole")
    assert Manifest.read(tmp_path / "en").sources == ["00.jsonl", "00.jsonl"]


def invoked(*arguments: object) -> str:
    """Return the error of `data tokenize`."""
    found = CliRunner().invoke(data_app, ["tokenize", *map(str, arguments)])
    assert isinstance(found.exception, InputError), found.output
    return str(found.exception)


def test_a_division_into_one_part_is_none(tok: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one"])
    options = (path, "--tokenizer", tok, "--out", tmp_path / "en")
    assert "--shard: 0/1 is the whole corpus" in invoked(*options, "--shard", "0/1")
    said = invoked(*options, "--slurm", "--tasks", 1, "--dry-run")
    assert said == "--tasks: 1 is not a number of shards; give 2 to 99,999"


def test_what_the_jobs_would_refuse_is_refused_before_they_are_submitted(
    tok: Path, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three"])
    out = tmp_path / "en"
    slurm = (path, "--tokenizer", tok, "--out", out, "--slurm", "--tasks", 2, "--dry-run")
    for options, said in [
        ('--comment="abc', "--sbatch: cannot be parsed"),
        ("--array=0-63%8", "--sbatch: --array is not allowed there; --tasks says how many"),
        ("--output=log", "--sbatch: --output is not allowed there"),
        ("-p cpu", "--sbatch: '-p' is not an option"),
    ]:
        assert said in invoked(*slurm, "--sbatch", options)
    tokenize([path], tok, out, workers=1, shard=ShardChoice(0, 3))
    assert "belongs to a division by another number than 2" in invoked(*slurm)
    tokenize([path], tok, out, workers=1)
    assert f"{out}.json: exists already" in invoked(*slurm)
    stray = (path, "--tokenizer", tok, "--out", tmp_path / "fr", "--stdin-kind", "txt")
    assert "--stdin-kind: there is no - among the files" in invoked(*stray)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_corpus_does_not_take_the_place_of_its_text(
    overwrite: bool, tok: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    text, linked = folder / "en.json", folder / "link.json"
    text.write_text('{"text": "a document"}\n')
    linked.symlink_to(text)
    for path in (text, linked):
        for shard in (ShardChoice(0, 1), ShardChoice(0, 2)):
            with pytest.raises(InputError, match="is a text to be read, and the corpus would take"):
                tokenize([path], tok, folder / "en", workers=1, overwrite=overwrite, shard=shard)
    assert files_of(folder) == ["en.json", "link.json"]
    assert text.read_text() == '{"text": "a document"}\n'


@pytest.mark.parametrize("suffix", [".ids", ".sources", ".targets", ".skipped.jsonl"])
def test_no_file_that_is_there_is_replaced(suffix: str, tok: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["a document"])
    (tmp_path / f"en{suffix}").write_text("mine")
    with pytest.raises(InputError, match=f"en{suffix}: exists already"):
        tokenize([path], tok, tmp_path / "en", workers=1)
    assert (tmp_path / f"en{suffix}").read_text() == "mine"
