"""Several readers on one machine: the corpus is that of one reader, byte for byte."""

from __future__ import annotations

import gzip
import json
import os
import signal
from pathlib import Path

import pytest
from data_support import (
    corpus_bytes,
    is_running,
    make_tokenizer,
    start_python,
    wait_until,
    write_jsonl,
)

from megaphase.corpus import Manifest
from megaphase.data_tools.shards import ShardChoice, parts_of
from megaphase.data_tools.text import STDIN
from megaphase.data_tools.tokenization import readers
from megaphase.data_tools.tokenization.readers import reader_count
from megaphase.data_tools.tokenization.tokenize import tokenize
from megaphase.utils.errors import InputError


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """Make three compressed files and a plain one."""
    paths, number = [], 0
    for name, size in (("a", 300), ("b", 20), ("c", 400), ("d", 5)):
        texts = [f"document {number + i} " * (i % 5 + 1) for i in range(size)]
        number += size
        path = write_jsonl(tmp_path / f"{name}.jsonl", texts)
        if name != "d":
            path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
            path = path.with_suffix(".jsonl.gz")
        paths.append(path)
    return paths


@pytest.fixture
def one_worker_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "WORKERS_PER_READER", 1)


def test_readers_have_up_to_64_workers_and_whole_files(inputs: list[Path]) -> None:
    assert [reader_count(inputs, workers) for workers in (1, 64, 65, 128, 129, 999)] == [
        1, 1, 2, 2, 3, 3,
    ]  # fmt: skip
    assert reader_count(inputs[3:], 999) == 1
    assert reader_count([*inputs, STDIN], 999) == 1
    for of in (1, 2, 3, 7):
        shards = [ShardChoice(number, of, by_file=True) for number in range(of)]
        parts = [part for shard in shards for part in parts_of(inputs, shard)]
        assert [(part.file, part.begin, part.end) for part in parts] == [
            (file, 0, None) for file in range(4)
        ]


@pytest.mark.usefixtures("one_worker_each")
@pytest.mark.parametrize("options", [{}, {"drop_duplicates": True, "shuffle_seed": 3}])
def test_the_corpus_does_not_depend_on_the_readers(
    tok: Path, inputs: list[Path], tmp_path: Path, options: dict[str, object]
) -> None:
    tokenize(inputs, tok, tmp_path / "one", workers=1, **options)  # type: ignore[arg-type]
    before = set(os.listdir(tmp_path))
    tokenize(inputs, tok, tmp_path / "en", workers=3, **options)  # type: ignore[arg-type]
    assert corpus_bytes(tmp_path / "en") == corpus_bytes(tmp_path / "one")
    assert Manifest.read(tmp_path / "en") == Manifest.read(tmp_path / "one")
    assert {name.partition(".")[0] for name in set(os.listdir(tmp_path)) - before} == {"en"}


@pytest.mark.usefixtures("one_worker_each")
def test_the_first_wrong_line_is_named_and_the_rest_resumes(
    tok: Path, inputs: list[Path], tmp_path: Path
) -> None:
    tokenize(inputs, tok, tmp_path / "one", workers=1)
    whole = inputs[0].read_bytes()
    changed = inputs[0].stat().st_mtime_ns
    for number in (2, 0):  # the last file's error is found first
        lines = gzip.decompress(inputs[number].read_bytes()).splitlines(keepends=True)
        lines[-1] = b"oops\n"
        inputs[number].write_bytes(gzip.compress(b"".join(lines), mtime=0))
    with pytest.raises(InputError, match=r"a\.jsonl\.gz:300: is not valid JSON"):
        tokenize(inputs, tok, tmp_path / "en", workers=2)
    inputs[0].write_bytes(whole)
    os.utime(inputs[0], ns=(changed, changed))
    with pytest.raises(InputError, match=r"c\.jsonl\.gz:400: is not valid JSON"):
        tokenize(inputs, tok, tmp_path / "en", workers=2)
    tokenize(inputs, tok, tmp_path / "en", workers=3, skip_wrong=True)
    skipped = Path(f"{tmp_path / 'en'}.skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["where"] for line in skipped] == [f"{inputs[2]}:400"]
    left = {path.name for path in tmp_path.iterdir() if "unordered" in path.name}
    assert not left


RUN = """if True:
    import sys
    from pathlib import Path
    from megaphase.data_tools.tokenization import readers
    from megaphase.data_tools.tokenization.tokenize import tokenize
    if __name__ == "__main__":
        readers.WORKERS_PER_READER = 1
        tokenizer, prefix, *inputs = map(Path, sys.argv[1:])
        tokenize(inputs, tokenizer, prefix, workers=2)
"""


def descendants(process: int) -> list[int]:
    """Return the ids of a process's children and of theirs."""
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    children = [int(child) for each in tasks for child in each.read_text().split()]
    return [*children, *(each for child in children for each in descendants(child))]


def test_no_process_outlives_the_main_one(tok: Path, tmp_path: Path) -> None:
    text = "".join(json.dumps({"text": f"document {n} " * 40}) + "\n" for n in range(40_000))
    inputs = [tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz"]
    for path in inputs:
        path.write_bytes(gzip.compress(text.encode(), 1))
    main = start_python(RUN, tok, tmp_path / "en", *inputs)
    wait_until(lambda: len(list(tmp_path.glob("*.draft/.bin"))) == 2)
    # Two readers with a worker each, and the process that tracks what they share.
    wait_until(lambda: len(descendants(main.pid)) >= 4)
    started = descendants(main.pid)
    main.send_signal(signal.SIGKILL)
    main.communicate()
    wait_until(lambda: not any(map(is_running, started)))
