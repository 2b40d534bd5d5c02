"""`data tokenize` and the commands: the same bytes with any number of workers, atomically."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import signal
from pathlib import Path

import pytest
import zstandard
from data_support import (
    CORPORA,
    CORPUS_FILES,
    LIMIT_SECONDS,
    VOCAB_SIZE,
    children_of,
    corpus_bytes,
    files_of,
    is_running,
    make_tokenizer,
    megatron_documents,
    start_python,
    wait_until,
    write_jsonl,
)
from rich.console import Console
from typer.testing import CliRunner

from megaphase.corpus import Corpus
from megaphase.corpus.format import document_hash
from megaphase.data_tools.commands import data_app
from megaphase.data_tools.text import Reading
from megaphase.data_tools.tokenization.tokenize import tokenize
from megaphase.data_tools.tokenizers.commands import tokenizer_app
from megaphase.data_tools.tokenizers.train import train_tokenizer
from megaphase.tokenizer import Tokenizer
from megaphase.utils import progress
from megaphase.utils.errors import InputError

TEXTS = ["one two", "", "drei\nvier\n", "  ▁<eod> 😀", "", "x" * 3000]


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make about 4 MB: several chunks, documents of very different lengths, some empty."""
    dice = random.Random(1)
    path = tmp_path_factory.mktemp("large") / "large.jsonl"
    lengths = (int(dice.paretovariate(0.8)) * 100 % 60_000 - 100 for _ in range(8_000))
    return write_jsonl(path, ("lorem ipsum dolor " * (length // 18) for length in lengths))


def test_tokens_are_the_tokenizers(tok: Path, tmp_path: Path) -> None:
    manifest = tokenize(
        [write_jsonl(tmp_path / "a.jsonl", TEXTS)], tok, tmp_path / "data" / "en", workers=2
    )
    tokenizer, kept = Tokenizer.load(tok), [text for text in TEXTS if text]
    expected = [[*tokenizer.encode(text), tokenizer.eod] for text in kept]
    assert megatron_documents(tmp_path / "data" / "en") == expected
    assert files_of(tmp_path / "data") == CORPUS_FILES

    assert manifest.documents == 4
    assert manifest.skipped_empty == 2
    assert manifest.tokens == sum(map(len, expected))
    assert manifest.text_bytes == sum(len(text.encode()) for text in kept)
    assert manifest.vocab_size == VOCAB_SIZE
    assert manifest.tokenizer_hash == tokenizer.fingerprint
    assert manifest.sources == ["a.jsonl"]
    corpus = Corpus.open(tmp_path / "data" / "en")
    assert corpus.hashes.tobytes() == b"".join(document_hash(text.encode()) for text in kept)
    assert [tokenizer.decode(corpus.document(i)) for i in range(4)] == kept


def test_the_bytes_do_not_depend_on_the_workers(tok: Path, large: Path, tmp_path: Path) -> None:
    for workers in (1, 2, 5):
        tokenize([large], tok, tmp_path / str(workers) / "en", workers=workers)
    first = corpus_bytes(tmp_path / "1" / "en")
    assert json.loads(first[".json"])["skipped_empty"] > 0
    assert corpus_bytes(tmp_path / "2" / "en") == first
    assert corpus_bytes(tmp_path / "5" / "en") == first


def test_every_kind_of_file_gives_the_same_corpus(tok: Path, tmp_path: Path) -> None:
    texts = ["one\ntwo", "three", "four"]
    plain = write_jsonl(tmp_path / "a.jsonl", texts)
    data = plain.read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(data))
    (tmp_path / "a.txt").write_text("\n\n".join(texts) + "\n")
    write_jsonl(tmp_path / "b.jsonl", texts, key="tgt")
    for i, name in enumerate(("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "b.jsonl")):
        key = "tgt" if name.startswith("b") else "text"
        tokenize([tmp_path / name], tok, tmp_path / f"{i}", reading=Reading(key), workers=1)
        for ending in (".bin", ".idx", ".hash", ".sum"):
            assert (tmp_path / f"{i}{ending}").read_bytes() == (
                tmp_path / f"0{ending}"
            ).read_bytes()


def test_several_inputs_are_joined_in_order(tok: Path, tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "b.jsonl", ["one", "two"])
    second = write_jsonl(tmp_path / "a.jsonl", ["three"])
    manifest = tokenize([first, second], tok, tmp_path / "en", workers=2)
    tokenizer = Tokenizer.load(tok)
    texts = [tokenizer.decode(tokens) for tokens in megatron_documents(tmp_path / "en")]
    assert texts == ["one", "two", "three"]
    assert manifest.sources == ["b.jsonl", "a.jsonl"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"text": "a"}\n{', r"a\.jsonl:2: is not valid JSON"),
        ('{"tgt": "a"}', r"a\.jsonl:1: the key 'text' is missing; the keys are 'tgt'"),
        ("", r"en: the corpus would be empty; give files that hold text"),
        ('{"text": ""}\n', r"en: the corpus would be empty"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_wrong_text_leaves_nothing(
    tok: Path, tmp_path: Path, lines: str, message: str, workers: int
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines)
    with pytest.raises(InputError, match=message):
        tokenize([path], tok, tmp_path / "en", workers=workers)
    assert files_of(tmp_path) == ["a.jsonl"]


def test_the_first_wrong_line_is_named_whatever_the_workers(
    tok: Path, large: Path, tmp_path: Path
) -> None:
    lines = large.read_text().splitlines(keepends=True)
    lines[500], lines[7_900] = "oops\n", "{}\n"
    path = tmp_path / "a.jsonl"
    path.write_text("".join(lines))
    for workers in (1, 3):
        with pytest.raises(InputError, match=r"a\.jsonl:501: is not valid JSON"):
            tokenize([path], tok, tmp_path / "en", workers=workers)


def test_wrong_arguments_are_named(tok: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(InputError, match="no text file was given"):
        tokenize([], tok, tmp_path / "en", workers=1)
    with pytest.raises(InputError, match="--workers: 0 is not a number of processes"):
        tokenize([path], tok, tmp_path / "en", workers=0)
    with pytest.raises(InputError, match=r"none\.jsonl: no such file"):
        tokenize([path, tmp_path / "none.jsonl"], tok, tmp_path / "en", workers=1)
    with pytest.raises(InputError, match=r"nowhere: no such file or directory; give another"):
        tokenize([path], tmp_path / "nowhere", tmp_path / "en", workers=1)
    assert files_of(tmp_path) == ["a.jsonl"]


def test_an_existing_corpus_is_only_replaced_when_asked(tok: Path, tmp_path: Path) -> None:
    first, second = (write_jsonl(tmp_path / f"{i}.jsonl", [str(i)]) for i in range(2))
    tokenize([first], tok, tmp_path / "en", workers=1)
    before = corpus_bytes(tmp_path / "en")
    with pytest.raises(InputError, match=r"en\.json: exists already; pass --overwrite"):
        tokenize([second], tok, tmp_path / "en", workers=1)
    assert corpus_bytes(tmp_path / "en") == before
    tokenize([second], tok, tmp_path / "en", workers=1, overwrite=True)
    assert Corpus.open(tmp_path / "en").manifest.sources == ["1.jsonl"]


LONG_RUN = """if True:
    import sys
    from pathlib import Path
    from megaphase.corpus import hashed_file
    from megaphase.data_tools.tokenization.tokenize import tokenize
    # Smaller than usual, so that something is on the disk soon.
    hashed_file._CHUNK_BYTES = 1000
    tokenize([Path(sys.argv[1])], Path(sys.argv[2]), Path(sys.argv[3]), workers=2, overwrite=True)
"""


@pytest.mark.parametrize(
    ("whom", "how", "last_line"),
    [
        ("main", signal.SIGKILL, ""),
        ("all", signal.SIGINT, "KeyboardInterrupt"),
        ("worker", signal.SIGKILL, "RunError: a worker process was killed by SIGKILL"),
    ],
)
def test_stopped_in_the_middle(
    tok: Path, tmp_path: Path, whom: str, how: signal.Signals, last_line: str
) -> None:
    data = tmp_path / "data"
    old = write_jsonl(tmp_path / "old.jsonl", ["one"])
    tokenize([old], tok, data / "en", workers=1)
    before = corpus_bytes(data / "en")

    # Many seconds of work in a small file.
    long = tmp_path / "long.jsonl.zst"
    long.write_bytes(zstandard.compress(b'{"text": "one two three"}\n' * 3_000_000))
    main = start_python(LONG_RUN, long, tok, data / "en")
    wait_until(lambda: any(path.stat().st_size for path in data.glob(".en.draft/.bin")))
    # The resource tracker is a child too.
    wait_until(lambda: len(children_of(main.pid)) == 3)
    children = children_of(main.pid)
    if whom == "all":
        os.killpg(main.pid, how)
    else:
        os.kill(main.pid if whom == "main" else children[-1], how)
    _, errors = main.communicate(timeout=LIMIT_SECONDS)
    wait_until(lambda: not any(map(is_running, children)))
    assert (errors.splitlines() or [""])[-1].rpartition("errors.")[2].startswith(last_line)
    assert errors.count("Traceback") == (whom != "main")

    # The earlier corpus is still complete; the staging folder stays only after a SIGKILL.
    assert corpus_bytes(data / "en") == before
    assert (".en.draft" in files_of(data)) == (whom == "main")
    tokenize([old], tok, data / "en", workers=1, overwrite=True)
    assert files_of(data) == CORPUS_FILES


def test_progress_is_a_bar_in_a_terminal(tok: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    tokenize([path], tok, tmp_path / "en", workers=1, console=console)
    assert "tokenizing" in screen.getvalue()
    assert "MB/s" in screen.getvalue()
    assert "100%" in screen.getvalue()


def test_progress_is_plain_lines_elsewhere(
    tok: Path, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    output = io.StringIO()
    tokenize([large], tok, tmp_path / "en", workers=1, console=Console(file=output))
    lines = output.getvalue().splitlines()
    assert len(lines) > 2
    assert all(line.startswith("tokenizing: ") and " s left" in line for line in lines)
    assert lines[-1].startswith("tokenizing: 100%, ")
    assert lines[-1].endswith("about 0 s left")


def test_the_commands_from_text_to_a_verified_corpus(tmp_path: Path) -> None:
    run, folder = CliRunner(), tmp_path
    texts = [f"some {i} words and {i * 3} others" for i in range(200)]
    first = write_jsonl(folder / "a.jsonl", texts[:100])
    second = write_jsonl(folder / "b.jsonl", texts[100:])
    tok, joined = str(folder / "tok"), str(folder / "en")
    languages = ["--input", f"en={first}", "--input", f"de={second}", "--input", f"en={second}"]
    arguments = ["train", *languages, "--vocab-size", "300", "--out", tok, "--tag", "fr"]
    result = run.invoke(tokenizer_app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "300 tokens in" in result.stdout
    assert list(Tokenizer.load(tok).record.languages) == ["en", "de"]

    for path in (first, second):
        arguments = ["tokenize", str(path), "--tokenizer", tok, "--out", str(path.with_suffix(""))]
        result = run.invoke(data_app, arguments, catch_exceptions=False)
        assert result.exit_code == 0
        assert "100" in result.stdout
    arguments = ["merge", str(folder / "a"), str(folder / "b"), "--out", joined]
    assert run.invoke(data_app, arguments, catch_exceptions=False).exit_code == 0
    result = run.invoke(data_app, ["verify", joined], catch_exceptions=False)
    assert result.stdout.startswith(f"{joined}: OK, 200 documents, ")
    result = run.invoke(data_app, ["inspect", joined], catch_exceptions=False)
    assert "bytes per token" in result.stdout
    arguments = ["inspect", joined, "--tokenizer", tok, "--document", "150"]
    result = run.invoke(data_app, arguments, catch_exceptions=False)
    assert result.stdout == texts[150] + "\n"


@pytest.mark.parametrize("text", ["en", "=a.jsonl", "en="])
def test_an_input_without_its_language_is_refused(text: str) -> None:
    arguments = ["train", "--input", text, "--vocab-size", "300", "--out", "tok"]
    with pytest.raises(InputError, match=f"--input: '{text}' is not LANGUAGE=FILE"):
        CliRunner().invoke(tokenizer_app, arguments, catch_exceptions=False)


def test_a_document_cannot_be_shown_without_its_tokenizer() -> None:
    arguments = ["inspect", "prefix", "--document", "0"]
    with pytest.raises(InputError, match=r"--document: .* needs the tokenizer; add --tokenizer"):
        CliRunner().invoke(data_app, arguments, catch_exceptions=False)


@pytest.mark.parametrize("command", ["tokenize", "inspect", "verify", "merge"])
def test_help_has_an_example(command: str) -> None:
    result = CliRunner().invoke(data_app, [command, "--help"])
    assert f"Example: megaphase data {command}" in result.stdout


@pytest.mark.skipif(not CORPORA.is_dir(), reason=f"needs the corpora in {CORPORA}")
def test_real_text_comes_back(tmp_path: Path) -> None:
    inputs = {name: [CORPORA / f"{name}.jsonl.gz"] for name in ("eu",)}
    train_tokenizer(inputs, tmp_path / "tok", vocab_size=1_000)
    tokenizer = Tokenizer.load(tmp_path / "tok")
    for name, (path,) in inputs.items():
        tokenize([path], tmp_path / "tok", tmp_path / name, workers=2)
        with gzip.open(path, "rt", encoding="utf-8") as file:
            texts = [json.loads(line)["text"] for line in file]
        corpus = Corpus.open(tmp_path / name)
        assert [tokenizer.decode(corpus.document(i)) for i in range(len(texts))] == texts
