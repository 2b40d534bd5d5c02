"""Rejected inputs, the choice of the tokenizer, and the leftovers of failed conversions."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_support import whole_parameters, write_random_checkpoint
from data_support import make_tokenizer
from existing_tokenizers import train_model
from hf_support import (
    GPT2,
    LLAMA,
    SHAPES,
    THEIR_CONFIGS,
    VOCAB,
    change_config,
    export,
    llama,
    make_transformers_model,
    megaphase_logits,
    names_in,
    random_tokens,
    take,
    transformers_logits,
)
from rounding import FP32, deviation
from safetensors.torch import load_file, save_file
from warm_commands import run

from megaphase.checkpoint.state import TOKENIZER_HASH
from megaphase.convert.extend_vocab import new_tokens
from megaphase.convert.hugging_face.from_hf import from_hf
from megaphase.convert.source import open_source
from megaphase.model.config import RotaryScalingConfig
from megaphase.model.shape import GPTShape
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    ("options", "faults"),
    [
        (LLAMA | {"norm": "layernorm"}, "model.norm: layernorm cannot"),
        (LLAMA | {"activation": "gelu"}, "model.activation: gelu cannot"),
        (LLAMA | {"position": "learned"}, "model.position: learned cannot"),
        (GPT2 | {"norm": "rmsnorm"}, "model.norm: rmsnorm cannot"),
        (GPT2 | {"activation": "swiglu"}, "model.activation: swiglu cannot"),
        (GPT2 | {"position": "rotary"}, "model.position: rotary cannot"),
        (GPT2 | {"kv_heads": 2}, "model.kv_heads: 2 cannot"),
    ],
)
def test_shapes_of_no_family(
    options: dict[str, Any], faults: str, tok: Path, tmp_path: Path
) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "native", GPTShape(**options))
    with pytest.raises(InputError, match=faults):
        export(checkpoint, tmp_path / "hf", tok)
    assert names_in(tmp_path) == {"native"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return directories by family."""
    folder = tmp_path_factory.mktemp("saved")
    names = ("llama", "llama tied, biases", "mistral", "qwen2", "gpt2", "neox", "apertus")
    for name in names:
        make_transformers_model(THEIR_CONFIGS[name]()).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(
    ("family", "changes", "key"),
    [
        ("llama", {"model_type": "bert"}, "model_type: is 'bert'"),
        ("llama", {"model_type": None}, "model_type: is None"),
        ("llama", {"model_type": "gemma3"}, "model_type: is 'gemma3', a model with.*gemma3_text$"),
        (
            "llama",
            {"quantization_config": {"bits": 4}},
            "quantization_config: the weights are quantized; use the model's unquantized weights",
        ),
        ("llama", {"auto_map": {"AutoModel": "a.B"}}, "auto_map: names custom code"),
        (
            "llama",
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling: is .*dynamic.*; megaphase has default, linear, llama3, yarn;",
        ),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling: is"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: is"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: is"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "offset": 1}},
            "rope_parameters: is .*, and linear has no offset",
        ),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters: is"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: is 0.5"),
        ("llama", {"head_dim": 0}, "head_dim: is 0, not a positive"),
        ("llama", {"some_multiplier": 2.0}, "some_multiplier: is not a key that megaphase knows"),
        ("llama", {"hidden_act": "gelu"}, 'hidden_act: is "gelu"'),
        ("llama", {"attention_bias": 1}, "attention_bias: is 1, not true or false"),
        ("llama", {"mlp_bias": "yes"}, "mlp_bias: is 'yes', not true or false"),
        ("neox", {"hidden_act": "gelu_new"}, 'hidden_act: is "gelu_new"'),
        ("neox", {"rope_parameters": {"partial_rotary_factor": 0.4}}, "partial_rotary_factor: is"),
        ("neox", {"rope_parameters": {"partial_rotary_factor": -1}}, "rope_parameters: is"),
        ("neox", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: is 0.5"),
        ("neox", {"rope_theta": 500}, "rope_theta: is 500"),
        ("neox", {"num_key_value_heads": 2}, "num_key_value_heads: is not a key"),
        ("apertus", {"hidden_act": "silu"}, 'hidden_act: is "silu"'),
        ("llama", {"hidden_size": None}, "hidden_size: is missing"),
        ("llama", {"num_hidden_layers": "2"}, "num_hidden_layers: is '2', not a positive"),
        ("llama", {"rms_norm_eps": 0}, "rms_norm_eps: is 0, not a positive"),
        ("llama", {"num_hidden_layers": 10**400}, "num_hidden_layers: is 1000.*…, more than 2,000"),
        ("gpt2", {"n_layer": 2001}, "n_layer: is 2001, more than 2,000"),
        ("llama", {"vocab_size": 10**12}, "vocab_size: is 1000000000000, more than"),
        ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps: is 10000.*…, not a positive"),
        ("llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps: is Infinity, not a positive"),
        ("llama", {"rope_parameters": {"rope_type": ["yarn"]}}, "rope_parameters: is"),
        ("llama", {"rope_parameters": {"rope_theta": 10**400}}, "rope_parameters: is .*…"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 10**400}},
            "rope_parameters: is",
        ),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings: is 'no'"),
        ("llama", {"num_attention_heads": 5, "head_dim": None}, "num_attention_heads: 5 heads do"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads: 3 heads of keys"),
        ("mistral", {"sliding_window": 0}, "sliding_window: is 0"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types: is not a key that"),
        ("qwen2", {"use_sliding_window": 1}, "use_sliding_window: is 1, not true"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types: is"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types: is"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: is"),
        ("gpt2", {"activation_function": "relu"}, 'activation_function: is "relu"'),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights: is false"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: is"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention: is true"),
    ],
)
def test_configs_that_cannot_be_taken(
    family: str, changes: dict[str, Any], key: str, saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved / family, tmp_path / "reference")
    change_config(tmp_path / "reference", **changes)
    refuse(tmp_path, rf"config\.json: {key}")


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ("Mixtral", "a mixture of experts"),
        ("Qwen3Moe", "a mixture of experts"),
        ("DeepseekV3", "multi-head latent attention"),
    ],
)
def test_models_of_other_kinds_are_named(config: str, what: str, tmp_path: Path) -> None:
    import transformers

    getattr(transformers, f"{config}Config")().save_pretrained(tmp_path / "reference")
    refuse(tmp_path, rf"config\.json: model_type: is '\w+', {what}; known are llama, mistral")


