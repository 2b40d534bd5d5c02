"""A file read in parts or resumed: every document once and in order, wherever it is cut."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from data_support import write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from megaphase.data_tools.text import (
    InvalidDocument,
    Reading,
    TextChunk,
    TextPosition,
    documents_and_wrong_ones,
    read_chunks,
    read_documents,
    size_on_disk,
)
from megaphase.data_tools.text import chunks as chunks_module
from megaphase.data_tools.text.chunk import count_lines
from megaphase.utils.errors import InputError

LINES = st.lists(
    st.sampled_from(
        [
            *("", " ", "\t", " \t ", "\r", " \r", "\r\r", " " * 9),
            *("a", "bb b", "ö", "c\r", "d\re", " f", "\tg"),
            *("%", "%\r", " %", "%%", "% "),
            # These look blank but are not blank lines.
            *("\f", "\v", "\x1c", "\x85", "\u2028", "\u3000", "\u200b", "\ufeff", "\0"),
        ]
    ),
    max_size=24,
)


def write_parquet(path: Path, texts: Sequence[str], rows_per_group: int = 5) -> Path:
    columns = {"id": range(len(texts)), "text": pa.array(texts, pa.string())}
    pq.write_table(pa.table(columns), path, row_group_size=rows_per_group)
    return path


def write_arrow(path: Path, texts: Sequence[str], rows_per_batch: int = 5) -> Path:
    columns = {"id": range(len(texts)), "text": pa.array(texts, pa.string())}
    table = pa.table(columns)
    with pa.ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table, max_chunksize=rows_per_batch)
    return path


def write_lines(path: Path, lines: Sequence[str]) -> Path:
    path.write_bytes("\n".join(lines).encode())
    return path


def compressed(path: Path, ending: str, compress: Callable[[bytes], bytes]) -> Path:
    packed = path.with_name(path.name + ending)
    data = path.read_bytes()
    # Two pieces, so that a part may begin between them.
    packed.write_bytes(compress(data[: len(data) // 2]) + compress(data[len(data) // 2 :]))
    return packed


def plain_documents(lines: Sequence[str], ends: Callable[[str], bool]) -> list[str]:
    """Return the documents of a .txt file, line by line."""
    documents: list[list[str]] = [[]]
    for line in "\n".join(lines).removeprefix("\ufeff").split("\n"):
        if ends(line):
            documents.append([])
        else:
            documents[-1].append(line)
    texts = ["\n".join(document) for document in documents]
    return [text.strip("\r\n") for text in texts if text and not text.isspace()]


def written(folder: Path, kind: str, lines: list[str]) -> tuple[Path, Reading, list[str]]:
    """Write a file of this kind; return it, how to read it, and its documents."""
    if kind == "parquet":
        return write_parquet(folder / "a.parquet", lines), Reading(), lines
    if kind == "arrow":
        return write_arrow(folder / "a.arrow", lines), Reading(), lines
    if kind.startswith("jsonl"):
        path, reading, texts = write_jsonl(folder / "a.jsonl", lines), Reading(), lines
    elif kind == "lines of json":
        blank = [not line.strip(" \t\r\f\v") for line in lines]
        texts = [line for line, is_blank in zip(lines, blank, strict=True) if not is_blank]
        rows = (
            line if is_blank else json.dumps({"text": line}, ensure_ascii=False) + "\r" * (i % 2)
            for i, (line, is_blank) in enumerate(zip(lines, blank, strict=True))
        )
        mark = "\ufeff" * (len(lines) % 2)
        path, reading = write_lines(folder / "a.jsonl", [mark, *rows]), Reading()
    elif kind == "separated":
        path, reading = write_lines(folder / "a.txt", lines), Reading(separator="%")
        texts = plain_documents(lines, lambda line: line in ("%", "%\r"))
    else:
        path, reading = write_lines(folder / "a.txt", lines), Reading()
        texts = plain_documents(lines, lambda line: not line.strip(" \t\r"))
    if kind.endswith("gz"):
        path = compressed(path, ".gz", gzip.compress)
    elif kind.endswith("zst"):
        path = compressed(path, ".zst", zstandard.compress)
    return path, reading, texts


KINDS = ["jsonl", "lines of json", "txt", "separated", "parquet", "arrow", "jsonl.gz", "txt.zst"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100)
@given(data=st.data(), lines=LINES, chunk_bytes=st.integers(1, 40))
def test_parts_and_resumed_parts_give_every_document_once(
    tmp_path: Path, kind: str, data: st.DataObject, lines: list[str], chunk_bytes: int
) -> None:
    path, reading, expected = written(tmp_path, kind, lines)
    size = size_on_disk(path)
    cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=4), label="cuts"))
    found: list[str] = []
    whole = list(read_chunks(path, reading, chunk_bytes=chunk_bytes))
    for begin, end in pairwise([0, *cuts, size]):
        part = [*read_chunks(path, reading, begin=begin, end=end, chunk_bytes=chunk_bytes)]
        if part and data.draw(st.booleans(), label="resumed"):
            stopped = data.draw(st.integers(0, len(part) - 1), label="after")
            rest = read_chunks(
                path,
                reading,
                start=part[stopped].end,
                begin=begin,
                end=end,
                chunk_bytes=chunk_bytes,
            )
            part = [*part[: stopped + 1], *rest]
        assert all(chunk.file_begin >= begin for chunk in part)
        assert sorted(chunk.file_begin for chunk in part) == [chunk.file_begin for chunk in part]
        found += [text for chunk in part for text in read_documents(chunk, reading)]
    assert found == expected
    assert [text for chunk in whole for text in read_documents(chunk, reading)] == expected
    # Resuming yields the remaining chunks, including their positions.
    for number, chunk in enumerate(whole):
        rest = read_chunks(path, reading, start=chunk.end, chunk_bytes=chunk_bytes)
        assert [plain(later) for later in rest] == [plain(later) for later in whole[number + 1 :]]


def plain(chunk: TextChunk) -> tuple[object, ...]:
    return chunk.start, chunk.end, chunk.file_begin, chunk.file_bytes, chunk.data


def test_a_part_of_a_plain_file_reads_nothing_else(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * 90] * 5_000)
    size, spoiled = path.stat().st_size, b"\xff" * 100_000
    with open(path, "r+b") as file:
        file.write(spoiled)
        file.seek(size - len(spoiled))
        file.write(spoiled)
    cut = read_chunks(path, Reading(), begin=size // 3, end=size // 2)
    assert {text for chunk in cut for text in read_documents(chunk, Reading())} == {"x" * 90}


def test_a_part_of_a_parquet_file_reads_no_other_row_group(tmp_path: Path) -> None:
    texts = [f"{number} {'x' * 500}" for number in range(4_000)]
    path = write_parquet(tmp_path / "a.parquet", texts, rows_per_group=1_000)
    groups = pq.ParquetFile(path).metadata
    first = sum(groups.row_group(0).column(i).total_compressed_size for i in range(2))
    with open(path, "r+b") as file:
        file.seek(4)
        file.write(b"\xff" * (first - 4))
    cut = list(read_chunks(path, Reading(), begin=first, end=None))
    assert [text for chunk in cut for text in read_documents(chunk, Reading())] == texts[1_000:]
    with pytest.raises(InputError, match=r"a\.parquet: "):
        list(read_chunks(path, Reading()))


@pytest.mark.parametrize("shards", [1, 3, 7])
def test_lines_are_named_in_parts_too(tmp_path: Path, shards: int) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * 90] * 3_000)
    lines = path.read_text().splitlines(keepends=True)
    lines[1_500], lines[2_700] = "oops\n", "\xff\n"
    path.write_bytes("".join(lines).encode("latin-1"))
    size = path.stat().st_size
    wrong = []
    for shard in range(shards):
        part = read_chunks(
            path, Reading(), begin=shard * size // shards, end=(shard + 1) * size // shards
        )
        documents = (it for chunk in part for it in documents_and_wrong_ones(chunk, Reading()))
        wrong += [it.where for it in documents if isinstance(it, InvalidDocument)]
    assert wrong == [f"{path}:1501", f"{path}:2701"]


def test_lines_before_a_part_are_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("oops\n" * 3_000)
    part = list(read_chunks(path, Reading(), begin=7_000, chunk_bytes=500))
    counts = count_lines.cache_info().misses
    wrong = [it for chunk in part for it in documents_and_wrong_ones(chunk, Reading())]
    assert len(part) > 10
    assert [it.where for it in wrong if isinstance(it, InvalidDocument)] == [
        f"{path}:{number}" for number in range(1_401, 3_001)
    ]
    assert count_lines.cache_info().misses == counts + 1


def test_a_document_without_end_is_named_in_parts_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks_module, "MOST_BYTES_WITHOUT_END", 1 << 20)
    path = tmp_path / "a.txt"
    path.write_text("first\n\n" + "line\n" * 500_000)
    with pytest.raises(InputError, match=r"a\.txt:3: no document ends within 1 MB of here"):
        list(read_chunks(path, Reading(), begin=5))


def test_a_broken_end_is_noticed_by_the_last_part(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    lines = (json.dumps({"text": str(hash(str(number)))}) + "\n" for number in range(60_000))
    path.write_bytes(gzip.compress("".join(lines).encode())[:-2000])
    size = path.stat().st_size
    first = list(read_chunks(path, Reading(), begin=0, end=size // 2))
    assert [chunk.file_begin < size // 2 for chunk in first] == [True] * len(first)
    with pytest.raises(InputError, match=r"a\.jsonl\.gz: is truncated"):
        list(read_chunks(path, Reading(), begin=size // 2, end=size))


def test_going_on_reads_no_byte_before(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["a", "b", "c"])
    line = path.stat().st_size // 3
    (chunk,) = read_chunks(path, Reading(), start=TextPosition(line, 2))
    assert list(read_documents(chunk, Reading())) == ["b", "c"]
    assert (chunk.start, chunk.end) == (TextPosition(line, 2), TextPosition(3 * line, 4))
    assert (chunk.file_begin, chunk.file_bytes) == (line, 2 * line)
