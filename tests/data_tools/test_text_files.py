"""Documents from text files for any chunks, and every kind of invalid input."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import zstandard
from data_support import write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from megaphase.data_tools.text import Reading, chunks, compression, read_chunks, read_documents
from megaphase.utils.errors import InputError

TEXTS = ["one", "two\nlines", "ein Wort für 😀", "  spaces  ", "", "a\u2028b\x85c", "x" * 5000]


def documents(path: Path, key: str = "text") -> list[str]:
    reading = Reading(key)
    return [text for chunk in read_chunks(path, reading) for text in read_documents(chunk, reading)]


def test_jsonl_gives_the_text_of_each_line(tmp_path: Path) -> None:
    assert documents(write_jsonl(tmp_path / "a.jsonl", TEXTS)) == TEXTS
    assert documents(write_jsonl(tmp_path / "b.ndjson", TEXTS, key="tgt"), "tgt") == TEXTS


def test_jsonl_may_hold_raw_characters_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS]
    path.write_bytes(b"\xef\xbb\xbf\n" + "\r\n \n".join(lines).encode())
    assert documents(path) == TEXTS


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("one\ntwo\n\nthree\n", ["one\ntwo", "three"]),
        ("one\r\ntwo\r\n\r\nthree", ["one\r\ntwo", "three"]),
        ("\n\n one \n \t\n\n\ntwo \n\n\n", [" one ", "two "]),
        (" \n\none", ["one"]),
        ("\ufeff\n \none\n\r\n", ["one"]),
        ("one\n \t\ntwo\n\t\r\n \r\r\nthree", ["one", "two", "three"]),
        ("one\n\ftwo\n\f\nthree\r\r\rfour", ["one\n\ftwo\n\f\nthree\r\r\rfour"]),
        ("one\n\u3000\ntwo\n\xa0\n\n\u3000\n\n", ["one\n\u3000\ntwo\n\xa0"]),
        ("one\u2028\u2028two", ["one\u2028\u2028two"]),
        ("\n \n", []),
        ("", []),
    ],
)
def test_a_blank_line_ends_a_document_of_a_text_file(
    tmp_path: Path, content: str, expected: list[str]
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content.encode())
    assert documents(path) == expected


def two_frames(data: bytes) -> bytes:
    half = len(data) // 2
    return zstandard.compress(data[:half]) + zstandard.compress(data[half:])


def two_members(data: bytes) -> bytes:
    half = len(data) // 2
    return gzip.compress(data[:half], mtime=0) + gzip.compress(data[half:])


@pytest.fixture(params=["isal", "zlib"])
def gzip_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decompress .gz files by ISA-L, or as if it were not installed."""
    if request.param == "isal":
        pytest.importorskip("isal")
    monkeypatch.setattr(compression, "_WITH_ISAL", request.param == "isal")


@pytest.mark.usefixtures("gzip_library")
@pytest.mark.parametrize(
    ("ending", "compress"),
    [(".gz", gzip.compress), (".gz", two_members), (".zst", two_frames), (".ZST", two_frames)],
)
def test_compressed_files_give_the_same(
    tmp_path: Path, ending: str, compress: Callable[[bytes], bytes]
) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl", TEXTS * 500)
    packed = tmp_path / f"a.jsonl{ending}"
    packed.write_bytes(compress(plain.read_bytes()))
    assert documents(packed) == documents(plain)
    cut = list(read_chunks(packed, Reading()))
    assert sum(chunk.file_bytes for chunk in cut) == packed.stat().st_size


@settings(max_examples=60)
@given(
    lines=st.lists(st.sampled_from(["", " ", "a", "bb b", "ö", "\r", "c\r"]), max_size=20),
    chunk_bytes=st.integers(1, 12),
    name=st.sampled_from(["a.txt", "a.jsonl"]),
)
def test_documents_do_not_depend_on_the_chunks(
    tmp_path: Path, lines: list[str], chunk_bytes: int, name: str
) -> None:
    path = tmp_path / name
    if name == "a.txt":
        path.write_bytes("\n".join(lines).encode())
    else:
        write_jsonl(path, lines)
    cut = list(read_chunks(path, Reading(), chunk_bytes=chunk_bytes))
    assert b"".join(chunk.data for chunk in cut) == path.read_bytes()
    assert sum(chunk.file_bytes for chunk in cut) == path.stat().st_size
    found = [text for chunk in cut for text in read_documents(chunk, Reading())]
    assert found == documents(path)