def test_other_constants_of_xielu_are_refused(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "apertus", tmp_path / "reference")
    path = tmp_path / "reference" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.act_fn.beta"] = torch.tensor(0.25)
    save_file(tensors, path, {"format": "pt"})
    refuse(tmp_path, r"model\.safetensors: model\.layers\.1\.mlp\.act_fn\.beta is 0\.25, .* 0\.5")


def refuse(folder: Path, message: str) -> None:
    """Check that `reference` is rejected in one line, and nothing is left behind."""
    before = names_in(folder)
    with pytest.raises(InputError, match=message) as refused:
        take(folder / "reference", folder / "native")
    assert "\n" not in str(refused.value)
    assert names_in(folder) == before


Tensors = dict[str, torch.Tensor]
NORM = "model.layers.1.input_layernorm.weight"


def without(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", without(NORM), f"has no tensor {NORM}"),
        ("llama", without("lm_head.weight"), "has no tensor lm_head.weight"),
        (
            "llama",
            lambda it: it.update({"model.other.weight": torch.ones(3)}),
            "no place for model.other.weight",
        ),
        (
            "llama",
            lambda it: it.update({"score.weight": torch.ones(3)}),
            "no place for score.weight",
        ),
        (
            "llama",
            lambda it: it.update({NORM: torch.ones(31)}),
            rf"{NORM} has the shape \[31\], config.json wants \[32\]",
        ),
        (
            "llama",
            lambda it: it.update({NORM: torch.ones(32).long()}),
            f"{NORM} is int64",
        ),
        (
            "llama",
            lambda it: it.update({NORM.removeprefix("model."): torch.ones(32)}),
            f"{NORM} is there as|is there as {NORM}",
        ),
        (
            "llama tied, biases",
            lambda it: it.update({"lm_head.weight": torch.ones(VOCAB, 32)}),
            "lm_head.weight is not model.embed_tokens.weight, though tie_word_embeddings",
        ),
        (
            "gpt2",
            lambda it: it.update({"transformer.h.0.attn.c_attn.weight": torch.ones(96, 32)}),
            r"c_attn.weight has the shape \[96, 32\], config.json wants \[32, 96\]",
        ),
    ],
)
def test_weights_that_do_not_fit(
    family: str, change: Callable[[Tensors], object], message: str, saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved / family, tmp_path / "reference")
    path = tmp_path / "reference" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    refuse(tmp_path, message)


def test_a_tied_head_may_be_stored_too(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "gpt2", tmp_path / "reference")
    path = tmp_path / "reference" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}, path)
    assert "head.weight" not in whole_parameters(take(tmp_path / "reference", tmp_path / "native"))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    model = make_transformers_model(llama())
    model.save_pretrained(tmp_path / "reference", max_shard_size="30KB")
    return tmp_path / "reference"


