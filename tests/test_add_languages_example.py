"""examples/add-languages, on a small model of transformers and on small texts."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from data_support import CORPORA
from hf_support import megaphase_logits, transformers_logits
from rounding import FP32, deviation
from run_support import read_rows
from tokenizer_json_kinds import llama3

from megaphase.data_tools.synthetic.languages import write_languages
from megaphase.tokenizer import Tokenizer

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "add-languages"
OLD, NEW = ("en", "fr", "de"), ("hi", "eu")
TEXT_BYTES = {"en": 60_000, "fr": 40_000, "de": 40_000, "hi": 20_000, "eu": 20_000}
SPARE_ROWS, SEQ_LEN = 24, 64
SETTINGS = [
    "precision=fp32",
    "parallel.zero=1",
    "batch.samples=8",
    "batch.micro=4",
    "phases.0.steps=4",
    "phases.0.learning_rate.warmup_steps=0",
    "phases.1.learning_rate.warmup_steps=2",
    "validation.samples=4",
    "validation.every_steps=10",
    "validation.fraction=0.1",
    "logging.tensorboard=false",
]


def published(folder: Path) -> Path:
    """Make a Hugging Face model as it would be downloaded, with more rows than tokens."""
    import transformers

    tokenizer = Tokenizer.load(llama3(folder))
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size + SPARE_ROWS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eod,
        bos_token_id=tokenizer.record.bos,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Result:
    model: Path
    corpora: Path
    out: Path
    printed: str

    def texts(self, language: str, count: int) -> Iterator[str]:
        with gzip.open(self.corpora / f"{language}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for _, line in zip(range(count), lines, strict=False):
                yield json.loads(line)["text"]


def run_example(
    model: Path, corpora: Path, out: Path, *changes: str, add: int, processes: int
) -> Result:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {"ADD": add, "SEQ_LEN": SEQ_LEN, "PROCESSES": processes, "PATH": path}
    done = subprocess.run(
        [EXAMPLE / "run.sh", model, corpora, out, *SETTINGS, *changes],
        env=os.environ | {key: str(value) for key, value in env.items()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return Result(model, corpora, out, done.stdout)


def check(result: Result, add: int) -> None:
    """Check what every run of the example must give."""
    import transformers

    base, new = Tokenizer.load(result.model), Tokenizer.load(result.out / "tokenizer")
    assert new.vocab_size == base.vocab_size + add
    config = json.loads((result.out / "hf" / "config.json").read_text())
    assert config["vocab_size"] == max(base.vocab_size + SPARE_ROWS, new.vocab_size)
    assert "Bits per byte before and after the extension" in result.printed

    tokenizer = transformers.AutoTokenizer.from_pretrained(result.out / "hf")
    seen = set()
    for language in (*OLD, *NEW):
        for text in result.texts(language, 5):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert ids == new.encode(text)
            seen |= set(ids) if language in NEW else set()
    assert seen & set(range(base.vocab_size, new.vocab_size))

    rows = read_rows(result.out / "run")
    begun = {row["phase"]: row for row in rows if row.get("event") == "phase_start"}
    assert begun["new-rows"]["trained_tokens"] == [base.vocab_size, new.vocab_size]
    assert "trained_tokens" not in begun["joint"]
    checkpoint = sorted((result.out / "run" / "checkpoints").glob("step-*"))[-1]
    tokens = torch.arange(new.vocab_size - 2 * SEQ_LEN, new.vocab_size).view(2, SEQ_LEN)
    found = transformers_logits(result.out / "hf", tokens)
    assert deviation(found, megaphase_logits(checkpoint, tokens)) < FP32
    assert (result.out / "report" / "index.html").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_small_texts(tmp_path: Path) -> None:
    corpora = tmp_path / "corpora"
    for name, path in write_languages(tmp_path / "text", seed=5, languages=TEXT_BYTES).items():
        corpora.mkdir(exist_ok=True)
        with gzip.open(corpora / f"{name}.jsonl.gz", "wb") as file:
            file.write(path.read_bytes())
    model = published(tmp_path / "model")
    result = run_example(
        model, corpora, tmp_path / "out", "phases.1.tokens=4000", add=40, processes=2
    )
    check(result, 40)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not CORPORA.exists(), reason="../shared/corpora is not there")
def test_real_texts(tmp_path: Path) -> None:
    model = published(tmp_path / "model")
    changes = ["phases.1.tokens=200_000", "phases.1.learning_rate.peak=3e-3"]
    result = run_example(model, CORPORA, tmp_path / "out", *changes, add=400, processes=2)
    check(result, 400)
    # Every language is better at the end than at the beginning of the joint phase.
    losses = [row for row in read_rows(tmp_path / "out" / "run") if "validation" in row]
    joint = [row["validation"] for row in losses if row["phase"] == "joint"]
    for language in (*OLD, *NEW):
        before, after = (each[language]["bits_per_byte"] for each in (joint[0], joint[-1]))
        assert after < before, language