def test_chunks_are_little_larger_than_asked(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * 900] * 20_000)
    packed = tmp_path / "a.jsonl.zst"
    packed.write_bytes(zstandard.compress(path.read_bytes()))
    assert packed.stat().st_size < 10_000
    for file in (path, packed):
        cut = list(read_chunks(file, Reading(), chunk_bytes=10_000))
        assert all(10_000 <= len(chunk.data) < 11_000 for chunk in cut[:-1])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not valid JSON (Expecting property name enclosed in double quotes)"),
        ('{"text": "a"} x', "is not valid JSON (Extra data)"),
        ("[" * 100_000, "is not valid JSON (it cannot be parsed)"),
        ('["a"]', 'is a list, not a JSON object; write {"text": "..."}'),
        ('{"id": 1, "tgt": "a"}', "the key 'text' is missing; the keys are 'id', 'tgt'"),
        ("{}", "the key 'text' is missing; the keys are none"),
        ('{"text": null}', "the key 'text' holds null, not a string; no key holds a string"),
        ('{"text": 1, "b": "c"}', "holds a number, not a string; the keys with a string are 'b'"),
        ('{"text": "\\ud83d"}', "holds a lone surrogate, \\ud83d"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n' + line + "\n")
    with pytest.raises(InputError) as error:
        documents(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert message in str(error.value)


def test_a_wrong_line_is_named_in_later_chunks(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * 90] * 30_000)
    with open(path, "a") as file:
        file.write("oops\n")
    with pytest.raises(InputError, match=r"a\.jsonl:30001: is not valid JSON"):
        documents(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_other_encodings_are_refused_with_the_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes('{"text": "a"}\n{"text": "für"}\n'.encode("latin-1"))
    with pytest.raises(InputError, match=rf"{name}:2: is not UTF-8 text \(byte 0xfc\)"):
        documents(path)
    path.write_bytes('{"text": "a"}\n'.encode("utf-16"))
    with pytest.raises(InputError, match=rf"{name}:1: is not UTF-8 text \(byte 0xff\)"):
        documents(path)


NOISE = Random(1).randbytes(9000)


@pytest.mark.usefixtures("gzip_library")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(NOISE)[:5000], "is truncated; copy or compress"),
        ("a.jsonl.gz", b'{"text": "a"}', "is damaged gzip data (Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(b"a" * 99, mtime=0)[:-8] + b"12345678",
            "is damaged gzip data",
        ),
        ("a.jsonl.zst", zstandard.compress(NOISE)[:5000], "is truncated; copy"),
        ("a.jsonl.zst", b'{"text": "a"}', "is damaged zstd data"),
        ("a.jsonl.gz", b"", "is truncated: it has no bytes; copy or write it again"),
        ("a.jsonl.ZST", b"", "is truncated: it has no bytes; copy or write it again"),
        ("a.parquet", b"", "is truncated: it has no bytes; copy or write it again"),
        ("a.jsonl.gz", gzip.compress(b"")[:9], "is truncated; copy"),
        (
            "a.jsonl.gz",
            gzip.compress(b"{}", mtime=0) + b"x",
            "is damaged gzip data (Not a gzipped file",
        ),
        ("a.jsonl.zst", zstandard.compress(b"")[:5], "is truncated; copy"),
        ("a.jsonl.zst", zstandard.compress(b"\n") + b"\0\0\0\0", "is damaged zstd data"),
    ],
)
def test_broken_compression_is_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        documents(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


def test_what_is_no_text_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"")
    (tmp_path / "d.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, message in (
        ("a.csv", r"unknown kind of file; its name must end in \.jsonl, .*\.txt"),
        ("d.jsonl", "is a directory; give the files in it"),
        ("pipe.jsonl", "is not a regular file; write the text to a file, or pipe it to -"),
        ("none.jsonl", "no such file; check the path"),
    ):
        with pytest.raises(InputError, match=message):
            documents(tmp_path / name)


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs Linux's /proc")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to("/proc/self/mem")
    with pytest.raises(InputError, match=r"a\.jsonl: cannot be read \(.+\)"):
        documents(tmp_path / "a.jsonl")


def test_a_document_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "MOST_BYTES_WITHOUT_END", 1 << 20)
    path = tmp_path / "a.txt"
    path.write_text("first\n\n" + "line\n" * 500_000)
    with pytest.raises(InputError, match=r"a\.txt:1: no document ends within 1 MB of here; put a"):
        documents(path)


@pytest.mark.parametrize("line", [" ", "\t \r", ""])
def test_documents_end_at_blank_lines_in_large_files_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.setattr(chunks, "MOST_BYTES_WITHOUT_END", 1 << 16)
    path = tmp_path / "a.txt"
    path.write_bytes(f"{'word ' * 200}\n{line}\n".encode() * 2_000)
    cut = list(read_chunks(path, Reading(), chunk_bytes=1 << 16))
    assert len(cut) > 20
    found = [text for chunk in cut for text in read_documents(chunk, Reading())]
    assert found == ["word " * 200] * 2_000


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_files_without_content_hold_no_documents(tmp_path: Path, ending: str) -> None:
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}[ending]
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(compress(b""))
    assert documents(path) == []
    # Behind and before others it is a member as any other.
    path.write_bytes(compress(b"") + compress(b"one\n\ntw") + compress(b"") + compress(b"o"))
    assert documents(path) == ["one", "two"]


@pytest.mark.usefixtures("gzip_library")
def test_no_damage_of_gzip_data_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    content = gzip.compress(b"".join(b'{"text": "%d"}\n' % n for n in range(2_000)), mtime=0)
    for place in [
        *range(0, 4),
        *range(10, len(content), 97),
        *range(len(content) - 8, len(content)),
    ]:
        path.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
        with pytest.raises(InputError, match=r"a\.jsonl\.gz: is (damaged gzip data|truncated)"):
            documents(path)


def test_very_repetitive_zstd_data_is_read_in_small_pieces(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    lines = [f'{{"text": "{Random(n).randbytes(300).hex()}"}}' for n in range(300)]
    plain = "\n".join([*lines, '{"text": "' + 9_000_000 * "a" + '"}', *lines])
    path.write_bytes(zstandard.compress(plain.encode()))
    assert documents(path) == [json.loads(line)["text"] for line in plain.split("\n")]