def test_shards_that_are_not_what_the_index_says(shards: Path, tmp_path: Path) -> None:
    first, second, *_ = sorted(shards.glob("*.safetensors"))
    moved = first.rename(tmp_path / "away")
    refuse(tmp_path, f"{first.name}: is missing")
    moved.rename(first)

    content = load_file(second)
    save_file(content | {"model.norm.weight": torch.ones(32)}, second)
    refuse(tmp_path, "model.norm.weight is in")
    name = next(iter(content))
    save_file({n: t for n, t in content.items() if n != name}, second)
    refuse(tmp_path, f"{second.name}: has no tensor {name}")
    second.write_bytes(second.read_bytes()[:-1])
    refuse(tmp_path, f"{second.name}: is truncated")

    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    refuse(tmp_path, "is no index of shards")
    index.write_text("{}")
    refuse(tmp_path, "is no index of shards")
    index.unlink()
    refuse(tmp_path, "has neither model.safetensors nor pytorch_model.bin")


class Thing:
    """An object that a pickle of tensors alone does not contain."""


def test_pickles_that_may_run_code(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "llama", tmp_path / "reference")
    whole = tmp_path / "reference" / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    path = tmp_path / "reference" / "pytorch_model.bin"
    torch.save(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": Thing()}, path)
    refuse(tmp_path, "Thing.*--trust-pickle")
    with pytest.raises(InputError, match="inv_freq is no tensor"):
        take(tmp_path / "reference", tmp_path / "native", trust_pickle=True)
    torch.save([1], path)
    refuse(tmp_path, "holds no tensors by name")
    path.write_bytes(b"PK")
    refuse(tmp_path, "pytorch_model.bin: is damaged")


def test_no_config(tmp_path: Path) -> None:
    refuse(tmp_path, r"config\.json: cannot be read \(No such file")
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "config.json").write_text("[]")
    refuse(tmp_path, "is not a JSON object")


def test_numbers_that_fp16_cannot_hold(tok: Path, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "native", SHAPES["llama"], std=1e5)
    with pytest.raises(InputError, match=r"model.embed_tokens.weight: has values that fp16"):
        export(checkpoint, tmp_path / "hf", tok, precision="fp16")
    assert names_in(tmp_path) == {"native"}


def test_the_tokenizer_of_the_run(tok: Path, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(
        tmp_path / "run" / "checkpoints" / "step-00000001", SHAPES["llama"]
    )
    with pytest.raises(InputError, match="its tokenizer is not known; give --tokenizer"):
        export(checkpoint, tmp_path / "hf", None)
    run_file = tmp_path / "run" / "run.json"
    run_file.write_text(json.dumps({"tokenizer": str(tmp_path / "gone")}))
    with pytest.raises(InputError, match=r"tokenizer: .*gone is gone; give --tokenizer"):
        export(checkpoint, tmp_path / "hf", None)
    run_file.write_text(json.dumps({"tokenizer": str(tok)}))
    export(checkpoint, tmp_path / "hf", None)
    assert Tokenizer.load(tmp_path / "hf").fingerprint == Tokenizer.load(tok).fingerprint


def test_a_tokenizer_larger_than_the_model(tok: Path, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "native", replace(SHAPES["llama"], vocab=100))
    with pytest.raises(InputError, match="has 700 tokens, the model's vocabulary 100"):
        export(checkpoint, tmp_path / "hf", tok)


def test_the_tokenizer_comes_along_where_it_can(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "llama", tmp_path / "reference")
    taken = from_hf(tmp_path / "reference", tmp_path / "a", trust_pickle=False, workers=1)
    assert taken.tokenizer is None
    assert "has neither a sentencepiece model nor a tokenizer.json" in taken.why_no_tokenizer
    assert not (tmp_path / "a" / "tokenizer").exists()
    with pytest.raises(InputError, match=r"a: was converted without a tokenizer; give --tokenizer"):
        export(tmp_path / "a", tmp_path / "none", None)

    train_model(tmp_path / "reference" / "tokenizer.model", vocab_size=300)
    taken = from_hf(tmp_path / "reference", tmp_path / "b", trust_pickle=False, workers=1)
    assert taken.tokenizer == tmp_path / "b" / "tokenizer"
    export(tmp_path / "b", tmp_path / "hf", None)  # which recognizes it
    config = json.loads((tmp_path / "hf" / "config.json").read_bytes())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)

    other = train_model(
        tmp_path / "other" / "tokenizer.model", ["Another text."], vocab_size=16
    ).parent
    own, given = (Tokenizer.load(each).fingerprint for each in (taken.tokenizer, other))
    with pytest.raises(InputError, match=f"has the fingerprint {given}, but .* {own}; give the to"):
        export(tmp_path / "b", tmp_path / "hf2", other)
    for state in ({TOKENIZER_HASH: own}, {}):  # imports of earlier versions have no hash
        source = replace(open_source(str(tmp_path / "b")), state=state)
        with pytest.raises(InputError, match=f"{given}, but .* {own}; give the tokenizer"):
            new_tokens(source, Tokenizer.load(other), Tokenizer.load(other))
    assert json.loads((tmp_path / "b" / "state.json").read_bytes())[TOKENIZER_HASH] == own

    tokenizer_config = tmp_path / "reference" / "tokenizer_config.json"
    tokenizer_config.write_text(json.dumps({"tokenizer_class": "XLMRobertaTokenizer"}))
    taken = from_hf(tmp_path / "reference", tmp_path / "c", trust_pickle=False, workers=1)
    assert taken.tokenizer is None
    assert "XLMRobertaTokenizer numbers the tokens differently" in taken.why_no_tokenizer


