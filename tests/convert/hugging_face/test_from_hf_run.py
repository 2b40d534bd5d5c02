"""A published model is the first phase: the joint phase is trained on it, and published again.

Uses the commands that a user would type, on a small Llama made by transformers with a
sentencepiece tokenizer like Llama's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from existing_tokenizers import llama_directory
from hf_support import megaphase_logits, transformers_logits
from rounding import FP32, deviation
from run_support import TEXT_BYTES, read_rows, run_settings, write_run_file
from torch.nn.functional import cross_entropy
from warm_commands import run, run_killed, run_well

from megaphase.config.load import load_run_file
from megaphase.data_tools.synthetic.languages import write_languages
from megaphase.plan.build import ensure_built
from megaphase.plan.dataset import read_step
from megaphase.plan.plan import Plan
from megaphase.plan.spec import plan_spec
from megaphase.tokenizer import Tokenizer

PUBLISHED_SEQ_LEN, SEQ_LEN = 128, 32
STEPS = 4
SPARE_ROWS = 5  # of the embedding, beyond the tokenizer's


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a Hugging Face model with its tokenizer, as it would be downloaded."""
    import transformers

    folder = llama_directory(tmp_path_factory.mktemp("published") / "tiny-llama")
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=Tokenizer.load(folder).vocab_size + SPARE_ROWS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=PUBLISHED_SEQ_LEN,
        initializer_range=0.1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(published: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return its checkpoint, and the required run file content as printed."""
    out = tmp_path_factory.mktemp("base") / "base"
    printed = run_well("convert", "from-hf", published, "--out", out)
    sections = yaml.safe_load(printed.partition("says:\n")[2].partition("\nIts positions")[0])
    assert (out / "model.yaml").read_text() in printed
    return out, sections


@pytest.fixture(scope="module")
def joint(base: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run file of the joint phase alone, at another sequence length."""
    folder = tmp_path_factory.mktemp("joint")
    sections = base[1]
    texts = write_languages(folder / "text", seed=5, languages=TEXT_BYTES)
    for name, text in texts.items():
        out = folder / "data" / name
        run_well("data", "tokenize", text, "--tokenizer", sections["tokenizer"], "--out", out)
    settings = run_settings(folder, **sections)
    settings["model"]["seq_len"] = SEQ_LEN
    settings["phases"] = settings["phases"][1:]
    settings["phases"][0] |= {"steps": STEPS, "optimizer_state": "reset"}
    return write_run_file(folder, settings)


@pytest.fixture(scope="module")
def trained(base: tuple[Path, dict[str, Any]], joint: Path) -> Path:
    """Return the run directory after the joint phase, which was killed once."""
    run_killed(joint, "--from", base[0], before_step=2)
    run_well("train", joint)
    return joint.parent / "run"


def test_the_first_loss_is_that_of_transformers(
    published: Path, joint: Path, trained: Path
) -> None:
    import transformers

    config = load_run_file(joint)
    tokenizer = Tokenizer.load(config.tokenizer)
    spec = plan_spec(config, tokenizer, {})
    batch = read_step(
        Plan(spec, ensure_built(spec, config.output)), 0, 0, 0, 1, pad_token_id=tokenizer.eod
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32)
    with torch.no_grad():
        logits = model(batch.inputs).logits
    expected = float(cross_entropy(logits.flatten(0, 1), batch.targets.flatten()))
    rows = [row for row in read_rows(trained) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0]["loss"] == pytest.approx(expected, rel=FP32)
    assert {row["phase"] for row in rows} == {"joint"}
    begun = [row for row in read_rows(trained) if row.get("event") == "branch"]
    assert [row["step"] for row in begun] == [0]


def test_what_was_trained_is_a_model_of_transformers_again(
    published: Path, trained: Path, tmp_path: Path
) -> None:
    import transformers

    printed = run_well("convert", "to-hf", f"{trained}@joint", "--out", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_bytes())
    assert f"max_position_embeddings is {config['max_position_embeddings']}, the che" in printed
    assert "--max-positions" in printed
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "The quick brown fox"
    assert tokenizer(text)["input_ids"] == Tokenizer.load(published).encode(text)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.config.max_position_embeddings == SEQ_LEN
    tokens = torch.arange(2 * SEQ_LEN).view(2, SEQ_LEN)
    found = transformers_logits(tmp_path / "hf", tokens)
    checkpoint = trained / "checkpoints" / f"step-{STEPS:08d}"
    assert deviation(found, megaphase_logits(checkpoint, tokens)) < FP32
    assert deviation(found, transformers_logits(published, tokens)) > 1e-2


def changed(joint: Path, folder: Path, **changes: Any) -> Path:
    """Return the run file with changed keys, by section, and its own output."""
    settings = yaml.safe_load(joint.read_text())
    for section, keys in changes.items():
        settings[section] |= keys
    return write_run_file(folder, settings)


def test_another_model_is_refused(
    base: tuple[Path, dict[str, Any]], joint: Path, tmp_path: Path
) -> None:
    run_file = changed(joint, tmp_path, model={"rotary_base": 5e5})
    result = run("train", run_file, "--from", base[0])
    assert result.returncode == 2
    assert "model.rotary_base: is 500000.0, but" in result.stderr
    assert not (tmp_path / "run").exists()
    run_file = changed(joint, tmp_path, model={"qkv_bias": True})
    result = run("train", run_file, "--from", base[0])
    assert result.returncode == 2
    assert "model.qkv_bias: is True, but" in result.stderr
    assert "has none" in result.stderr


def test_there_is_no_optimizer_state_to_keep(
    base: tuple[Path, dict[str, Any]], joint: Path, tmp_path: Path
) -> None:
    settings = yaml.safe_load(joint.read_text())
    settings["phases"][0]["optimizer_state"] = "keep"
    result = run("train", write_run_file(tmp_path, settings), "--from", base[0])
    assert result.returncode == 2
    assert "phases[0].optimizer_state: is keep, but" in result.stderr


def test_learned_positions_keep_their_length(joint: Path, tmp_path: Path) -> None:
    import transformers

    tokens = Tokenizer.load(load_run_file(joint).tokenizer).vocab_size
    config = transformers.GPT2Config(
        vocab_size=tokens, n_embd=32, n_layer=1, n_head=2, n_positions=PUBLISHED_SEQ_LEN
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    converted = run("convert", "from-hf", tmp_path / "gpt2", "--out", tmp_path / "base")
    assert converted.returncode == 0
    sections = yaml.safe_load(converted.stdout.partition("says:\n")[2])
    assert list(sections) == ["model"]
    notice = converted.stderr.splitlines()[-1]
    assert notice.startswith("Converted without a tokenizer: ")
    assert "has neither a sentencepiece model nor a tokenizer.json. Give" in notice
    model = sections["model"]
    run_file = changed(joint, tmp_path / "short", model=model | {"seq_len": SEQ_LEN})
    result = run("train", run_file, "--from", tmp_path / "base")
    assert result.returncode == 2
    assert f"model.seq_len: is {SEQ_LEN}, but" in result.stderr
    run_file = changed(joint, tmp_path / "same", model=model)
    run_well("train", run_file, "--from", tmp_path / "base")
