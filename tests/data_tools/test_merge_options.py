"""`--dedup` and `--shuffle` compared with slow references, for any amount sorted on disk."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from data_support import (
    CORPUS_FILES,
    corpus_bytes,
    files_of,
    make_tokenizer,
    megatron_documents,
    start_python,
    write_jsonl,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from megaphase.corpus import Corpus, CorpusWriter
from megaphase.corpus.batch import batches_of
from megaphase.corpus.manifest import ShardOf
from megaphase.data_tools.commands import data_app
from megaphase.data_tools.corpora import duplicates, input_removal, shuffle
from megaphase.data_tools.corpora import merge as merge_module
from megaphase.data_tools.corpora.merge import merge
from megaphase.data_tools.corpora.verify import verify_corpus
from megaphase.data_tools.shards import ShardChoice, existing_shards
from megaphase.data_tools.tokenization.tokenize import tokenize
from megaphase.utils.errors import InputError, RunError

EOD = 0


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write(prefix: Path, texts: list[list[int]], **options) -> Path:
    """Write a corpus whose documents' texts are their tokens in words."""
    with CorpusWriter(prefix, tokenizer_hash="t", vocab_size=99, eod=EOD, **options) as writer:
        for tokens in texts:
            writer.add_document(tokens, " ".join(map(str, tokens)))
    return prefix


def first_ones(documents: list[list[int]]) -> list[list[int]]:
    seen: list[list[int]] = []
    for document in documents:
        if document not in seen:
            seen.append(document)
    return seen


texts = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3), min_size=1, max_size=40)


@settings(max_examples=40, deadline=None)
@given(corpora=st.lists(texts, min_size=1, max_size=3), bucket=st.integers(1, 50))
def test_the_first_of_equal_documents_stays(tmp_path, monkeypatch, corpora, bucket) -> None:
    monkeypatch.setattr(duplicates, "_BUCKET_DOCUMENTS", bucket)
    monkeypatch.setattr(duplicates, "_READ_DOCUMENTS", 7)
    monkeypatch.setattr(batches_of, "__defaults__", (20,))
    shutil.rmtree(tmp_path)
    prefixes = [write(tmp_path / str(i), each) for i, each in enumerate(corpora)]
    manifest = merge(prefixes, tmp_path / "en", drop_duplicates=True)
    every = [document for each in corpora for document in each]
    expected = first_ones(every)
    assert megatron_documents(tmp_path / "en") == [[*document, EOD] for document in expected]
    assert manifest.skipped_duplicates == len(every) - len(expected)
    assert verify_corpus(tmp_path / "en").text_bytes == sum(2 * len(each) - 1 for each in expected)


def test_tokens_alone_or_text_alone_make_no_duplicate(tmp_path: Path) -> None:
    """Pairs of one source have one hash, and two texts may have the same tokens."""
    with CorpusWriter(tmp_path / "a", tokenizer_hash="t", vocab_size=99, eod=EOD) as writer:
        for tokens, text in (([1], "one"), ([2], "one"), ([1], "uno"), ([1], "one")):
            writer.add_document(tokens, text)
    merge([tmp_path / "a"], tmp_path / "b", drop_duplicates=True)
    assert megatron_documents(tmp_path / "b") == [[1, EOD], [2, EOD], [1, EOD]]


@settings(max_examples=15, deadline=None)
@given(corpora=st.lists(texts, min_size=1, max_size=3), bucket=st.integers(1, 4000))
def test_a_shuffle_is_one_permutation(tmp_path, monkeypatch, corpora, bucket) -> None:
    shutil.rmtree(tmp_path)
    prefixes = [write(tmp_path / str(i), each) for i, each in enumerate(corpora)]
    merge(prefixes, tmp_path / "whole", shuffle_seed=3)
    monkeypatch.setattr(shuffle, "_BUCKET_BYTES", bucket)
    monkeypatch.setattr(shuffle, "_MOST_BUCKETS", 4)
    monkeypatch.setattr(batches_of, "__defaults__", (20,))
    manifest = merge(prefixes, tmp_path / "parts", shuffle_seed=3)
    assert corpus_bytes(tmp_path / "parts") == corpus_bytes(tmp_path / "whole")
    every = [[*document, EOD] for each in corpora for document in each]
    assert sorted(megatron_documents(tmp_path / "parts")) == sorted(every)
    assert verify_corpus(tmp_path / "parts") == manifest