def test_more_positions_than_the_training_had(tok: Path, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "native", SHAPES["llama"])
    export(checkpoint, tmp_path / "hf", tok, max_positions=4096)
    config = json.loads((tmp_path / "hf" / "config.json").read_bytes())
    assert config["max_position_embeddings"] == 4096
    words = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_bytes())
    assert words["model_max_length"] == 4096
    learned = write_random_checkpoint(tmp_path / "learned", SHAPES["gpt2"])
    with pytest.raises(InputError, match="--max-positions: the model has learned positions"):
        export(learned, tmp_path / "gpt2", tok, max_positions=4096)


def test_the_positions_of_yarn_do_not_depend_on_the_version(tok: Path, tmp_path: Path) -> None:
    """4.51 of transformers divides max_position_embeddings by the original length, and takes the
    result for the factor; later versions read the factor."""
    yarn = RotaryScalingConfig(type="yarn", factor=4.0, original_seq_len=30)
    shape = replace(SHAPES["llama grouped"], rotary_scaling=yarn)
    checkpoint = write_random_checkpoint(tmp_path / "native", shape)
    export(checkpoint, tmp_path / "hf", tok)
    config = json.loads((tmp_path / "hf" / "config.json").read_bytes())
    scaling = config["rope_scaling"]
    original = scaling["original_max_position_embeddings"]
    assert config["max_position_embeddings"] / original == scaling["factor"] == 4.0
    tokens = random_tokens(shape.vocab)
    found = transformers_logits(tmp_path / "hf", tokens)
    assert deviation(found, megaphase_logits(checkpoint, tokens)) < FP32
    result = run(
        "convert", "to-hf", checkpoint, "--tokenizer", tok, "--out", tmp_path / "longer",
        "--max-positions", 512,
    )  # fmt: skip
    assert "max_position_embeddings is 512, as asked for" in result.stdout
    assert "they need 120, the factor" in result.stdout


def test_a_damaged_checkpoint_is_not_exported(tok: Path, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "native", SHAPES["llama"])
    file = checkpoint / "parameters" / "norm.weight.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"norm.weight.safetensors: has been altered"):
        export(checkpoint, tmp_path / "hf", tok)
    assert names_in(tmp_path) == {"native"}


def signal_while_writing(number: signal.Signals) -> None:
    """In a conversion's process: send it a signal when it has started to write weights."""
    from megaphase.checkpoint.tensor_file import TensorWriter

    write = TensorWriter.write

    def signalled_write(writer: TensorWriter, part: Any) -> None:
        write(writer, part)
        os.kill(os.getpid(), number)

    TensorWriter.write = signalled_write  # type: ignore[method-assign]  # in this process alone


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_export_leaves_no_model(number: signal.Signals, tok: Path, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "native", SHAPES["llama"])
    ended = run(
        *("convert", "to-hf", checkpoint, "--out", tmp_path / "hf", "--tokenizer", tok),
        prepare=partial(signal_while_writing, number),
    )
    left = names_in(tmp_path) - {"native"}
    assert "hf" not in left
    if number == signal.SIGKILL:
        assert ended.returncode == -number
        assert left
    else:
        assert ended.returncode
        assert not left
    export(checkpoint, tmp_path / "hf", tok)
    assert names_in(tmp_path) == {"native", "hf"}
