"""Parquet, standard input, separators, templates, pairs; and the files that patterns name."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_support import write_jsonl

from megaphase.data_tools.options import reading_of
from megaphase.data_tools.text import (
    STDIN,
    Document,
    InvalidDocument,
    Reading,
    SourceTarget,
    TextPosition,
    check_options,
    check_text_file,
    documents_and_wrong_ones,
    expand_inputs,
    read_chunks,
    read_documents,
    size_on_disk,
)
from megaphase.data_tools.text.file_types import Kind
from megaphase.data_tools.text.reading import unescape
from megaphase.utils.errors import InputError

TEXTS = ["one", "two\nlines", "ein Wort für 😀", "  spaces  ", "", "x" * 5000]


def documents(path: Path, reading: Reading) -> list[Document]:
    return [it for chunk in read_chunks(path, reading) for it in read_documents(chunk, reading)]


def wrong_ones(path: Path, reading: Reading) -> list[Document | InvalidDocument]:
    chunks = read_chunks(path, reading)
    return [it for chunk in chunks for it in documents_and_wrong_ones(chunk, reading)]


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), "str")])
def test_a_row_of_parquet_is_a_document(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "a.parquet"
    texts = pa.array(TEXTS * 700).cast(kind)
    table = pa.table({"id": range(len(texts)), "body": texts, "x.y": texts})
    pq.write_table(table, path, row_group_size=1_500)
    assert documents(path, Reading("body")) == TEXTS * 700
    assert documents(path, Reading("x.y")) == TEXTS * 700
    chunks = list(read_chunks(path, Reading("body"), chunk_bytes=100_000))
    assert sum(chunk.file_bytes for chunk in chunks) <= size_on_disk(path)
    assert chunks[-1].end == TextPosition(4_200, 4_201)
    assert all(len(chunk.data) < 300_000 for chunk in chunks)


def test_a_wrong_row_of_parquet_is_named(tmp_path: Path) -> None:
    rows = [{"text": "a", "n": 1}, {"text": None, "n": 2}, {"text": "c", "n": 3}]
    path = write_rows(tmp_path / "a.parquet", rows)
    with pytest.raises(InputError, match=r"a\.parquet: row 2: the key 'text' holds null, not a st"):
        documents(path, Reading())
    wrong = InvalidDocument(
        f"{path}: row 2", "the key 'text' holds null, not a string", '{"text": null}'
    )
    assert wrong_ones(path, Reading()) == ["a", wrong, "c"]
    with pytest.raises(InputError, match=r"row 1: the key 'n' holds a number, not a string"):
        documents(path, Reading("n"))
    message = r"row 1: the key 'body' is missing; the keys are 'text', 'n'; choose with --js"
    with pytest.raises(InputError, match=message):
        documents(path, Reading("body"))
    assert [it.problem for it in wrong_ones(path, Reading("n"))] == [  # type: ignore[union-attr]
        "the key 'n' holds a number, not a string"
    ] * 3


def test_a_row_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    column = pa.array([b"a", b"caf\xe9", b"c"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), path)
    with pytest.raises(InputError, match=r"a\.parquet: row 2: the key 'text' holds bytes, not a"):
        documents(path, Reading())
    found = wrong_ones(path, Reading())
    assert [found[0], found[2]] == ["a", "c"]
    assert isinstance(found[1], InvalidDocument)


@pytest.mark.parametrize("damage", ["cut", "pages", "text"])
def test_broken_parquet_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"{i} text" for i in range(5_000)]}), path)
    data = bytearray(path.read_bytes())
    if damage == "pages":
        data[4:2_000] = b"\xff" * 1_996
    path.write_bytes({"cut": data[:-100], "pages": data, "text": b"some text"}[damage])
    with pytest.raises(InputError, match=r"a\.parquet: is truncated or damaged Parquet data \("):
        documents(path, Reading())


NANOSECONDS = pa.timestamp("ns")
NOT_UTF8 = pa.array([b"caf\xe9"]).view(pa.string())


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (pa.array([1], NANOSECONDS), "timestamp[ns]"),
        (pa.array([2**60], pa.timestamp("us", "UTC")), "timestamp[us, tz=UTC]"),
        (pa.array([2**31 - 1], pa.date32()), "date32[day]"),
        (pa.array([1], pa.time64("ns")), "time64[ns]"),
        (pa.array([2**62], pa.duration("ns")), "duration[ns]"),
        (pa.array([Decimal("1.5")]), "decimal128(2, 1)"),
        (pa.array([b"a"]), "bytes"),
        (pa.array([b"ab"], pa.binary(2)), "fixed_size_binary[2]"),
        (pa.array([None], pa.null()), "null"),
        (pa.array([True]), "true or false"),
        (pa.array([float("nan")]), "a number"),
        (pa.array([["a"]]), "list<element: string>"),
        (pa.ListArray.from_arrays([0, 1], NOT_UTF8), "list<element: string>"),
        (pa.array([{"a": "b"}]), "struct<a: string>"),
        (pa.StructArray.from_arrays([NOT_UTF8] * 2, ["a", "a"]), "struct<a: string, a: string>"),
        (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int8())), "map<string, int8>"),
    ],
)
def test_a_column_that_is_no_text_is_named_with_its_type(
    tmp_path: Path, column: pa.Array, said: str
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": column}), path)
    with pytest.raises(InputError) as error:
        documents(path, Reading())
    problem = f"the key 'text' holds {said}, not a string"
    assert str(error.value) == f"{path}: row 1: {problem}; no key holds a string"
    (wrong,) = wrong_ones(path, Reading())
    assert isinstance(wrong, InvalidDocument)
    assert wrong.problem == problem


@pytest.mark.parametrize("kind", [pa.string_view(), pa.large_string(), pa.json_()])
def test_every_kind_of_string_is_text(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array(["one", "two"]).cast(kind)}), path)
    assert documents(path, Reading()) == ["one", "two"]


def test_a_column_that_stands_twice_is_refused_where_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = [pa.array(["one"]), pa.array(["two"]), pa.array(["three"])]
    pq.write_table(pa.Table.from_arrays(columns, ["text", "text", "body"]), path)
    message = r"a\.parquet: has 2 columns with the name 'text'; write it again with one of them"
    for reading in (Reading(), Reading(template="{body} {text}"), Reading(pair=("text", "body"))):
        with pytest.raises(InputError, match=message):
            documents(path, reading)
        with pytest.raises(InputError, match=message):
            wrong_ones(path, reading)
    assert documents(path, Reading("body")) == ["three"]


def test_a_damaged_page_is_found_by_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    column = pa.table({"text": ["some text"] * 3})
    pq.write_table(column, path, compression="none", write_page_checksum=True)
    path.write_bytes(path.read_bytes().replace(b"some text", b"same text", 1))
    with pytest.raises(InputError, match=r"is truncated or damaged Parquet data \(.*CRC"):
        documents(path, Reading())


def test_a_column_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one"]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"text", b"te\xfft"))
    with pytest.raises(InputError, match=r"a\.parquet: is truncated or damaged Parquet data \("):
        documents(path, Reading())


def test_parquet_without_pyarrow_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "a.parquet", [{"text": "a"}])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs pyarrow; pip install 'megaphase\[parquet\]'"):
        check_text_file(path)


MEMORY = """if True:
    import sys
    from pathlib import Path
    from megaphase.data_tools.text import Reading, parquet, read_chunks

    def peak():
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    before = peak()
    size = sum(len(chunk.data) for chunk in read_chunks(Path(sys.argv[1]), Reading()))
    print(size / 2**20, peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_memory_does_not_grow_with_the_row_group(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"{os.urandom(1000).hex()}" for _ in range(50_000)]
    pq.write_table(
        pa.table({"text": texts}), path, row_group_size=len(texts), compression=compression
    )
    code = [sys.executable, "-c", MEMORY, str(path)]
    result = subprocess.run(code, check=True, capture_output=True, text=True)
    megabytes, memory = map(float, result.stdout.split())
    assert megabytes > 95
    assert memory < 70


@pytest.mark.parametrize(
    ("content", "separator", "expected"),
    [
        ("one\n\ntwo\n---\nthree\n", "---", ["one\n\ntwo", "three"]),
        ("---\n---\none\r\n---\r\n two \n---", "---", ["one", " two "]),
        ("one\n --- \n---x\ntwo", "---", ["one\n --- \n---x\ntwo"]),
        ("a\n[.*]\nb", "[.*]", ["a", "b"]),
        ("\ufeff§\na\n§\nb\n", "§", ["a", "b"]),
        ("a\n<|endoftext|>\n\n \n<|endoftext|>\nb", "<|endoftext|>", ["a", "b"]),
    ],
)
def test_a_separator_line_ends_a_document(
    tmp_path: Path, content: str, separator: str, expected: list[str]
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content.encode())
    assert documents(path, Reading(separator=separator)) == expected
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content.encode()))
    assert documents(tmp_path / "a.txt.gz", Reading(separator=separator)) == expected


