"""Tokenizers from elsewhere through every command: a corpus, its tools, a plan, a run."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from data_support import write_jsonl
from existing_tokenizers import STRANGE, TEXTS, llama_directory, t5_directory
from run_support import megaphase, read_rows, run_settings, write_run_file
from typer.testing import CliRunner

from megaphase.cli import app
from megaphase.corpus import Corpus
from megaphase.tokenizer import Tokenizer

KINDS: dict[str, Callable[[Path], Path]] = {
    "t5": t5_directory,
    "llama": llama_directory,
    "model": lambda folder: llama_directory(folder) / "tokenizer.model",
}
DOCUMENTS = [f"{text} {number}" for number in range(120) for text in (*TEXTS, *STRANGE)]


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module", params=list(KINDS))
def corpora(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with `tok` and the corpora `data/alda`, `boreth` and `cimri`."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "tok").symlink_to(KINDS[request.param](folder / "made"))
    text = write_jsonl(folder / "a.jsonl", DOCUMENTS)
    for name in ("alda", "boreth", "cimri"):
        out = folder / "data" / name
        run("data", "tokenize", text, "--tokenizer", folder / "tok", "--out", out, "--workers", 2)
    return folder


def test_the_corpus_holds_the_tokenizers_ids(corpora: Path) -> None:
    tokenizer, corpus = Tokenizer.load(corpora / "tok"), Corpus.open(corpora / "data" / "alda")
    kept = [ids for ids in map(tokenizer.encode, DOCUMENTS) if ids]
    assert [corpus.document(i).tolist()[: len(ids)] for i, ids in enumerate(kept)] == kept
    assert corpus.manifest.vocab_size == tokenizer.vocab_size
    assert corpus.manifest.eod == tokenizer.eod


def test_the_tools_know_it(corpora: Path) -> None:
    data, tok = corpora / "data", corpora / "tok"
    assert ": OK, " in run("data", "verify", data / "alda")
    shown = run("data", "inspect", data / "alda", "--tokenizer", tok, "--document", 2)
    assert shown == Tokenizer.load(tok).decode(Corpus.open(data / "alda").document(2)) + "\n"
    run("data", "stats", data / "alda", "--tokenizer", tok)
    run("data", "merge", data / "alda", data / "boreth", "--out", corpora / "merged")
    assert "byte fallback" in run("tokenizer", "inspect", tok)


@pytest.mark.parametrize("corpora", ["t5"], indirect=True)
def test_a_run_trains_on_it(corpora: Path) -> None:
    settings = run_settings(corpora)
    for phase in settings["phases"]:
        phase["steps"] = 2
        phase["learning_rate"]["warmup_steps"] = 1
    run_file = write_run_file(corpora / "run", settings)
    run("plan", run_file)
    subprocess.run(megaphase("train", run_file), check=True, capture_output=True)
    run("plan", "trace", run_file, "--step", 1, "--text")
    rows = read_rows(corpora / "run" / "run")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    validations = [row["validation"] for row in rows if "validation" in row]
    assert all(it["bits_per_byte"] > 0 for tasks in validations for it in tasks.values())
    assert validations
