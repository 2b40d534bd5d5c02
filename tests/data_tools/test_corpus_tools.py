"""`data inspect`, `verify` and `merge`."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_support import (
    corpus_bytes,
    edit_bytes,
    files_of,
    make_tokenizer,
    rehash,
    rewrite_manifest,
    write_jsonl,
)
from rich.console import Console

from megaphase.corpus import Corpus, CorpusWriter
from megaphase.corpus._checksums import block_checksums
from megaphase.corpus.batch import batches_of, checksums
from megaphase.data_tools.corpora.inspect import describe, document_text
from megaphase.data_tools.corpora.merge import merge
from megaphase.data_tools.corpora.verify import verify_corpus
from megaphase.data_tools.tokenization.tokenize import tokenize
from megaphase.utils.errors import InputError

TEXTS = ["one two", "drei\nvier", "", "😀" * 40, "four"]


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def made(tok: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    tokenize([write_jsonl(folder / "a.jsonl", TEXTS)], tok, folder / "en", workers=1)
    return folder


@pytest.fixture
def prefix(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "en"


def rewrite_sums(prefix: Path) -> None:
    """Make checksums and manifest match altered files, as a faulty writer would."""
    corpus = Corpus.open(prefix)
    if int(corpus.lengths.sum()) == len(corpus.tokens):
        sums = np.array(corpus.sums)
        sums["checksum"] = checksums(
            corpus.tokens, corpus.lengths, corpus.hashes, sums["text_bytes"]
        )
        sums.tofile(f"{prefix}.sum")
    block_checksums(np.fromfile(f"{prefix}.bin", np.uint8)).tofile(f"{prefix}.blocks")
    rehash(prefix)


def shown(prefix: Path) -> str:
    output = io.StringIO()
    Console(file=output, width=100).print(describe(prefix))
    return output.getvalue()


def test_the_summary_has_the_figures(prefix: Path) -> None:
    corpus = Corpus.open(prefix)
    manifest, text = corpus.manifest, " ".join(shown(prefix).split())
    assert "documents 4 (1 empty left out)" in text
    assert f"tokens {manifest.tokens:,} as uint16" in text
    assert f"text {manifest.text_bytes:,} bytes of UTF-8" in text
    assert f"bytes per token {manifest.text_bytes / (manifest.tokens - 4):.3f}" in text
    assert f"tokenizer hash {manifest.tokenizer_hash}" in text
    assert "sources a.jsonl" in text
    assert f" {corpus.lengths.max():,} {corpus.lengths.mean():,.1f}" in text


def test_the_summary_counts_lengths_by_powers_of_two(tmp_path: Path) -> None:
    with CorpusWriter(tmp_path / "x", tokenizer_hash="t", vocab_size=9, eod=0) as writer:
        for length in (1, 2, 3, 3, 4, 7, 8, 1023):
            writer.add_document([1] * (length - 1), "x")
    lines = [" ".join(line.split()) for line in shown(tmp_path / "x").splitlines()]
    assert lines[-10].startswith("1 █")
    assert lines[-10].endswith("12.5%")
    assert lines[-9] == f"2 to 3 {'█' * 40} 37.5%"
    assert lines[-1].startswith("512 to 1,023 █")


def test_a_document_is_shown_as_text(tok: Path, prefix: Path) -> None:
    texts = [text for text in TEXTS if text]
    assert [document_text(prefix, tok, i)[0] for i in range(4)] == texts


@pytest.mark.parametrize("index", [4, -1])
def test_a_document_that_is_not_there_is_refused(tok: Path, prefix: Path, index: int) -> None:
    with pytest.raises(InputError, match=rf"en has no document {index}; choose 0 to 3"):
        document_text(prefix, tok, index)


def test_another_tokenizer_is_refused(prefix: Path, tmp_path: Path) -> None:
    other = make_tokenizer(tmp_path, seed=4)
    with pytest.raises(InputError, match="was made with another tokenizer"):
        document_text(prefix, other, 0)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("vocab_size", -1, "vocab_size: Input should be greater than or equal to 1"),
        ("vocab_size", 1 << 63, "vocab_size: Input should be less than or equal to 2147483648"),
        ("documents", True, "documents: Input should be a valid integer"),
        ("tokens", -5, "tokens: Input should be greater than or equal to 0"),
        ("tag", 1 << 40, "tag: Input should be less than 2147483648"),
        (
            "dtype",
            "float64\n",
            "dtype: Input should be 'uint8', 'int8', 'int16', 'uint16', 'int32'",
        ),
        ("files", {"/../x": {"bytes": 1, "hash": ""}}, "String should match pattern"),
    ],
)
def test_a_manifest_of_values_that_no_corpus_has_is_named(
    prefix: Path, key: str, value: object, problem: str
) -> None:
    path = Path(f"{prefix}.json")
    rewrite_manifest(prefix, **{key: value})
    with pytest.raises(InputError) as error:
        Corpus.open(prefix)
    assert str(error.value).startswith(f"{path}: ")
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_a_list_of_what_was_skipped_that_is_gone_is_named(tok: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with open(source, "a") as file:
        file.write("oops\n")
    tokenize([source], tok, tmp_path / "en", workers=1, skip_wrong=True)
    (tmp_path / "en.skipped.jsonl").unlink()
    # The training part is complete.
    assert Corpus.open(tmp_path / "en").manifest.skipped_wrong == 1
    with pytest.raises(InputError, match=r"en\.skipped\.jsonl: no such file; tokenize again"):
        verify_corpus(tmp_path / "en")
    with pytest.raises(InputError, match=r"en\.skipped\.jsonl: no such file; tokenize again"):
        merge([tmp_path / "en"], tmp_path / "all")


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".hash", ".sum"])
def test_a_document_that_was_altered_is_not_shown(tok: Path, prefix: Path, suffix: str) -> None:
    corpus = Corpus.open(prefix)
    position = {
        ".bin": int(corpus.byte_offsets[1]) + 2,
        ".idx": 34 + 4,
        ".hash": 8,
        ".sum": 8,
    }[suffix]
    data = Path(f"{prefix}{suffix}").read_bytes()
    edit_bytes(Path(f"{prefix}{suffix}"), position, bytes([data[position] ^ 1]))
    with pytest.raises(InputError, match=r"en\.bin: was altered in document 1 "):
        document_text(prefix, tok, 1)
    assert document_text(prefix, tok, 3)[0] == TEXTS[4]


def test_an_index_with_negative_lengths_is_named(prefix: Path) -> None:
    edit_bytes(Path(f"{prefix}.idx"), 34 + 4, b"\xff" * 4)
    with pytest.raises(InputError, match=r"en\.idx: was altered: its hash differs from"):
        describe(prefix)


def test_a_whole_corpus_is_verified(prefix: Path) -> None:
    assert verify_corpus(prefix) == Corpus.open(prefix).manifest


@pytest.mark.parametrize("suffix", [".bin", ".hash", ".sum"])
def test_the_document_of_any_altered_byte_is_named(prefix: Path, suffix: str) -> None:
    path, corpus = Path(f"{prefix}{suffix}"), Corpus.open(prefix)
    before = path.read_bytes()
    for position in range(len(before)):
        if suffix == ".bin":
            document = int(np.searchsorted(corpus.byte_offsets, position, side="right")) - 1
            where = rf"in document {document} \(bytes {corpus.byte_offsets[document]} to"
        else:
            where = f"at document {position // 8}"
        edit_bytes(path, position, bytes([before[position] ^ 1]))
        with pytest.raises(InputError, match=rf"en\{suffix}: was altered {where}"):
            verify_corpus(prefix)
        edit_bytes(path, position, before[position : position + 1])
    assert verify_corpus(prefix) == corpus.manifest


def test_an_altered_byte_of_the_index_is_found(prefix: Path) -> None:
    path = Path(f"{prefix}.idx")
    before = path.read_bytes()
    for position in range(len(before)):
        edit_bytes(path, position, bytes([before[position] ^ 1]))
        with pytest.raises(InputError, match=r"en\.(idx|json): "):
            verify_corpus(prefix)
        edit_bytes(path, position, before[position : position + 1])
    edit_bytes(path, 36, bytes([before[36] ^ 1]))
    with pytest.raises(InputError, match=r"was altered \(document 1 does not begin where the one"):
        verify_corpus(prefix)


def test_an_altered_list_of_skipped_documents_is_found(tok: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('[]\n{"text": "one"}\n')
    tokenize([tmp_path / "a.jsonl"], tok, tmp_path / "en", workers=1, skip_wrong=True)
    assert verify_corpus(tmp_path / "en").skipped_wrong == 1
    edit_bytes(tmp_path / "en.skipped.jsonl", 3, b"x")
    with pytest.raises(InputError, match=r"en\.skipped\.jsonl: was altered: its hash"):
        verify_corpus(tmp_path / "en")


def number(value: int, dtype: str) -> bytes:
    return np.array([value], dtype=dtype).tobytes()


def test_every_structural_fault_is_found(prefix: Path) -> None:
    """Faults that hashes cannot show, since the manifest was written for the faulty files."""
    corpus = Corpus.open(prefix)
    lengths, tokens = corpus.lengths.tolist(), len(corpus.tokens)
    length_at, offset_at, boundary_at = 34, 34 + 4 * 4, 34 + 4 * 4 + 8 * 4
    second_ends = sum(lengths[:2]) - 1
    for suffix, position, data, message in (
        (".bin", 2 * second_ends, number(5, "<u2"), r"en\.bin: document 1 does not end with EOD"),
        (
            ".bin",
            2,
            number(700, "<u2"),
            r"en\.bin: document 0 has the token 700, the vocabulary ends at 699",
        ),
        (".idx", length_at + 4, number(0, "<i4"), r"en\.idx: document 1 has no token"),
        (
            ".idx",
            length_at + 4,
            number(lengths[1] + 1, "<i4"),
            r"en\.idx: document 2 does not begin where the one before it ends",
        ),
        (
            ".idx",
            offset_at + 8,
            number(2, "<i8"),
            r"en\.idx: document 1 does not begin where the one before it ends",
        ),
        (
            ".idx",
            boundary_at + 8,
            number(2, "<i8"),
            r"en\.idx: document_indices do not ascend at document 1",
        ),
    ):
        path = Path(f"{prefix}{suffix}")
        before = corpus_bytes(prefix)
        edit_bytes(path, position, data)
        rewrite_sums(prefix)
        with pytest.raises(InputError, match=message):
            verify_corpus(prefix)
        for ending, content in before.items():
            Path(f"{prefix}{ending}").write_bytes(content)
    assert verify_corpus(prefix).tokens == tokens


def test_verifying_reads_large_corpora_in_parts(
    prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megaphase.data_tools.corpora.verify._INDEX_ITEMS", 3)
    monkeypatch.setattr(batches_of, "__defaults__", (20,))
    verify_corpus(prefix)
    edit_bytes(Path(f"{prefix}.bin"), 2 * 20, number(60_000, "<u2"))
    rewrite_sums(prefix)
    with pytest.raises(InputError, match="document 2 has the token 60000, the vocabulary ends at"):
        verify_corpus(prefix)


def test_merging_gives_what_tokenizing_at_once_gives(
    tok: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_of, "__defaults__", (20,))
    sources = [write_jsonl(tmp_path / f"{name}.jsonl", TEXTS[i:]) for i, name in enumerate("abc")]
    for source in sources:
        tokenize([source], tok, source.with_suffix(""), workers=1)
    tokenize(sources, tok, tmp_path / "at-once", workers=1)
    manifest = merge([source.with_suffix("") for source in sources], tmp_path / "merged")
    assert corpus_bytes(tmp_path / "merged") == corpus_bytes(tmp_path / "at-once")
    assert manifest.sources == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert manifest.skipped_empty == 3


def test_merging_refuses_what_does_not_fit(tok: Path, prefix: Path, tmp_path: Path) -> None:
    other_tok = make_tokenizer(tmp_path / "other", seed=4)
    tokenize([tmp_path / "a.jsonl"], other_tok, tmp_path / "xx", workers=1)
    tokenize([tmp_path / "a.jsonl"], tok, tmp_path / "de", workers=1)
    damaged = Path(f"{tmp_path / 'de'}.bin")
    edit_bytes(damaged, 0, bytes([damaged.read_bytes()[0] ^ 1]))
    before = files_of(tmp_path)
    for prefixes, message in (
        ([prefix, tmp_path / "xx"], r"xx: was made with another tokenizer than .*en; tokenize it"),
        ([prefix, tmp_path / "none"], r"none\.json: no such file"),
        ([prefix, tmp_path / "." / "en"], "en: the corpus is named twice; name it once"),
        ([prefix, tmp_path / "de"], r"de\.bin: was altered"),
        ([], "no corpus was given; name at least one prefix"),
    ):
        with pytest.raises(InputError, match=message):
            merge(prefixes, tmp_path / "merged")
    with pytest.raises(InputError, match=r"en\.json: exists already"):
        merge([prefix], prefix)
    assert files_of(tmp_path) == before


def test_a_corpus_may_be_merged_over_itself(tok: Path, prefix: Path, tmp_path: Path) -> None:
    tokenize([tmp_path / "a.jsonl"], tok, tmp_path / "de", workers=1)
    merge([prefix, tmp_path / "de"], prefix, overwrite=True)
    assert verify_corpus(prefix).documents == 8