def test_wrong_blocks_between_separators_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"%\none\n\n%\ntw\xffo\n%\nthree\n")
    assert wrong_ones(path, Reading(separator="%")) == [
        "one",
        InvalidDocument(f"{path}:5", "is not UTF-8 text (byte 0xff)", "tw\\xffo\n%"),
        "three",
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_template_joins_several_keys(tmp_path: Path, name: str) -> None:
    rows: list[dict[str, object]] = [
        {"title": "A", "text": "b", "n": 1},
        {"title": "", "text": "c"},
    ]
    path = write_rows(tmp_path / name, rows)
    assert documents(path, Reading(template="{title}\n\n{text}")) == ["A\n\nb", "\n\nc"]
    assert documents(path, Reading(template="{{{text}}} {text}")) == ["{b} b", "{c} c"]
    with pytest.raises(InputError, match=r"the key 'titel' is missing; .*; choose with --template"):
        documents(path, Reading(template="{titel} {text}"))
    with pytest.raises(InputError, match="the key 'n' holds a number, not a string"):
        documents(path, Reading(template="{text}{n}"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{text", "has unbalanced braces (expected '}' before end of string)"),
        ("text}", "has unbalanced braces (Single '}' encountered in format string)"),
        ("text", "names no key"),
        ("", "names no key"),
        ("{}", "holds more than keys"),
        ("{text:>9}", "holds more than keys"),
        ("{text!r}", "holds more than keys"),
    ],
)
def test_a_wrong_template_is_refused(template: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"--template: {template!r} {message}; write")):
        Reading(template=template)


@pytest.mark.parametrize(
    ("names", "reading", "message"),
    [
        (["a.jsonl", "b.parquet"], Reading(separator="%"), "--separator: ends documents of .txt"),
        (["a.txt", "b.txt.gz"], Reading(key="body"), "--json-key: plain text has no keys"),
        (["a.txt"], Reading(template="{a} {b}"), "--template: plain text has no keys"),
        (["-"], Reading(separator="%"), "--separator: ends documents of .txt"),
        (["-"], Reading(key="body", stdin_kind="txt"), "--json-key: plain text has no keys"),
    ],
)
def test_options_that_concern_none_of_the_files_are_refused(
    names: list[str], reading: Reading, message: str
) -> None:
    with pytest.raises(InputError, match=f"{re.escape(message)}.*; leave it out"):
        check_options(map(Path, names), reading)


def test_options_that_concern_one_of_the_files_are_accepted() -> None:
    for options in ({"separator": "%"}, {"key": "body"}, {"template": "{a}"}):
        check_options([Path("a.txt"), Path("b.jsonl")], Reading(**options))
    check_options([], Reading(key="body"))


def test_readings_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(InputError, match="--template: cannot be combined with --source-key and"):
        Reading(template="{a}", pair=("a", "b"))
    with pytest.raises(InputError, match="--separator: is empty; give one line"):
        Reading(separator="")
    with pytest.raises(InputError, match="--separator: is not a single line; give one line"):
        Reading(separator="a\nb")


@pytest.mark.parametrize(
    ("option", "keys"),
    [
        ("--template", {"template": "{a}"}),
        ("--source-key", {"source_key": "a", "target_key": "b"}),
        ("--messages-key", {"messages_key": "a"}),
    ],
)
def test_a_key_of_text_is_not_ignored(option: str, keys: dict[str, str]) -> None:
    given: dict[str, str | None] = {"template": None, "separator": None, **keys}
    with pytest.raises(InputError, match=f"^--json-key: cannot be combined with {option}; leave"):
        reading_of("content", **given)
    assert reading_of("text", **given).keys


def test_escapes_are_meant() -> None:
    assert unescape(r"{a}\n{b}\t\\n\x") == "{a}\n{b}\t\\n\\x"


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_pairs_have_a_source_and_a_target(tmp_path: Path, name: str) -> None:
    rows: list[dict[str, object]] = [
        {"src": "one", "tgt": "eins"}, {"src": "two", "tgt": None}, {"src": "", "tgt": "drei"},
    ]  # fmt: skip
    path = write_rows(tmp_path / name, rows)
    reading = Reading(pair=("src", "tgt"))
    found = wrong_ones(path, reading)
    assert [found[0], found[2]] == [SourceTarget("one", "eins"), SourceTarget("", "drei")]
    assert isinstance(found[1], InvalidDocument)
    assert found[1].problem == "the key 'tgt' holds null, not a string"
    message = r"the key 'de' is missing; .* choose with --source-key and --target-key"
    with pytest.raises(InputError, match=message):
        documents(path, Reading(pair=("src", "de")))


def test_plain_text_holds_no_pairs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    with pytest.raises(InputError, match=r"a\.txt: plain text holds no translation pairs; use JSO"):
        documents(tmp_path / "a.txt", Reading(pair=("a", "b")))


STDIN_DOCUMENTS = """if True:
    import sys
    from megaphase.data_tools.text import *
    reading = Reading(stdin_kind=sys.argv[1], separator=sys.argv[2] or None)
    start = TextPosition(int(sys.argv[3]))
    chunks = list(read_chunks(STDIN, reading, start=start, chunk_bytes=100))
    print([document for chunk in chunks for document in read_documents(chunk, reading)])
    print([(chunk.start.offset, chunk.file_begin, chunk.start.line) for chunk in chunks][-1])
"""


def from_stdin(data: bytes, kind: Kind, separator: str = "", start: int = 0) -> tuple[str, str]:
    result = subprocess.run(
        [sys.executable, "-c", STDIN_DOCUMENTS, kind, separator, str(start)],
        input=data,
        capture_output=True,
        check=False,
    )
    if result.returncode:
        return "", result.stderr.decode().splitlines()[-1]
    documents, last = result.stdout.decode().splitlines()
    return documents, last


def test_standard_input_is_read() -> None:
    lines = [json.dumps({"text": f"text {i}"}) + "\n" for i in range(100)]
    data, size = "".join(lines).encode(), len("".join(lines[:50]))
    expected = [f"text {i}" for i in range(100)]
    assert from_stdin(data, "jsonl")[0] == str(expected)
    assert from_stdin(b"a\n\nb\n%\nc", "txt", "%")[0] == "['a\\n\\nb', 'c']"
    whole = from_stdin(data, "jsonl")
    assert eval(whole[1])[1] == eval(whole[1])[0]
    # Resuming needs the same input again.
    resumed, last = from_stdin(data, "jsonl", start=size // 2)
    assert last == whole[1]
    assert expected[-1] in resumed
    error = from_stdin(b'{"text": "a"}\noops\n', "jsonl")[1]
    assert error.endswith(
        "standard input:2: is not valid JSON (Expecting value); each line must be one JSON object"
    )


def test_standard_input_has_no_parts() -> None:
    assert size_on_disk(STDIN) == 0
    check_text_file(STDIN)
    with pytest.raises(InputError, match="standard input: cannot be read in parts; write it to"):
        list(read_chunks(STDIN, Reading(), begin=1))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b.jsonl", "a.jsonl", "c.txt", "deep/er/a.jsonl", "odd[1].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / name, ["x"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["b.jsonl", "a.jsonl"], ["b.jsonl", "a.jsonl"]),
        (["c.txt", "*.jsonl"], ["c.txt", "a.jsonl", "b.jsonl"]),
        (["**/*.jsonl"], ["a.jsonl", "b.jsonl", "deep/er/a.jsonl"]),
        (["[ac].*"], ["a.jsonl", "c.txt"]),
        (["odd[1].txt"], ["odd[1].txt"]),
        (["a.jsonl", "-"], ["a.jsonl", "-"]),
        (["deep/**"], ["deep/er/a.jsonl"]),
    ],
)
def test_patterns_stand_for_files(folder: Path, arguments: list[str], expected: list[str]) -> None:
    assert list(map(str, expand_inputs(arguments))) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["*.gz"], "*.gz: no file matches; check the pattern"),
        (["none.jsonl"], "none.jsonl: no such file"),
        (["deep"], "deep: is a directory; give the files in it"),
        (["*.txt", "./c.txt"], "c.txt: is given twice; leave one out"),
        (["-", "a.jsonl", "-"], "standard input: is given twice; leave one out"),
    ],
)
def test_wrong_inputs_are_named(folder: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        expand_inputs(arguments)
