"""Text read from stores: the same chunks as of local files, resumed, in shards, and faults."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from data_support import corpus_bytes, make_tokenizer, write_jsonl
from remote_support import BUCKET, FaultyProxy, s3_server
from test_arrow_files import save_dataset
from test_text_parts import KINDS, written
from typer.testing import CliRunner

from megaphase.cli import app
from megaphase.data_tools.shards import ShardChoice
from megaphase.data_tools.text import Reading, expand_inputs, read_chunks
from megaphase.data_tools.text import chunks as chunks_module
from megaphase.data_tools.tokenization import tokenize as module
from megaphase.data_tools.tokenization.tokenize import tokenize
from megaphase.utils import remote_files
from megaphase.utils.errors import InputError, RunError
from megaphase.utils.remote_files import write_bytes

LINES = [f"line {i} " + "x" * (i % 7) if i % 9 else "" for i in range(60)]


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyProxy]:
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as proxy:
        yield proxy


@pytest.fixture
def s3(server: FaultyProxy) -> Iterator[FaultyProxy]:
    server.requests.clear()
    yield server
    server.fail(None)


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), library="tokenizers")


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_those_of_the_local_file(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_files, "BLOCK_BYTES", 64)
    path, reading, _ = written(tmp_path, kind, LINES)
    url = f"memory://parts-{kind.replace(' ', '-')}/{path.name}"
    write_bytes(url, path.read_bytes())
    (remote,) = expand_inputs([url])

    def facts(file, **part):
        chunks = read_chunks(file, reading, chunk_bytes=100, **part)
        return [(it.start, it.end, it.data, it.file_begin, it.first_line) for it in chunks]

    whole = facts(path)
    assert facts(remote) == whole
    size = path.stat().st_size
    for begin, end in [(0, size // 3), (size // 3, size // 2), (size // 2, size)]:
        assert facts(remote, begin=begin, end=end) == facts(path, begin=begin, end=end)
    for _, after, *_ in whole[:3]:
        assert facts(remote, start=after) == facts(path, start=after)


def test_urls_patterns_and_saved_datasets_are_expanded(tmp_path: Path, s3: FaultyProxy) -> None:
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl"):
        write_bytes(f"s3://{BUCKET}/text/{name}", b'{"text": "a"}\n')
    found = [str(it) for it in expand_inputs([f"s3://{BUCKET}/text/**/*.jsonl"])]
    assert found == [
        f"s3://{BUCKET}/text/{name}" for name in ("a.jsonl", "b.jsonl", "deep/c.jsonl")
    ]
    for file in save_dataset(tmp_path / "ds", ["a", "b"], 2).iterdir():
        write_bytes(f"s3://{BUCKET}/ds/{file.name}", file.read_bytes())
    files = expand_inputs([f"s3://{BUCKET}/ds"])
    assert [it.name for it in files] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for wrong, message in {
        f"s3://{BUCKET}/text/*.txt": r"no file matches; check the pattern",
        f"s3://{BUCKET}/text": r"text: is a folder; give the files in it, or a pattern",
        f"s3://{BUCKET}/none.jsonl": r"no such file, folder or bucket",
    }.items():
        with pytest.raises(InputError, match=message):
            expand_inputs([wrong])
    with pytest.raises(InputError, match="is given twice"):
        expand_inputs([f"s3://{BUCKET}/text/a.jsonl", f"s3://{BUCKET}/text/*.jsonl"])
    write_bytes(f"s3://{BUCKET}/empty.jsonl.gz", b"")
    with pytest.raises(InputError, match="is truncated: it has no bytes"):
        expand_inputs([f"s3://{BUCKET}/empty.jsonl.gz"])
    write_bytes(f"s3://{BUCKET}/a.warc.gz", b"x")
    with pytest.raises(InputError, match=r"unknown kind of file; its name must end in \.jsonl"):
        expand_inputs([f"s3://{BUCKET}/a.warc.gz"])


def texts(seed: int, count: int = 400) -> list[str]:
    chance = random.Random(seed)
    words = ["one", "two", "three", "vier", "fünf"]
    return [" ".join(chance.choice(words) for _ in range(60)) for _ in range(count)]


def test_a_corpus_from_s3_equals_the_local_one_also_resumed_and_in_shards(
    tmp_path: Path, s3: FaultyProxy, tok: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAVE_BYTES_PER_WORKER", 8_000)
    monkeypatch.setattr(remote_files, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr(chunks_module, "_PIECE_BYTES", 4_000)
    chunks = module.read_chunks
    monkeypatch.setattr(module, "read_chunks", lambda *a, **o: chunks(*a, **o, chunk_bytes=4_000))
    for name, seed in (("a.jsonl", 1), ("b.jsonl", 2)):
        path = write_jsonl(tmp_path / name, texts(seed))
        write_bytes(f"s3://{BUCKET}/job/{name}", path.read_bytes())
    files = expand_inputs([f"s3://{BUCKET}/job/*"])
    whole, out = tmp_path / "whole", tmp_path / "out"
    tokenize([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tok, whole, workers=1)

    reads = s3.count("GET", "a.jsonl")
    s3.fault = lambda method, path: 503 if "b.jsonl" in path and s3.count("GET", "b.jsonl") > 4 else None  # noqa: E501  # fmt: skip
    with pytest.raises(RunError, match=r"tried 3 times; .*documents are tokenized and saved: the"):
        tokenize(files, tok, out, workers=1)
    assert s3.count("GET", "a.jsonl") > reads
    s3.fail(None)
    s3.requests.clear()
    tokenize(files, tok, out, workers=1)
    assert s3.count("GET", "a.jsonl") == 0  # it resumed within b.jsonl
    assert corpus_bytes(out) == corpus_bytes(whole)

    shards = [ShardChoice(number, 3) for number in range(3)]
    for shard in shards:
        tokenize(files, tok, tmp_path / "parts", workers=1, shard=shard)
    merged = CliRunner().invoke(
        app, ["data", "merge", "--shards", "--out", str(tmp_path / "parts")]
    )
    assert merged.exit_code == 0, merged.output
    assert corpus_bytes(tmp_path / "parts").keys() == corpus_bytes(whole).keys()
    assert corpus_bytes(tmp_path / "parts")[".bin"] == corpus_bytes(whole)[".bin"]
    manifest = json.loads((tmp_path / "out.json").read_text())
    assert manifest["sources"] == ["a.jsonl", "b.jsonl"]


def test_a_changed_object_starts_over(tmp_path: Path, s3: FaultyProxy, tok: Path) -> None:
    url = f"s3://{BUCKET}/changed.jsonl"
    write_bytes(url, write_jsonl(tmp_path / "x", texts(1, 5)).read_bytes())
    before = module.check_tokenization(expand_inputs([url]), tok, Reading(), None, module.WHOLE)
    again = module.check_tokenization(expand_inputs([url]), tok, Reading(), None, module.WHOLE)
    assert before.job == again.job
    write_bytes(url, write_jsonl(tmp_path / "x", texts(2, 5)).read_bytes())
    after = module.check_tokenization(expand_inputs([url]), tok, Reading(), None, module.WHOLE)
    assert before.job != after.job


def test_memory_does_not_grow_with_the_object() -> None:
    line = json.dumps({"text": "word " * 200}).encode() + b"\n"
    write_bytes("memory://large/a.jsonl", line * 60_000)  # 60 MB
    (file,) = expand_inputs(["memory://large/a.jsonl"])
    tracemalloc.start()
    rows = sum(chunk.data.count(b"\n") for chunk in read_chunks(file, Reading()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows == 60_000
    assert peak < 40_000_000


def test_commands_take_urls(tmp_path: Path, s3: FaultyProxy) -> None:
    url = f"s3://{BUCKET}/cli/en.jsonl"
    write_bytes(url, write_jsonl(tmp_path / "x", texts(3, 300)).read_bytes())
    run = CliRunner().invoke
    made = run(app, ["tokenizer", "train", "--input", f"en={url}", "--vocab-size", "292",
                     "--out", str(tmp_path / "tok")])  # fmt: skip
    assert made.exit_code == 0, made.output
    done = run(app, ["data", "tokenize", url, "--tokenizer", str(tmp_path / "tok"),
                     "--out", str(tmp_path / "en"), "--workers", "1"])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "en.json").read_text())["documents"] == 300
