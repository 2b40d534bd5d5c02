"""Tokenizers from elsewhere through every command: a corpus, its tools, a plan, a run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_support import write_jsonl
from existing_tokenizers import STRANGE, TEXTS, llama_directory, t5_directory
from run_support import megaphase, read_rows, run_settings, write_run_file
from tokenizer_json_kinds import DECOMPOSED, gemma3, llama3, qwen3
from typer.testing import CliRunner

from megaphase.cli import app
from megaphase.convert.source import open_source
from megaphase.corpus import Corpus
from megaphase.decoding.generate import generate, text_after
from megaphase.decoding.options import Decoding
from megaphase.generation.model import load_model
from megaphase.plan.stream import Stream
from megaphase.tokenizer import Tokenizer


def with_large_ids(folder: Path) -> Path:
    """Make one like Llama 3's whose ids begin where those of a u16 end."""
    path = llama3(folder) / "tokenizer.json"
    whole = json.loads(path.read_text())
    whole["model"]["vocab"] = {text: i + 65_600 for text, i in whole["model"]["vocab"].items()}
    for token in whole["added_tokens"]:
        token["id"] += 65_600
    path.write_text(json.dumps(whole))
    return folder


KINDS: dict[str, Callable[[Path], Path]] = {
    "t5": t5_directory,
    "llama": llama_directory,
    "model": lambda folder: llama_directory(folder) / "tokenizer.model",
    "llama3": llama3,
    "qwen3": qwen3,
    "gemma3": gemma3,
    "large": with_large_ids,
}
DOCUMENTS = [f"{text} {number}" for number in range(120) for text in (*TEXTS, *STRANGE)]


