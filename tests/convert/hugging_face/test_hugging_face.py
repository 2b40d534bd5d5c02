"""Models of Hugging Face and Megaphase compute the same logits, both ways, for all file types."""

from __future__ import annotations

import gzip
import json
import shutil
import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_support import save, whole_parameters, write_random_checkpoint
from data_support import CORPORA, make_tokenizer, write_jsonl
from distributed import once, run_ranks
from engine_support import build_engine, global_batch, run_config, share
from hf_support import (
    SEQ_LEN,
    SHAPES,
    THEIR_CONFIGS,
    VOCAB,
    change_config,
    export,
    llama,
    make_transformers_model,
    megaphase_logits,
    plain_logits,
    random_tokens,
    take,
    transformers_logits,
)
from rounding import FP32, deviation
from safetensors.torch import load_file, save_file
from tokenizer_json_kinds import KINDS as TOKENIZERS

from megaphase.convert.hugging_face.config import read_config
from megaphase.convert.hugging_face.from_hf import from_hf
from megaphase.data_tools.tokenizers.train import train_tokenizer
from megaphase.distributed.all_ranks import process_group
from megaphase.distributed.control_group import ControlGroup
from megaphase.tokenizer import Tokenizer

LANGUAGES = ("en", "fr", "de", "hi", "eu")
TEXTS_EACH = 3
# As stored by older versions of transformers.
LLAMA_BUFFERS = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
GPT2_BUFFERS = {
    "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
    "transformer.h.1.attn.masked_bias": torch.tensor(-1e4),
}


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_computes_our_logits(name: str, tok: Path, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "native", SHAPES[name], std=0.1)
    reference = transformers_logits(
        export(checkpoint, tmp_path / "hf", tok), tokens := random_tokens(VOCAB)
    )
    assert deviation(reference, megaphase_logits(checkpoint, tokens)) < FP32
    assert deviation(reference, plain_logits(checkpoint, tokens)) < FP32


def test_long_contexts(tok: Path, tmp_path: Path) -> None:
    """Rounding of rotary angles grows with the position, in transformers as well."""
    shape = replace(SHAPES["llama"], seq_len=2048, hidden=256, layers=4, ffn=512)
    checkpoint = write_random_checkpoint(tmp_path / "native", shape, std=0.05)
    tokens = random_tokens(VOCAB, batch=1, seq=shape.seq_len)
    reference = transformers_logits(export(checkpoint, tmp_path / "hf", tok), tokens)
    assert deviation(reference, megaphase_logits(checkpoint, tokens)) < FP32


@pytest.mark.parametrize("name", SHAPES)
def test_there_and_back_is_the_same_to_the_last_bit(name: str, tok: Path, tmp_path: Path) -> None:
    before = write_random_checkpoint(tmp_path / "native", SHAPES[name])
    after = take(export(before, tmp_path / "hf", tok, max_shard_bytes=30_000), tmp_path / "back")
    family, shape = read_config(tmp_path / "hf")
    assert shape == family.expressed(SHAPES[name])
    weights, taken = whole_parameters(before), whole_parameters(after)
    assert weights.keys() <= taken.keys()
    for parameter, found in taken.items():
        assert torch.equal(found, weights.get(parameter, torch.zeros_like(found))), parameter


