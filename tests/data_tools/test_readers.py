"""Several readers on one machine: the corpus is that of one reader, byte for byte."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from data_support import (
    CORPUS_FILES,
    corpus_bytes,
    files_of,
    is_running,
    make_tokenizer,
    start_python,
    wait_until,
    write_jsonl,
)
from hypothesis import given, settings
from hypothesis import strategies as st

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


@pytest.mark.parametrize(
    ("sizes", "readers", "expected"),
    [
        ([51, 49], 2, [0, 1]),
        ([49, 51], 2, [0, 1]),
        ([1, 1, 98], 3, [0, 1, 2]),
        ([98, 1, 1], 3, [0, 1, 2]),
        ([98, 1, 1], 2, [0, 1, 1]),
        ([20, 30, 10, 40], 2, [0, 0, 1, 1]),
        ([5, 5, 0, 0], 2, [0, 1, 1, 1]),
        ([7, 7], 3, [0, 1]),
    ],
)
def test_no_reader_is_idle_while_another_has_two_files(
    sizes: list[int], readers: int, expected: list[int], tmp_path: Path
) -> None:
    assert readers_of(sizes, readers, tmp_path) == expected


@settings(max_examples=60)
@given(sizes=st.lists(st.integers(0, 99), min_size=1, max_size=9), readers=st.integers(1, 10))
def test_readers_have_every_file_once_and_in_order(
    sizes: list[int], readers: int, tmp_path: Path
) -> None:
    found = readers_of(sizes, readers, tmp_path)
    assert found == sorted(found)
    assert set(found) == set(range(min(readers, len(sizes))))


def readers_of(sizes: list[int], readers: int, folder: Path) -> list[int]:
    """Return the reader of every one of some files of these sizes."""
    paths = [folder / f"{number}.jsonl.gz" for number in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(bytes(size))
    found = {}
    for number in range(readers):
        for part in parts_of(paths, ShardChoice(number, readers, by_file=True)):
            assert (part.begin, part.end) == (0, None)
            assert part.file not in found
            found[part.file] = number
    return [found[file] for file in range(len(sizes))]


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


# One reader for each worker; each logs where it begins to read and, if that is wanted, hangs after
# its third save. A file, since the readers' processes import it.
RESTARTED = """
import json, sys, time
from pathlib import Path
from megaphase.data_tools.tokenization import readers, tokenize as module
log, hang, workers, options, tokenizer, prefix, *inputs = sys.argv[1:]
real = module.read_chunks
def read_chunks(path, reading, *, start, **more):
    with open(log, "a") as lines:
        lines.write(json.dumps([path.name, start.offset]) + "\\n")
    return real(path, reading, start=start, chunk_bytes=4_000, **more)
class Writer(module.CorpusWriter):
    saves = 0
    def save(self, note):
        super().save(note)
        self.saves += 1
        if self.saves == 3 and int(hang):
            Path(f"{log}.{self.prefix.name}").touch()
            time.sleep(10_000)
readers.WORKERS_PER_READER, module.SAVE_BYTES_PER_WORKER = 1, 8_000
module.read_chunks, module.CorpusWriter = read_chunks, Writer
if __name__ == "__main__":
    paths = [Path(path) for path in inputs]
    more = json.loads(options)
    module.tokenize(paths, Path(tokenizer), Path(prefix), workers=int(workers), **more)
"""


@pytest.mark.parametrize(
    ("before", "after", "options"),
    [(2, 1, {}), (1, 2, {}), (1, 2, {"drop_duplicates": True}), (2, 1, {"shuffle_seed": 3})],
)
def test_killed_it_goes_on_with_as_many_readers(
    tok: Path, tmp_path: Path, before: int, after: int, options: dict[str, object]
) -> None:
    inputs = [tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz"]
    for path in inputs:
        text = "".join(json.dumps({"text": f"{path.name} {n} " * 20}) + "\n" for n in range(900))
        path.write_bytes(gzip.compress(text.encode(), 1))
    tokenize(inputs, tok, tmp_path / "one", workers=1, **options)  # type: ignore[arg-type]
    script, log, out = tmp_path / "run.py", tmp_path / "log", tmp_path / "out" / "en"
    script.write_text(RESTARTED)

    def start(hang: int, workers: int) -> subprocess.Popen[bytes]:
        arguments = [log, hang, workers, json.dumps(options), tok, out, *inputs]
        return subprocess.Popen([sys.executable, script, *map(str, arguments)])

    killed = start(1, before)
    wait_until(lambda: len(list(tmp_path.glob("log.*"))) == before)
    started = descendants(killed.pid)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    wait_until(lambda: not any(map(is_running, started)))
    states = [json.loads(path.read_text()) for path in sorted(out.parent.glob(".*/state.json"))]
    assert [state["figures"]["documents"] > 0 for state in states] == [True] * before
    begun = {inputs[state["note"]["file"]].name: state["note"]["offset"] for state in states}
    log.unlink()
    assert start(0, after).wait() == 0
    places = dict(map(json.loads, log.read_text().splitlines()))
    assert places == {path.name: 0 for path in inputs} | begun
    assert corpus_bytes(out) == corpus_bytes(tmp_path / "one")
    assert files_of(out.parent) == CORPUS_FILES


# Killed when so many files of the parts have been removed.
KILLED_IN_THE_REMOVAL = """if True:
    import json, os, signal, sys
    from pathlib import Path
    from megaphase.data_tools.tokenization import readers
    from megaphase.data_tools.tokenization.tokenize import tokenize
    if __name__ == "__main__":
        readers.WORKERS_PER_READER = 1
        left, unlink = int(sys.argv[1]), Path.unlink
        def counted(path, **options):
            global left
            if Path(f"{prefix}.json").exists() and path.name.startswith(".en."):
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
            unlink(path, **options)
        Path.unlink = counted
        options = json.loads(sys.argv[2])
        tokenizer, prefix, *inputs = map(Path, sys.argv[3:])
        tokenize(inputs, tokenizer, prefix, workers=2, **options)
"""


@pytest.mark.usefixtures("one_worker_each")
@pytest.mark.parametrize("removed", [0, 1, 9])
@pytest.mark.parametrize(
    "options",
    [{}, {"drop_duplicates": True}, {"shuffle_seed": 3}],
    ids=["order", "dedup", "shuffle"],
)
def test_killed_in_the_removal_of_the_parts_it_completes_that(
    tok: Path, inputs: list[Path], tmp_path: Path, options: dict[str, object], removed: int
) -> None:
    tokenize(inputs, tok, tmp_path / "one", workers=1, **options)  # type: ignore[arg-type]
    out = tmp_path / "out" / "en"
    process = start_python(KILLED_IN_THE_REMOVAL, removed, json.dumps(options), tok, out, *inputs)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [path for path in out.parent.iterdir() if "unordered" in path.name]
    with pytest.raises(InputError, match="exists already"):  # of other text
        tokenize(inputs[1:], tok, out, workers=2, **options)  # type: ignore[arg-type]
    tokenize(inputs, tok, out, workers=3, **options)  # type: ignore[arg-type]
    assert corpus_bytes(out) == corpus_bytes(tmp_path / "one")
    assert files_of(out.parent) == CORPUS_FILES


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
