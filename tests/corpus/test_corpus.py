"""Corpora: Megatron-LM's bytes, written atomically, with every kind of damage found and named."""

from __future__ import annotations

import os
import pickle
import signal
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from data_support import (
    corpus_bytes,
    edit_bytes,
    files_of,
    megatron_documents,
    megatron_index,
    rehash,
    rewrite_manifest,
    start_python,
    tokens_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from megaphase.corpus import Corpus, CorpusWriter, DocumentBatch, Manifest
from megaphase.corpus.format import SUM_DTYPE, document_hash
from megaphase.utils.errors import InputError, RunError
from megaphase.utils.files import hash_file

EOD = 7
DOCUMENTS = [([1, 2, 3], "one"), ([4], "four"), ([5, 6, 1, 2], "five")]


def write(prefix: Path, documents=DOCUMENTS, *, vocab_size: int = 100, **options) -> Manifest:
    writer = CorpusWriter(
        prefix, tokenizer_hash="t", vocab_size=vocab_size, eod=EOD, sources=["a"], **options
    )
    with writer:
        for tokens, text in documents:
            writer.add_document(tokens, text)
    assert writer.manifest is not None
    return writer.manifest


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write(tmp_path / "en.v1")
    return tmp_path / "en.v1"


@settings(max_examples=40)
@given(
    documents=st.lists(st.lists(st.integers(0, 65_535), max_size=5), min_size=1, max_size=20),
    vocab_size=st.sampled_from([65_499, 65_500, 70_000]),
)
def test_bytes_are_megatrons(tmp_path: Path, documents: list[list[int]], vocab_size: int) -> None:
    prefix = tmp_path / "corpus"
    write(prefix, [(tokens, "x") for tokens in documents], vocab_size=vocab_size, overwrite=True)
    whole = [[*tokens, EOD] for tokens in documents]
    code, itemsize = (8, 2) if vocab_size < 65_500 else (4, 4)

    assert megatron_documents(prefix) == whole
    expected = megatron_index(code, list(map(len, whole)), itemsize, list(range(len(whole) + 1)))
    assert Path(f"{prefix}.idx").read_bytes() == expected
    assert tokens_of(prefix, "<u2" if itemsize == 2 else "<i4").tolist() == list(chain(*whole))


def test_reading_gives_what_was_written(prefix: Path) -> None:
    corpus = Corpus.open(prefix)
    assert [corpus.document(i).tolist() for i in range(3)] == [[*d, EOD] for d, _ in DOCUMENTS]
    assert corpus.lengths.tolist() == [4, 2, 5]
    assert corpus.byte_offsets.tolist() == [0, 8, 12]
    assert corpus.tokens.tolist() == megatron_documents(prefix)[0] + [4, EOD, 5, 6, 1, 2, EOD]
    hashes = b"".join(document_hash(text.encode()) for _, text in DOCUMENTS)
    assert corpus.hashes.tobytes() == hashes
    with pytest.raises(IndexError, match="document 3 of 3"):
        corpus.document(3)
    with pytest.raises(IndexError, match="document -1 of 3"):
        corpus.document(-1)


def test_the_manifest_counts(prefix: Path) -> None:
    manifest = Manifest.read(prefix)
    assert (manifest.documents, manifest.tokens, manifest.text_bytes) == (3, 11, 11)
    assert (manifest.dtype, manifest.eod, manifest.sources) == ("uint16", EOD, ["a"])
    for suffix, file in manifest.files.items():
        path = Path(f"{prefix}{suffix}")
        assert (file.bytes, file.hash) == (path.stat().st_size, hash_file(path))


def test_documents_of_several_sequences_are_joined(prefix: Path) -> None:
    """As Megatron-LM writes them when it splits documents into sentences."""
    path = Path(f"{prefix}.idx")
    path.write_bytes(megatron_index(8, [1, 3, 2, 4, 1], 2, [0, 2, 3, 5]))
    rehash(prefix, ".idx")

    corpus = Corpus.open(prefix)
    assert corpus.lengths.tolist() == [4, 2, 5]
    assert [corpus.document(i).tolist() for i in range(3)] == [[*d, EOD] for d, _ in DOCUMENTS]


def test_a_batch_gives_what_single_documents_give(prefix: Path, tmp_path: Path) -> None:
    corpus = Corpus.open(prefix)
    options = {"tokenizer_hash": "t", "vocab_size": 100, "eod": EOD, "sources": ["a"]}
    text_bytes = [len(text) for _, text in DOCUMENTS]
    batch = DocumentBatch.of(corpus.tokens, corpus.lengths, corpus.hashes, text_bytes)
    with CorpusWriter(tmp_path / "batch", **options) as writer:
        writer.add_batch(batch.select(np.zeros(3, bool)))
        writer.add_batch(batch)
    assert corpus_bytes(tmp_path / "batch") == corpus_bytes(prefix)


def test_a_batch_that_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    tokens, hashes = np.arange(4), np.zeros(2, np.uint64)
    sums = np.zeros(2, SUM_DTYPE)
    with CorpusWriter(tmp_path / "x", tokenizer_hash="t", vocab_size=9, eod=0) as writer:
        writer.add_document([1], "x")
        with pytest.raises(ValueError, match="lengths do not sum"):
            writer.add_batch(DocumentBatch(tokens, np.array([1, 2]), hashes, sums))
        with pytest.raises(ValueError, match="3 lengths, 2 hashes"):
            writer.add_batch(DocumentBatch(tokens, np.array([1, 2, 1]), hashes, sums))


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    write(tmp_path / "c", [([1, 2, 3], "one"), ([4], "four"), ([5, 6, 1, 3], "five")])
    a, b, c = (Corpus.open(tmp_path / name).fingerprint for name in "abc")
    assert a == b != c


def test_a_corpus_pickles_as_its_prefix(prefix: Path) -> None:
    pickled = pickle.dumps(Corpus.open(prefix))
    assert len(pickled) < 1000
    assert pickle.loads(pickled).tokens.tolist() == Corpus.open(prefix).tokens.tolist()


def test_an_existing_corpus_is_only_replaced_when_asked(prefix: Path) -> None:
    before = corpus_bytes(prefix)
    with pytest.raises(InputError, match="exists already; pass --overwrite"):
        write(prefix, DOCUMENTS[:1])
    assert corpus_bytes(prefix) == before
    write(prefix, DOCUMENTS[:1], overwrite=True)
    assert len(Corpus.open(prefix).lengths) == 1


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def documents():
        yield [1], "x"
        raise KeyError

    with pytest.raises(KeyError):
        write(tmp_path / "x", documents())
    assert files_of(tmp_path) == []


def test_an_error_leaves_the_old_corpus(prefix: Path) -> None:
    before = corpus_bytes(prefix)
    with pytest.raises(InputError, match="would be empty; give files that hold text"):
        write(prefix, [], overwrite=True)
    assert corpus_bytes(prefix) == before
    assert len(files_of(prefix.parent)) == 6


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: cannot be created"):
        write(tmp_path / "file" / "en")
    with pytest.raises(InputError, match=r"cannot be written \(File name too long\)"):
        write(tmp_path / ("x" * 300))


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    code = """if True:
        import resource, sys
        import numpy as np
        from megaphase.corpus import CorpusWriter
        from megaphase.utils.errors import RunError
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            with CorpusWriter(sys.argv[1], tokenizer_hash="t", vocab_size=9, eod=0) as writer:
                for _ in range(10):
                    writer.add_document(np.ones(1_000_000, np.uint16), "x")
        except RunError as error:
            print(error)
    """
    process = start_python(code, tmp_path / "x")
    output, errors = process.communicate()
    assert errors == ""
    assert output == f"{tmp_path / 'x'}: cannot be written (File too large)\n"
    assert files_of(tmp_path) == []


KILLED_WRITER = """if True:
    import os, signal, sys
    from megaphase.corpus import CorpusWriter
    from megaphase.corpus import writer as module
    from megaphase.corpus.manifest import Manifest
    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)
    moment = sys.argv[2]
    if moment == "publish":
        module.fsync_path = kill
    if moment == "manifest":
        Manifest.write = kill
    with CorpusWriter(
        sys.argv[1], tokenizer_hash="t", vocab_size=100, eod=7, overwrite=True
    ) as writer:
        writer.add_document([1] * 1_000_000, "x")
        if moment == "data":
            kill()
"""


@pytest.mark.parametrize("moment", ["data", "publish", "manifest"])
def test_a_killed_writer_leaves_nothing_that_is_taken_for_whole(prefix: Path, moment: str) -> None:
    process = start_python(KILLED_WRITER, prefix, moment)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    if moment == "data":
        assert len(Corpus.open(prefix).lengths) == len(DOCUMENTS)
    else:
        with pytest.raises(InputError, match=r"en\.v1\.json: no such file; without it the corpus"):
            Corpus.open(prefix)
    # The next writer cleans up.
    write(prefix, overwrite=True)
    assert len(files_of(prefix.parent)) == 6


def test_two_writers_of_one_corpus_are_refused(tmp_path: Path) -> None:
    options = {"tokenizer_hash": "t", "vocab_size": 100, "eod": EOD}
    with CorpusWriter(tmp_path / "x", **options) as writer:
        writer.add_document([1], "x")
        process = start_python(KILLED_WRITER, tmp_path / "x", "data")
        assert "x: is being written by another process; wait for it" in process.communicate()[1]
    assert Corpus.open(tmp_path / "x").tokens.tolist() == [1, EOD]


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".hash", ".sum", ".blocks", ".json"])
def test_a_missing_file_is_named(prefix: Path, suffix: str) -> None:
    os.remove(f"{prefix}{suffix}")
    with pytest.raises(InputError, match=rf"en\.v1\{suffix}: no such file"):
        Corpus.open(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".hash", ".sum", ".blocks"])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_named(prefix: Path, suffix: str, change: int) -> None:
    path = Path(f"{prefix}{suffix}")
    os.truncate(path, path.stat().st_size + change)
    fault = "truncated" if change < 0 else "too long"
    with pytest.raises(InputError, match=rf"en\.v1\{suffix}: is {fault}: \d+ bytes"):
        Corpus.open(prefix)