@pytest.fixture(scope="module")
def five_languages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Make a tokenizer of real texts, and return some of them."""
    if not CORPORA.exists():
        pytest.skip("../shared/corpora is not there")
    folder = tmp_path_factory.mktemp("real")
    inputs, some = {}, []
    for language in LANGUAGES:
        with gzip.open(CORPORA / f"{language}.jsonl.gz", "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line in islice(lines, 300)]
        inputs[language] = [write_jsonl(folder / f"{language}.jsonl", texts)]
        some += [text for text in texts if len(text) > 200][:TEXTS_EACH]
    train_tokenizer(inputs, folder / "tok", vocab_size=1500)
    return folder / "tok", some


@pytest.mark.parametrize("name", ["llama grouped", "gpt2 tied"])
def test_real_text_of_five_languages(
    name: str, five_languages: tuple[Path, list[str]], tmp_path: Path
) -> None:
    import transformers

    tok, texts = five_languages
    tokenizer = Tokenizer.load(tok)
    shape = replace(SHAPES[name], vocab=tokenizer.vocab_size + 3, seq_len=256)
    checkpoint = write_random_checkpoint(tmp_path / "native", shape, std=0.1)
    directory = export(checkpoint, tmp_path / "hf", tok)
    reference = transformers.AutoTokenizer.from_pretrained(directory)
    assert len(texts) == TEXTS_EACH * len(LANGUAGES)
    ids = [reference(text)["input_ids"] for text in texts]
    assert ids == tokenizer.encode_batch(texts)
    for each in ids:
        tokens = torch.tensor([each[: shape.seq_len]])
        found = transformers_logits(directory, tokens)
        assert deviation(found, megaphase_logits(checkpoint, tokens)) < FP32


def train_and_save(folder: str) -> None:
    """Train two steps of tensor 2 × data 2, ZeRO-3."""
    with process_group():
        model = {"kv_heads": 2, "bias": True}
        config = run_config(model=model, tensor=2, zero=3)
        engine = build_engine(config, VOCAB)
        for step in range(2):
            batch = share(global_batch(step, vocab=VOCAB), engine.grid)
            engine.train_step(batch, 1e-2)
        save(engine, config, VOCAB, Path(folder), ControlGroup())


@once
def trained() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="trained-"))
    run_ranks(train_and_save, 4, str(folder))
    return folder / "step-00000001"


@pytest.mark.slow
@pytest.mark.distributed
def test_what_four_ranks_have_trained(tok: Path, tmp_path: Path) -> None:
    checkpoint = trained()
    directory = export(checkpoint, tmp_path / "hf", tok)
    shape = read_config(directory)[1]
    tokens = random_tokens(VOCAB, seq=shape.seq_len)
    found = transformers_logits(directory, tokens)
    assert found.shape[-1] == VOCAB
    assert deviation(found, megaphase_logits(checkpoint, tokens)) < FP32
    shutil.rmtree(checkpoint.parent)


def test_shards_are_no_larger_than_asked(tok: Path, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "native", SHAPES["llama grouped"])
    limit = 30_000
    directory = export(checkpoint, tmp_path / "hf", tok, max_shard_bytes=limit)
    files = sorted(directory.glob("model-*.safetensors"))
    index = json.loads((directory / "model.safetensors.index.json").read_bytes())
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert not (directory / "model.safetensors").exists()
    sizes = 0
    for file in files:
        tensors = load_file(file)
        assert {n for n, f in index["weight_map"].items() if f == file.name} == tensors.keys()
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= limit or len(tensors) == 1
        sizes += size
    assert index["metadata"]["total_size"] == sizes


@pytest.mark.parametrize(
    ("asked", "trained_in", "expected"),
    [
        (None, "fp32", torch.float32),
        (None, "bf16", torch.bfloat16),
        ("fp16", "bf16", torch.float16),
        ("fp32", "bf16", torch.float32),
    ],
)
def test_types_of_weights(
    asked: str | None, trained_in: str, expected: torch.dtype, tok: Path, tmp_path: Path
) -> None:
    import transformers

    shape = SHAPES["gpt2 tied"]
    checkpoint = write_random_checkpoint(tmp_path / "native", shape, precision=trained_in)
    directory = export(checkpoint, tmp_path / "hf", tok, precision=asked)
    config = json.loads((directory / "config.json").read_bytes())
    assert config["dtype"] == config["torch_dtype"] == str(expected).removeprefix("torch.")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    whole = whole_parameters(checkpoint)["blocks.1.feed_forward.up.weight"]
    found = model.transformer.h[1].mlp.c_fc.weight
    assert found.dtype == expected
    assert torch.equal(found, whole.t().to(expected))


def test_configs_for_every_version_of_transformers(tok: Path, tmp_path: Path) -> None:
    import transformers

    checkpoint = write_random_checkpoint(tmp_path / "native", SHAPES["llama grouped"])
    directory = export(checkpoint, tmp_path / "hf", tok)
    config = json.loads((directory / "config.json").read_bytes())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500_000.0
    assert config["rope_scaling"] is None
    eod = Tokenizer.load(tok).eod
    generation = transformers.GenerationConfig.from_pretrained(directory)
    assert (generation.eos_token_id, generation.bos_token_id) == (eod, None)
    read = transformers.AutoConfig.from_pretrained(directory)
    assert (read.eos_token_id, read.bos_token_id) == (eod, None)
    assert read.max_position_embeddings == SEQ_LEN
    assert read.rope_parameters["rope_theta"] == 500_000.0


@pytest.mark.parametrize("name", ["llama3", "llama3_instruct"])
def test_generation_also_stops_where_a_turn_ends(name: str, tmp_path: Path) -> None:
    import transformers

    words = Tokenizer.load(TOKENIZERS[name](tmp_path / "tok"))
    shape = replace(SHAPES["llama grouped"], vocab=words.vocab_size)
    checkpoint = write_random_checkpoint(tmp_path / "native", shape)
    directory = export(checkpoint, tmp_path / "hf", words.path)
    turn_end = transformers.AutoTokenizer.from_pretrained(directory).eos_token_id
    ends = words.eod if turn_end == words.eod else [words.eod, turn_end]
    assert isinstance(ends, list) == (name == "llama3_instruct")
    assert transformers.AutoConfig.from_pretrained(directory).eos_token_id == ends
    assert transformers.GenerationConfig.from_pretrained(directory).eos_token_id == ends
    taken = from_hf(directory, tmp_path / "again", trust_pickle=False, workers=1)
    assert taken.tokenizer is not None
    assert Tokenizer.load(taken.tokenizer).eod == words.eod


@pytest.mark.parametrize("name", THEIR_CONFIGS)
@pytest.mark.parametrize("form", ["safetensors", "shards", "pickle", "base model", "with buffers"])
def test_we_compute_the_logits_of_transformers(name: str, form: str, tmp_path: Path) -> None:
    model = make_transformers_model(THEIR_CONFIGS[name]())
    directory = tmp_path / "reference"
    write_form(model, directory, form)
    tokens = random_tokens(VOCAB)
    with torch.no_grad():
        expected = model.eval()(tokens).logits
    found = megaphase_logits(take(directory, tmp_path / "native"), tokens)
    assert deviation(found, expected) < FP32


def write_form(model: Any, directory: Path, form: str) -> None:
    """Save a model as one of the types of files that exist."""
    model.save_pretrained(directory, max_shard_size="30KB" if form == "shards" else "1GB")
    if form == "shards":
        assert len(list(directory.glob("*.safetensors"))) > 2
        return
    whole = directory / "model.safetensors"
    tensors = load_file(whole)
    if form == "pickle":
        torch.save(model.state_dict(), directory / "pytorch_model.bin")  # a tied head, too
        whole.unlink()
    elif form == "base model":
        prefix = model.base_model_prefix + "."
        save_file({n.removeprefix(prefix): t for n, t in tensors.items()}, whole)
    elif form == "with buffers":
        buffers = GPT2_BUFFERS if model.config.model_type == "gpt2" else LLAMA_BUFFERS
        save_file(tensors | buffers, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_types_are_widened(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_transformers_model(llama(), dtype)
    model.save_pretrained(tmp_path / "reference")
    weights = whole_parameters(take(tmp_path / "reference", tmp_path / "native"))
    layer = model.model.layers[1]
    expected = torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]).float()
    assert torch.equal(weights["blocks.1.feed_forward.up.weight"], expected)


def test_the_configs_of_version_4(tmp_path: Path) -> None:
    model = make_transformers_model(
        llama(rope_parameters={"rope_type": "default", "rope_theta": 12_345.0})
    )
    model.save_pretrained(tmp_path)
    change_config(tmp_path, rope_parameters=None, rope_theta=12_345.0, rope_scaling=None)
    assert read_config(tmp_path)[1].rotary_base == 12_345.0


def test_what_old_configs_leave_out(tmp_path: Path) -> None:
    """The first Llama's config.json had none of these keys."""
    keys = ("num_key_value_heads", "rope_parameters", "attention_bias", "mlp_bias", "head_dim")
    make_transformers_model(llama(num_key_value_heads=4)).save_pretrained(tmp_path)
    change_config(tmp_path, **dict.fromkeys((*keys, "tie_word_embeddings")))
    shape = read_config(tmp_path)[1]
    assert (shape.kv_heads, shape.rotary_base, shape.bias) == (4, 10_000.0, False)