def slow(*kinds: str) -> list[Any]:
    return [pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


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
    assert corpus.tokens.dtype == ("<i4" if tokenizer.vocab_size > 65_536 else "<u2")


def test_the_tools_know_it(corpora: Path) -> None:
    data, tok = corpora / "data", corpora / "tok"
    assert ": OK, " in run("data", "verify", data / "alda")
    shown = run("data", "inspect", data / "alda", "--tokenizer", tok, "--document", 2)
    assert shown == Tokenizer.load(tok).decode(Corpus.open(data / "alda").document(2)) + "\n"
    run("data", "stats", data / "alda", "--tokenizer", tok)
    run("data", "merge", data / "alda", data / "boreth", "--out", corpora / "merged")
    assert "byte fallback" in run("tokenizer", "inspect", tok)


@pytest.mark.parametrize("corpora", [*slow("llama3", "qwen3"), "gemma3"], indirect=True)
def test_any_number_of_workers_and_shards_gives_the_same_corpus(corpora: Path) -> None:
    text, tok, data = corpora / "a.jsonl", corpora / "tok", corpora / "data"
    tokenize = ("data", "tokenize", text, "--tokenizer", tok)
    run(*tokenize, "--out", corpora / "one", "--workers", 1)
    assert (corpora / "one.bin").read_bytes() == (data / "alda.bin").read_bytes()
    for number in range(3):
        run(*tokenize, "--out", corpora / "part", "--shard", f"{number}/3")
    parts = sorted(corpora.glob("part*.json"))
    run("data", "merge", *(part.with_suffix("") for part in parts), "--out", corpora / "parts")
    assert (corpora / "parts.bin").read_bytes() == (data / "alda.bin").read_bytes()
    run(*tokenize, "--out", corpora / "distinct", "--dedup")
    # Numbered texts repeat nothing; only empty documents are dropped in any case.
    assert Corpus.open(corpora / "distinct").manifest.documents <= len(DOCUMENTS)


@pytest.mark.parametrize(
    ("corpora", "tag"),
    [("llama3", "reserved_1"), ("qwen3", "|im_start|"), ("gemma3", "reserved_0")],
    indirect=["corpora"],
)
def test_pairs_have_an_added_or_reserved_token_as_tag(corpora: Path, tag: str) -> None:
    tokenizer = Tokenizer.load(corpora / "tok")
    pairs = corpora / "pairs.jsonl"
    pairs.write_text(json.dumps({"src": TEXTS[0], "tgt": TEXTS[3]}) + "\n")
    run(
        *("data", "tokenize", pairs, "--tokenizer", corpora / "tok", "--out", corpora / "pairs"),
        *("--source-key", "src", "--target-key", "tgt", "--tag", tag),
    )
    reserved = {f"reserved_{i}": token for i, token in enumerate(tokenizer.reserved_tags)}
    corpus = Corpus.open(corpora / "pairs")
    expected = [
        *tokenizer.encode(TEXTS[0]), (tokenizer.tags | reserved)[tag],
        *tokenizer.encode(TEXTS[3]), tokenizer.eod,
    ]  # fmt: skip
    assert corpus.document(0).tolist() == expected


@pytest.mark.parametrize("corpora", ["llama3", "qwen3", "gemma3"], indirect=True)
def test_the_bytes_of_targets_are_those_of_the_original_text(corpora: Path) -> None:
    tokenizer = Tokenizer.load(corpora / "tok")
    texts = [f"{DECOMPOSED} {text} {number}" for number in range(20) for text in TEXTS]
    file = write_jsonl(corpora / "decomposed.jsonl", texts)
    out = corpora / "decomposed"
    run("data", "tokenize", file, "--tokenizer", corpora / "tok", "--out", out)
    sizes = tokenizer.token_bytes()
    stream = Stream("a", Corpus.open(out), seed=1, seq_len=64, fraction=0.3, split="validation")
    found = stream.bytes_of_targets(stream.first_starts(stream.samples_per_epoch), sizes)
    # All but the first token are targets once.
    document, first, _ = stream.pieces(0, *stream.first_starts(1)[0].tolist())[0]
    begin = stream.corpus.document(document)
    share = stream.corpus.sums["text_bytes"][document] / sizes[begin].sum()
    missing = sizes[begin[first]] * share
    assert found.sum() == pytest.approx(stream.text_bytes() - missing, abs=1e-6)
    assert tokenizer.exact_bytes == (share == 1 and corpora.name.startswith("llama3"))


@pytest.mark.parametrize("corpora", ["t5", *slow("llama3", "qwen3"), "large"], indirect=True)
def test_a_run_trains_on_it(corpora: Path) -> None:
    settings = run_settings(corpora)
    for phase in settings["phases"]:
        phase["steps"] = 2
        phase["learning_rate"]["warmup_steps"] = 1
    settings["phases"][1]["batch"] = {"micro": 4}  # the 10 validation samples are 12 rows then
    run_file = write_run_file(corpora / "run", settings)
    run("plan", run_file)
    subprocess.run(megaphase("train", run_file), check=True, capture_output=True)
    run("plan", "trace", run_file, "--step", 1, "--text")
    rows = read_rows(corpora / "run" / "run")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    validations = [row["validation"] for row in rows if "validation" in row]
    assert all(it["bits_per_byte"] > 0 for tasks in validations for it in tasks.values())
    assert validations
    tokenizer, source = (
        Tokenizer.load(corpora / "tok"),
        open_source(f"{corpora / 'run/run'}@latest"),
    )
    bos = tokenizer.bos if corpora.name.startswith(("llama3", "large")) else None
    assert source.state["bos"] == bos
    said = run("generate", f"{corpora / 'run' / 'run'}@latest", "--prompt", "日", "--max-tokens", 3)
    model, how = load_model(source, None), Decoding(max_tokens=3)
    prompt = [*([] if bos is None else [bos]), *tokenizer.encode("日")]
    [found] = generate(model, [prompt], how, tokenizer.eod)
    assert said == "日" + text_after(prompt, found.tokens, tokenizer) + "\n"
    assert said.startswith("日")
    assert not said.rstrip("\n").endswith("\ufffd")
    run("convert", "to-hf", f"{corpora / 'run' / 'run'}@latest", "--out", corpora / "hf")
    for path in (corpora / "tok").iterdir():
        assert (corpora / "hf" / path.name).read_bytes() == path.read_bytes()
    assert Tokenizer.load(corpora / "hf").record == Tokenizer.load(corpora / "tok").record
