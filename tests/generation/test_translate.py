"""`megaphase generate` and `translate` as commands: what they print, write and refuse."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
from convert_support import write_random_checkpoint
from run_support import make_corpora, run_settings, write_run_file
from translation_support import random_hashes, write_documents

from megaphase import cli
from megaphase.config.load import load_run_file
from megaphase.convert.source import open_source
from megaphase.decoding.generate import generate
from megaphase.decoding.options import Decoding
from megaphase.generation.model import load_model
from megaphase.generation.pairs import held_out_pairs
from megaphase.model.presets import build_shape
from megaphase.tokenizer import Tokenizer

TASK = "alda-boreth"
FRACTION = 0.2
PAIRS = 120


class Place:
    """A run directory with a random checkpoint, and a corpus of pairs."""

    def __init__(self, folder: Path) -> None:
        corpora = make_corpora(folder)
        self.tokenizer = Tokenizer.load(corpora / "tok")
        words = json.loads((folder / "text" / "alda.jsonl").read_text().splitlines()[0])["text"]
        self.pairs = [
            (" ".join(words.split()[i : i + 1 + i % 5]), " ".join(words.split()[i : i + 2 + i % 3]))
            for i in range(PAIRS - 1)
        ] + [(words[:400], "long")]
        self.hashes = [*random_hashes(PAIRS - 1, 6), 0]
        self.write_corpus(folder / "data" / TASK)
        settings = run_settings(corpora)
        settings["tasks"] = {
            "alda": {"corpus": str(folder / "data" / "alda")},
            TASK: {"kind": "translation", "corpus": str(folder / "data" / TASK)},
        }
        settings["phases"][0]["mixture"] = {"proportional": True}
        settings["validation"]["fraction"] = FRACTION
        self.run_file = write_run_file(folder, settings)
        shape = build_shape(load_run_file(self.run_file), self.tokenizer.vocab_size)
        (folder / "run" / "checkpoints").mkdir(parents=True)
        self.checkpoint = write_random_checkpoint(
            folder / "run" / "checkpoints" / "step-00000007", shape
        )
        (folder / "run" / "run.json").write_text(json.dumps({"tokenizer": str(corpora / "tok")}))
        (folder / "run" / "checkpoints" / "latest").symlink_to("step-00000007")
        self.run = folder / "run"

    def write_corpus(self, prefix: Path) -> None:
        encode, tag = self.tokenizer.encode, self.tokenizer.reserved_tags[0]
        write_documents(
            prefix,
            [[*encode(s), tag, *encode(t), self.tokenizer.eod] for s, t in self.pairs],
            self.hashes,
            tag=tag,
            tokenizer_hash=self.tokenizer.fingerprint,
            vocab_size=self.tokenizer.vocab_size,
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def call(monkeypatch, capfd):
    """Return a function that runs a command and returns its exit code and both outputs."""

    def run(*arguments: object, text: str = "") -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["megaphase", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capfd.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run


def expected_completions(place: Place, texts: list[str], how: Decoding) -> list[str]:
    model = load_model(open_source(str(place.checkpoint)), None)
    prompts = place.tokenizer.encode_batch(texts)
    found = generate(model, prompts, how, place.tokenizer.eod)
    return [place.tokenizer.decode(each.tokens, whole=True) for each in found]


# --- generate ---


def test_prompts_are_continued(place, call):
    texts = ["ka", "", "ka lu mi"]
    options = [each for text in texts for each in ("--prompt", text)]
    code, out, _ = call("generate", f"{place.run}@latest", *options, "--max-tokens", 9)
    expected = expected_completions(place, texts, Decoding(max_tokens=9))
    assert code == 0
    joined = (f"{text}{completion}" for text, completion in zip(texts, expected, strict=True))
    assert out == "\n\n".join(joined) + "\n"


@pytest.mark.parametrize("batch", [1, 16])
def test_prompts_from_a_file_as_json(place, call, tmp_path, batch):
    texts = ["ka", "ka lu mi", "mi"]
    lines = "".join(json.dumps({"q": text}) + "\n\n" for text in texts)
    (tmp_path / "in.jsonl").write_text(lines)
    arguments = ("generate", place.checkpoint, "--tokenizer", place.tokenizer.path)
    options = ("--json-key", "q", "--beam", 2, "--max-tokens", 9, "--json", "--batch", batch)
    code, out, _ = call(*arguments, "--input", tmp_path / "in.jsonl", *options)
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in rows] == texts
    expected = expected_completions(place, texts, Decoding(max_tokens=9, beam=2))
    assert [row["completion"] for row in rows] == expected
    assert all(row["log_probability"] < 0 and row["tokens"] <= 9 for row in rows)
    assert call(*arguments, "--input", "-", *options, text=lines)[1] == out


def test_mistakes_get_one_line(place, call, tmp_path):
    alone = write_random_checkpoint(tmp_path / "alone", open_source(str(place.checkpoint)).shape)
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    run = f"{place.run}@latest"
    for arguments, said in (
        ([alone, "--prompt", "a"], "give --tokenizer"),
        ([run], "neither is given"),
        ([run, "--prompt", "a", "--input", wrong], "both are given"),
        ([run, "--prompt", "ka " * 50], "seq_len is 32; shorten it"),
        (
            [run, "--input", wrong],
            "wrong.jsonl:2: is not a JSON object with a string under 'prompt'",
        ),
        ([run, "--input", tmp_path / "none"], "No such file"),
        (
            [run, "--prompt", "a", "--beam", 2, "--temperature", 1],
            "cannot be combined with --temperature",
        ),
        ([run, "--prompt", "a", "--top-k", 3], "give --temperature"),
        ([f"{place.run}@lates", "--prompt", "a"], "latest"),
    ):
        code, out, error = call("generate", *arguments)
        assert (code, out) == (2, ""), error
        assert said in error
        assert len(error.splitlines()) == 1


# --- translate ---


def test_pairs_are_the_held_out_ones(place):
    config = load_run_file(place.run_file)
    pairs = held_out_pairs(config, TASK, place.tokenizer, None)
    expected = sorted(
        (value, pair)
        for value, pair in zip(place.hashes, place.pairs, strict=True)
        if value < FRACTION * 2**64
    )
    assert 10 < len(expected) < 40
    assert [(each.source, each.reference) for each in pairs] == [pair for _, pair in expected]
    for each in pairs:
        *source, tag = each.prompt
        assert place.tokenizer.decode(source) == each.source
        assert tag == place.tokenizer.reserved_tags[0]
    assert held_out_pairs(config, TASK, place.tokenizer, 4) == pairs[:4]


def test_translations_are_scored(place, call, tmp_path):
    out = tmp_path / "new" / "out.jsonl"
    options = ("--samples", 12, "--beam", 2, "--max-tokens", 6)
    code, printed, _ = call("translate", place.run_file, *options, "--json", "--out", out)
    assert code == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    pairs = held_out_pairs(load_run_file(place.run_file), TASK, place.tokenizer, 12)
    assert [row["source"] for row in rows] == [pair.source for pair in pairs]
    assert rows[0]["ending"] == "no room"
    assert rows[0]["hypothesis"] == ""
    model = load_model(open_source(str(place.checkpoint)), None)
    prompts = [pair.prompt for pair in pairs[1:]]
    found = generate(model, prompts, Decoding(6, beam=2), place.tokenizer.eod)
    assert [row["hypothesis"] for row in rows[1:]] == [
        place.tokenizer.decode(each.tokens, whole=True) for each in found
    ]
    scores = json.loads(printed)["translation"][TASK]
    hypotheses = [row["hypothesis"] for row in rows]
    references = [[row["reference"] for row in rows]]
    assert scores["bleu"] == sacrebleu.corpus_bleu(hypotheses, references).score
    assert scores["chrf"] == sacrebleu.corpus_chrf(hypotheses, references).score
    assert scores["chrf"] > 0
    assert (scores["pairs"], scores["no_room"]) == (12, 1)
    assert scores["cut_off"] == sum(row["ending"] == "length" for row in rows)
    assert "tok:13a" in scores["bleu_signature"]
    assert f"version:{sacrebleu.__version__}" in scores["chrf_signature"]


def test_the_table_shows_scores_and_signatures(place, call):
    options = ("--samples", 3, "--beam", 1, "--max-tokens", 3, "--bleu-tokenizer", "char")
    code, out, _ = call("translate", place.run_file, "--task", TASK, *options)
    assert code == 0
    assert TASK in out
    assert "tok:char" in out


def test_wrong_tasks_get_one_line(place, call, tmp_path):
    for task, said in (
        ("alda-borth", "did you mean 'alda-boreth'"),
        ("alda", "tasks.alda.kind: is lm, not translation; the translation tasks are alda-boreth"),
    ):
        code, out, error = call("translate", place.run_file, "--task", task)
        assert (code, out) == (2, ""), error
        assert said in error
        assert len(error.splitlines()) == 1
    code, _, error = call("translate", place.run_file, "--out", tmp_path)
    assert code == 2
    assert "is a folder" in error
    code, _, error = call("translate", place.run_file, "--checkpoint", "step-9")
    assert code == 2
    assert "step-00000007" in error