def test_a_shuffle_mixes(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[1 + i % 90, 1 + i // 90] for i in range(900)])
    orders = []
    for seed in (1, 2):
        merge([prefix], tmp_path / str(seed), shuffle_seed=seed)
        documents = megatron_documents(tmp_path / str(seed))
        orders.append(np.array([a - 1 + 90 * (b - 1) for a, b, _ in documents]))
    for order in orders:
        assert sorted(order) == list(range(900))
        # Chance alone gives 0 ± 1 / sqrt(900).
        assert abs(np.corrcoef(order, np.arange(900))[0, 1]) < 0.15
        assert np.mean(np.abs(np.diff(order)) == 1) < 0.02
    assert np.mean(orders[0] == orders[1]) < 0.02


def test_random_keys_are_splitmix64() -> None:
    """Against the algorithm in plain integers."""

    def splitmix64(number: int, key: int) -> int:
        mask = 2**64 - 1
        x = ((number + 1) * 0x9E3779B97F4A7C15 + key) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    key = 2**63 + 12345
    expected = [splitmix64(number, key) for number in range(5, 25)]
    assert shuffle.random_keys(5, 20, key).tolist() == expected


def test_tokenizing_and_merging_shards_agree(tok: Path, tmp_path: Path) -> None:
    """At once, and in shards that are merged: the same documents in the same order."""
    lines = [f"number {i % 70} · text" for i in range(200)]
    path = write_jsonl(tmp_path / "a.jsonl", lines)
    options = {"drop_duplicates": True, "shuffle_seed": 11}
    at_once = tokenize([path], tok, tmp_path / "at-once", workers=1, **options)
    for number in range(4):
        tokenize([path], tok, tmp_path / "en", workers=1, shard=ShardChoice(number, 4))
    merge(existing_shards(tmp_path / "en"), tmp_path / "en", **options)
    assert corpus_bytes(tmp_path / "at-once") == corpus_bytes(tmp_path / "en")
    assert (at_once.documents, at_once.skipped_duplicates) == (70, 130)
    assert not [name for name in files_of(tmp_path) if name.startswith(".")]


def test_only_the_merge_is_done_again(tok: Path, tmp_path: Path, monkeypatch) -> None:
    """If the tokens for `--dedup` are written, and only the following step was stopped."""
    from megaphase.data_tools.tokenization import tokenize as module

    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two", "one"])
    out = tmp_path / "out" / "en"
    with monkeypatch.context() as stopped:
        stop = mock.Mock(side_effect=KeyboardInterrupt)
        stopped.setattr(input_removal, "merge", stop)
        with pytest.raises(KeyboardInterrupt):
            tokenize([path], tok, out, workers=1, drop_duplicates=True)
    monkeypatch.setattr(module, "ordered_map", None)
    assert tokenize([path], tok, out, workers=1, drop_duplicates=True).documents == 2
    assert files_of(out.parent) == CORPUS_FILES


def test_the_commands_say_what_was_left_out(tok: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two", "one"])
    for name, arguments in (
        ("a", ["tokenize", str(path), "--tokenizer", str(tok), "--shuffle", "1"]),
        ("b", ["merge", str(tmp_path / "a")]),
    ):
        arguments = [*arguments, "--out", str(tmp_path / name), "--dedup"]
        result = CliRunner().invoke(data_app, arguments)
        assert result.exit_code == 0, result.output
        assert result.stdout.splitlines()[-1] == "Duplicates left out: 1"
    assert len(Corpus.open(tmp_path / "b").lengths) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tag": 5}, r"b: holds translation pairs with the tag 5, .*a texts; keep them as two"),
        ({"vocab_size": 70_000}, r"b: its tokens are int32, those of .*a uint16; tokenize both"),
        ({"tokenizer_hash": "u"}, r"b: was made with another tokenizer than .*a; tokenize it"),
    ],
)
def test_merging_refuses_what_is_not_alike(tmp_path: Path, change: dict, message: str) -> None:
    write(tmp_path / "a", [[1]])
    options = {"tokenizer_hash": "t", "vocab_size": 99, "eod": EOD} | change
    with CorpusWriter(tmp_path / "b", **options) as writer:
        writer.add_document([1], "1")
    with pytest.raises(InputError, match=message):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")


# Killed when so many of the files to be removed have been removed.
KILLED_IN_THE_REMOVAL = """if True:
    import os, signal, sys
    from pathlib import Path
    from megaphase.data_tools.commands import data_app
    left, unlink = int(sys.argv[1]), Path.unlink
    def counted(path, **options):
        global left
        if path.name.startswith(("a.", "b.", "en.shard-", ".en.removal")):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
        unlink(path, **options)
    Path.unlink = counted
    data_app(sys.argv[2:])
"""
ALL_FILES = 12  # of two corpora with six files each


@pytest.mark.parametrize("removed", [0, 2, 6, ALL_FILES])
@pytest.mark.parametrize("way", ["prefixes", "shards", "over itself"])
def test_a_removal_that_was_stopped_is_finished(tmp_path: Path, way: str, removed: int) -> None:
    names = ["a", "b"]
    if way == "shards":
        names = [f"en.shard-0000{number}-of-00002" for number in range(2)]
    for number, name in enumerate(names):
        shard = ShardOf(job="j", number=number, of=2) if way == "shards" else None
        write(tmp_path / name, [[1 + number]], shard=shard)
    inputs = ["--shards"] if way == "shards" else [str(tmp_path / name) for name in names]
    expected = [[1, EOD], [2, EOD]]
    if way == "over itself":
        write(tmp_path / "en", [[3]])
        inputs = [str(tmp_path / "en"), *inputs, "--overwrite"]
        expected.insert(0, [3, EOD])
    command = ["merge", *inputs, "--out", str(tmp_path / "en"), "--remove"]
    killed = start_python(KILLED_IN_THE_REMOVAL, removed, *command)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    whole = corpus_bytes(tmp_path / "en")
    left = sum(name.startswith(tuple(names)) for name in files_of(tmp_path))
    assert left == ALL_FILES - removed
    result = CliRunner().invoke(data_app, command)
    assert result.exit_code == 0, result.output
    assert megatron_documents(tmp_path / "en") == expected
    assert corpus_bytes(tmp_path / "en") == whole
    assert {Path(name).stem for name in files_of(tmp_path)} == {"en"}


@pytest.mark.parametrize("change", ["input", "result", "option"])
def test_what_was_not_merged_is_not_removed(tmp_path: Path, change: str) -> None:
    for number, name in enumerate("ab"):
        write(tmp_path / name, [[1 + number]])
    out = tmp_path / "en"
    command = ["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out), "--remove"]
    start_python(KILLED_IN_THE_REMOVAL, 0, *command).communicate()
    if change == "input":
        write(tmp_path / "b", [[5]], overwrite=True)
    elif change == "result":
        write(out, [[1]], overwrite=True)
    else:
        command.append("--dedup")
    result = CliRunner().invoke(data_app, command)
    assert "en.json: exists already" in str(result.exception)
    assert megatron_documents(tmp_path / "a") == [[1, EOD]]
    assert megatron_documents(tmp_path / "b") == [[5 if change == "input" else 2, EOD]]


def test_a_corpus_that_is_replaced_during_the_merge_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate("ab"):
        write(tmp_path / name, [[1 + number]])
    real = input_removal.merge

    def merge_and_replace(*arguments, **options):
        real(*arguments, **options)
        write(tmp_path / "b", [[5]], overwrite=True)

    monkeypatch.setattr(input_removal, "merge", merge_and_replace)
    input_removal.merge_and_remove([tmp_path / "a", tmp_path / "b"], tmp_path / "en")
    assert megatron_documents(tmp_path / "en") == [[1, EOD], [2, EOD]]
    assert megatron_documents(tmp_path / "b") == [[5, EOD]]


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({}, None),  # the size of the inputs' files
        ({"shuffle_seed": 1}, None),
        ({"drop_duplicates": True}, 2 * 2 * 11),  # two documents of ten tokens of two bytes
    ],
)
def test_a_disk_that_is_too_small_for_a_merge_is_found_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict, needed: int | None
) -> None:
    prefixes = [
        write(tmp_path / name, [[token] * 10 for token in tokens])
        for name, tokens in (("a", (1, 2, 1)), ("b", (2, 2)))
    ]
    files = [path for name in "ab" for path in tmp_path.glob(f"{name}.*") if path.suffix != ".json"]
    if needed is None:
        needed = sum(path.stat().st_size for path in files)
    usage = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(merge_module.shutil, "disk_usage", lambda path: usage)
    said = (
        r"c: the corpus needs 0\.000 GB, the disk has 0\.000 GB left; make room or choose another"
    )
    with pytest.raises(RunError, match=said):
        merge(prefixes, tmp_path / "out" / "c", **options)
    assert files_of(tmp_path / "out") == []
    usage.free += 1
    merge(prefixes, tmp_path / "out" / "c", **options)


def test_what_is_sorted_on_disk_is_counted_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a", [[1] * 10] * 50)
    monkeypatch.setattr(shuffle, "_BUCKET_BYTES", 100)
    size = sum(p.stat().st_size for p in tmp_path.glob("a.*") if p.suffix != ".json")
    tokens = (tmp_path / "a.bin").stat().st_size
    usage = SimpleNamespace(free=size + tokens - 1)
    monkeypatch.setattr(merge_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RunError, match="the disk has"):
        merge([tmp_path / "a"], tmp_path / "b", shuffle_seed=1)
    usage.free += 1
    merge([tmp_path / "a"], tmp_path / "b", shuffle_seed=1)


def test_a_merge_onto_a_disk_that_is_too_small_writes_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only a privileged user may mount a small disk")
    try:
        write(tmp_path / "a", [[1] * 10_000] * 5)
        with pytest.raises(RunError, match=r"needs 0\.000 GB, the disk has"):
            merge([tmp_path / "a"], disk / "c")
        assert files_of(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)
