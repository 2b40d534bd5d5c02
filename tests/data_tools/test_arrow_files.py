"""Arrow files, folders that `datasets` saved, and the files of datatrove and dolma."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard

from megaphase.data_tools.text import (
    Document,
    InvalidDocument,
    Reading,
    SourceTarget,
    TextPosition,
    check_text_file,
    documents_and_wrong_ones,
    expand_inputs,
    identified_documents,
    read_chunks,
    read_documents,
    size_on_disk,
)
from megaphase.utils.errors import InputError

TEXTS = ["one", "two\nlines", "ein Wort für 😀", "  spaces  ", "", "x" * 5000]


def documents(path: Path, reading: Reading = Reading()) -> list[Document]:  # noqa: B008
    return [it for chunk in read_chunks(path, reading) for it in read_documents(chunk, reading)]


def write(path: Path, table: pa.Table, rows: int = 1000, compression: str | None = None) -> Path:
    """Write an IPC file if the name ends in .feather or .ipc, an IPC stream otherwise."""
    options = pa.ipc.IpcWriteOptions(compression=compression)
    make = pa.ipc.new_file if path.suffix in (".feather", ".ipc") else pa.ipc.new_stream
    with make(path, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), "str")])
@pytest.mark.parametrize(
    ("name", "compression"), [("a.arrow", None), ("a.ipc", None), ("a.feather", "lz4")]
)
def test_a_row_of_arrow_is_a_document(
    tmp_path: Path, name: str, compression: str | None, kind: pa.DataType
) -> None:
    texts = pa.array(TEXTS * 700).cast(kind)
    table = pa.table({"id": range(len(texts)), "body": texts, "x.y": texts})
    path = write(tmp_path / name, table, 1_500, compression)
    assert documents(path, Reading("body")) == TEXTS * 700
    assert documents(path, Reading("x.y")) == TEXTS * 700
    chunks = list(read_chunks(path, Reading("body"), chunk_bytes=100_000))
    assert sum(chunk.file_bytes for chunk in chunks) <= size_on_disk(path)
    assert chunks[-1].end == TextPosition(4_200, 4_201)
    assert len(chunks) > 3
    assert [it for _, it in identified_documents(chunks[0], Reading("body"))][:2] == [b"0", b"1"]


def test_small_batches_are_read_together(tmp_path: Path) -> None:
    path = write(tmp_path / "a.arrow", pa.table({"text": ["a b"] * 4_500}), rows=1)
    assert len(list(read_chunks(path, Reading()))) == 2
    assert documents(path) == ["a b"] * 4_500


def test_a_wrong_row_of_arrow_is_named(tmp_path: Path) -> None:
    rows = [{"text": "a", "n": 1}, {"text": None, "n": 2}, {"text": "c", "n": 3}]
    path = write(tmp_path / "a.arrow", pa.Table.from_pylist(rows))
    with pytest.raises(InputError, match=r"a\.arrow: row 2: the key 'text' holds null, not a st"):
        documents(path)
    message = r"row 1: the key 'body' is missing; the keys are 'text', 'n'; choose with --js"
    with pytest.raises(InputError, match=message):
        documents(path, Reading("body"))
    column = pa.array([b"a", b"caf\xe9", b"c"]).view(pa.string())
    path = write(tmp_path / "b.arrow", pa.table({"text": column}))
    (chunk,) = read_chunks(path, Reading())
    found = list(documents_and_wrong_ones(chunk, Reading()))
    assert [found[0], found[2]] == ["a", "c"]
    assert isinstance(found[1], InvalidDocument)
    assert found[1].where == f"{path}: row 2"


def test_pairs_and_templates_are_read_from_arrow(tmp_path: Path) -> None:
    path = write(tmp_path / "a.arrow", pa.table({"s": ["a", "b"], "t": ["c", "d"]}))
    assert documents(path, Reading(pair=("s", "t"))) == [SourceTarget("a", "c"),
                                                        SourceTarget("b", "d")]  # fmt: skip
    assert documents(path, Reading(template="{t} {s}")) == ["c a", "d b"]


@pytest.mark.parametrize("name", ["a.arrow", "a.feather"])
def test_arrow_cut_off_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, pa.table({"text": [f"{i} text" for i in range(40)]}), rows=10)
    data = path.read_bytes()
    for size in range(0, len(data) - 1, 8):
        path.write_bytes(data[:size])
        with pytest.raises(InputError, match=rf"{name}: is truncated"):
            documents(path)
    path.write_bytes(data)
    assert len(documents(path)) == 40


def test_altered_arrow_is_named_and_never_followed_out_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.arrow", pa.table({"text": ["some text"] * 300}))
    data = path.read_bytes()
    offsets = data.index(bytes([9, 0, 0, 0, 18, 0, 0, 0]))
    for wrong in (b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\0\0\0\x10"):
        path.write_bytes(data[:offsets] + wrong + data[offsets + 4 :])
        with pytest.raises(InputError, match=r"is truncated or damaged Arrow data \("):
            documents(path)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match=r"is truncated or damaged Arrow data \("):
        documents(path)


def test_two_streams_in_one_file_and_old_feather_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.arrow", pa.table({"text": ["a"]}))
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(InputError, match=r"bytes after the end of its stream; write each stream"):
        documents(path)
    (tmp_path / "b.feather").write_bytes(b"FEA1" + bytes(60) + b"FEA1")
    with pytest.raises(InputError, match="is a Feather file of version 1; write it again"):
        documents(tmp_path / "b.feather")


def test_arrow_without_pyarrow_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.arrow", pa.table({"text": ["a"]}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"Arrow needs pyarrow; pip install 'megaphase\[parquet\]"):
        check_text_file(path)


# What datasets.Dataset.save_to_disk writes, of datasets 5.2.
def save_dataset(folder: Path, texts: list[str], shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    names = [f"data-{n:05d}-of-{shards:05d}.arrow" for n in range(shards)]
    size = -(-len(texts) // shards)
    for number, name in enumerate(names):
        write(folder / name, pa.table({"text": texts[number * size : (number + 1) * size]}))
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_a_saved_dataset_is_its_files_in_order(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(1_100)]
    folder = save_dataset(tmp_path / "ds", texts, 11)
    files = expand_inputs([str(folder)])
    assert [file.name for file in files][:2] == ["data-00000-of-00011.arrow",
                                                 "data-00001-of-00011.arrow"]  # fmt: skip
    assert [text for file in files for text in documents(file)] == texts
    with pytest.raises(InputError, match="is given twice"):
        expand_inputs([str(folder), str(folder / "data-00003-of-00011.arrow")])


def test_a_split_of_a_saved_dataset_is_given_by_its_folder(tmp_path: Path) -> None:
    for split in ("train", "test"):
        save_dataset(tmp_path / "dd" / split, [split])
    kept = tmp_path / "dd" / "dataset_dict.json"
    kept.write_text(json.dumps({"splits": ["train", "test"]}))
    message = rf"dd: has the splits train, test; give one, such as {tmp_path}/dd/train"
    with pytest.raises(InputError, match=message):
        expand_inputs([str(tmp_path / "dd")])
    assert [documents(it) for it in expand_inputs([str(tmp_path / "dd" / "test")])] == [["test"]]
    kept.write_text(json.dumps({"splits": ["train"]}))
    assert [documents(it) for it in expand_inputs([f"{tmp_path}/dd/"])] == [["train"]]


def test_a_damaged_or_other_folder_is_refused(tmp_path: Path) -> None:
    folder = save_dataset(tmp_path / "ds", ["a"])
    for content in ("{", "[]", '{"_data_files": [1]}', '{"_data_files": 1}', "{}"):
        (folder / "state.json").write_text(content)
        with pytest.raises(InputError, match=r"state\.json: is not what datasets writes with sav"):
            expand_inputs([str(folder)])
    (folder / "state.json").write_text('{"_data_files": [], "_indices_data_files": [{}]}')
    with pytest.raises(InputError, match=r"save it again after dataset\.flatten_indices\(\)"):
        expand_inputs([str(folder)])
    os.remove(folder / "dataset_info.json")
    with pytest.raises(InputError, match="is a directory; give the files in it, or a folder that"):
        expand_inputs([str(folder)])


def test_what_datasets_itself_saves_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    texts = [f"text {i}" for i in range(2_500)]
    dataset = datasets.Dataset.from_dict({"text": texts, "id": [f"n{i}" for i in range(2_500)]})
    chosen = dataset.filter(lambda row: row["text"].endswith("7")).shuffle(seed=1)
    datasets.DatasetDict(train=dataset, test=chosen).save_to_disk(
        str(tmp_path / "ds"), num_shards={"train": 3, "test": 1}
    )
    train = expand_inputs([str(tmp_path / "ds" / "train")])
    assert [text for file in train for text in documents(file)] == texts
    (test,) = expand_inputs([str(tmp_path / "ds" / "test")])
    assert documents(test) == list(chosen["text"])
    (chunk,) = read_chunks(test, Reading())
    assert [it for _, it in identified_documents(chunk, Reading())] == [
        it.encode() for it in chosen["id"]
    ]


@pytest.mark.parametrize("name", ["00000.jsonl.gz", "00000.jsonl.zst", "en-0000.json.gz"])
def test_the_files_of_datatrove_and_dolma_are_read(tmp_path: Path, name: str) -> None:
    """Records as their writers make them: datatrove's JsonlWriter, and dolma's documents."""
    records = [
        {"text": "one", "id": "<urn:uuid:1>", "metadata": {"url": "x", "language_score": 0.9}},
        {"id": "d/2", "text": "two", "source": "c4", "added": "2024-01-01", "created": "2019",
         "version": "v1", "metadata": {"text": "not this", "provenance": "c4.gz:2"}},
    ]  # fmt: skip
    data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    path = tmp_path / name
    path.write_bytes((gzip if name.endswith("gz") else zstandard).compress(data))
    (chunk,) = read_chunks(path, Reading())
    assert list(identified_documents(chunk, Reading())) == [("one", b"<urn:uuid:1>"),
                                                            ("two", b"d/2")]  # fmt: skip