@pytest.mark.parametrize(
    ("position", "data", "message"),
    [
        (0, b"X", "is not a Megatron-LM index"),
        (9, b"\2", "is of version 2, only 1 can be read"),
        (17, b"\x63", "has the unknown token dtype code 99"),
        (17, b"\7", "holds float32 numbers, not tokens"),
        (17, b"\4", "dtype: uint16, but its .idx has int32"),
        (18, b"\4", "is truncated: 102 bytes, its header says 114"),
        (-8, b"\2", "its documents do not span its 3 sequences"),
        (34 + 8, b"\4", "does not fit its .bin: its last document ends at byte 20, the file at 22"),
    ],
)
def test_a_wrong_index_is_refused(prefix: Path, position: int, data: bytes, message: str) -> None:
    edit_bytes(Path(f"{prefix}.idx"), position, data)
    with pytest.raises(InputError, match=message) as error:
        Corpus.open(prefix)
    assert str(error.value).startswith(f"{prefix}.")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("documents", 4, "documents: 4, but its .idx has 3"),
        ("tokens", 12, "tokens: 12, but its .bin has 11"),
        ("tokens", "many", "tokens: Input should be a valid integer"),
        ("documents", 0, "the corpus is empty; tokenize files that hold text"),
        ("files", {}, "files: .bin is not listed"),
        ("version", 2, "version: Input should be 1"),
    ],
)
def test_a_wrong_manifest_is_refused(prefix: Path, key: str, value: object, message: str) -> None:
    rewrite_manifest(prefix, **{key: value})
    with pytest.raises(InputError, match=message) as error:
        Corpus.open(prefix)
    assert str(error.value).startswith(f"{prefix}.json")


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".hash", ".sum", ".json"])
def test_a_file_in_place_of_the_prefix_is_explained(prefix: Path, suffix: str) -> None:
    with pytest.raises(InputError, match=r"give the corpus's prefix, .*en\.v1$"):
        Corpus.open(f"{prefix}{suffix}")


def test_a_run_error_is_not_an_input_error() -> None:
    assert not issubclass(RunError, InputError)
    error = InputError("where", "problem", "remedy")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "where: problem; remedy"
