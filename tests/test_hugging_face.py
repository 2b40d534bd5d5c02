"""Models of Hugging Face and ours compute the same logits, both ways, on every kind of file."""

from __future__ import annotations

import gzip
import json
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_support import save, whole_parameters, write_random_checkpoint
from data_support import CORPORA, make_tokenizer, write_jsonl
from distributed import once, run_ranks
from engine_support import build_engine, global_batch, process_group, run_config, share
from existing_tokenizers import train_model
from hf_support import (
    GPT2,
    LLAMA,
    SEQ_LEN,
    SHAPES,
    VOCAB,
    largest_difference,
    our_logits,
    plain_logits,
    random_tokens,
    their_logits,
)
from run_support import megaphase
from safetensors.torch import load_file, save_file

from megaphase.convert.from_hf import from_hf
from megaphase.convert.hf_config import read_config
from megaphase.convert.to_hf import to_hf
from megaphase.data_tools.tokenizers.train import train_tokenizer
from megaphase.errors import InputError
from megaphase.model.shape import GPTShape
from megaphase.parallel.agreement import Agreement
from megaphase.tokenizer import Tokenizer

TOLERANCE = 1e-5
LANGUAGES = ("en", "fr", "de", "hi", "eu")
TEXTS_EACH = 3


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def export(checkpoint: Path, out: Path, tok: Path | None, **options: Any) -> Path:
    settings: dict[str, Any] = {"precision": None, "max_shard_bytes": 10**9, "workers": 2}
    to_hf(str(checkpoint), out, tokenizer=tok, **settings | options)
    return out


def take(directory: Path, out: Path, *, trust_pickle: bool = False) -> Path:
    from_hf(directory, out, trust_pickle=trust_pickle, workers=2)
    return out


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_computes_our_logits(name: str, tok: Path, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "ours", SHAPES[name])
    theirs = their_logits(export(checkpoint, tmp_path / "hf", tok), tokens := random_tokens(VOCAB))
    assert largest_difference(theirs, our_logits(checkpoint, tokens)) < TOLERANCE
    assert largest_difference(theirs, plain_logits(checkpoint, tokens)) < TOLERANCE


@pytest.mark.parametrize("name", SHAPES)
def test_there_and_back_is_the_same_to_the_last_bit(name: str, tok: Path, tmp_path: Path) -> None:
    before = write_random_checkpoint(tmp_path / "ours", SHAPES[name])
    after = take(export(before, tmp_path / "hf", tok, max_shard_bytes=30_000), tmp_path / "back")
    family, shape = read_config(tmp_path / "hf")
    assert shape == family.expressed(SHAPES[name])
    weights, taken = whole_parameters(before), whole_parameters(after)
    assert weights.keys() <= taken.keys()
    for parameter, found in taken.items():
        assert torch.equal(found, weights.get(parameter, torch.zeros_like(found))), parameter


@pytest.fixture(scope="module")
def five_languages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A tokenizer of real texts, and some of them."""
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
    checkpoint = write_random_checkpoint(tmp_path / "ours", shape)
    directory = export(checkpoint, tmp_path / "hf", tok)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert len(texts) == TEXTS_EACH * len(LANGUAGES)
    ids = [theirs(text)["input_ids"] for text in texts]
    assert ids == tokenizer.encode_batch(texts)
    for each in ids:
        tokens = torch.tensor([each[: shape.seq_len]])
        found = their_logits(directory, tokens)
        assert largest_difference(found, our_logits(checkpoint, tokens)) < TOLERANCE


def train_and_save(folder: str) -> None:
    """Two steps of tensor 2 × data 2, ZeRO-3."""
    with process_group():
        model = {"kv_heads": 2, "bias": True}
        config = run_config(model=model, tensor=2, zero=3)
        engine = build_engine(config, VOCAB)
        for step in range(2):
            batch = share(global_batch(step, vocab=VOCAB), engine.topology)
            engine.train_step(batch, 1e-2)
        save(engine, config, VOCAB, Path(folder), Agreement())


@once
def trained() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="trained-"))
    run_ranks(train_and_save, 4, str(folder))
    return folder / "step-00000001"


@pytest.mark.distributed
def test_what_four_ranks_have_trained(tok: Path, tmp_path: Path) -> None:
    checkpoint = trained()
    directory = export(checkpoint, tmp_path / "hf", tok)
    shape = read_config(directory)[1]
    tokens = random_tokens(VOCAB, seq=shape.seq_len)
    found = their_logits(directory, tokens)
    assert found.shape[-1] == VOCAB
    assert largest_difference(found, our_logits(checkpoint, tokens)) < TOLERANCE
    shutil.rmtree(checkpoint.parent)


def test_shards_are_no_larger_than_asked(tok: Path, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "ours", SHAPES["llama grouped"])
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
    checkpoint = write_random_checkpoint(tmp_path / "ours", shape, precision=trained_in)
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

    checkpoint = write_random_checkpoint(tmp_path / "ours", SHAPES["llama grouped"])
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


# --- what transformers has made ---


def llama(**changes: Any) -> Any:
    import transformers

    sizes = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": SEQ_LEN,
    }  # fmt: skip
    return transformers.LlamaConfig(**sizes | changes)


def mistral() -> Any:
    import transformers

    return transformers.MistralConfig(
        **{key: value for key, value in llama().to_dict().items() if key in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "max_position_embeddings")},
        sliding_window=None,
    )  # fmt: skip


def gpt2(**changes: Any) -> Any:
    import transformers

    sizes = {
        "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": SEQ_LEN,
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    return transformers.GPT2Config(**sizes | changes)


THEIR_CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama tied, biases": lambda: llama(
        tie_word_embeddings=True, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-5
    ),
    "llama with another base": lambda: llama(
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}
    ),
    "mistral": mistral,
    "gpt2": gpt2,
    "gpt2 untied": lambda: gpt2(tie_word_embeddings=False, n_inner=72, layer_norm_epsilon=1e-6),
}


def make_theirs(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A model with random weights, biases and norms, too."""
    import transformers

    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if name.endswith("weight") and parameter.dim() == 1 else 0.0
            parameter.normal_(around, 0.2)
    return model


@pytest.mark.parametrize("name", THEIR_CONFIGS)
@pytest.mark.parametrize("form", ["safetensors", "shards", "pickle", "base model", "with buffers"])
def test_we_compute_the_logits_of_transformers(name: str, form: str, tmp_path: Path) -> None:
    model = make_theirs(THEIR_CONFIGS[name]())
    directory = tmp_path / "theirs"
    write_form(model, directory, form)
    tokens = random_tokens(VOCAB)
    with torch.no_grad():
        expected = model.eval()(tokens).logits
    found = our_logits(take(directory, tmp_path / "ours"), tokens)
    assert largest_difference(found, expected) < TOLERANCE


def write_form(model: Any, directory: Path, form: str) -> None:
    """Save a model as one of the kinds of files that are found."""
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
        prefix = f"{model.base_model_prefix}.{'h' if 'transformer.h' in str(tensors) else 'layers'}"
        if any(".h.0." in name for name in tensors):
            tensors[f"{prefix}.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
            tensors[f"{prefix}.0.attn.masked_bias"] = torch.tensor(-1e4)
        else:
            tensors[f"{prefix}.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        save_file(tensors, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_types_are_widened(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_theirs(llama(), dtype)
    model.save_pretrained(tmp_path / "theirs")
    weights = whole_parameters(take(tmp_path / "theirs", tmp_path / "ours"))
    layer = model.model.layers[1]
    expected = torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]).float()
    assert torch.equal(weights["blocks.1.feed_forward.up.weight"], expected)


def test_the_configs_of_version_4(tmp_path: Path) -> None:
    model = make_theirs(llama(rope_parameters={"rope_type": "default", "rope_theta": 12_345.0}))
    model.save_pretrained(tmp_path)
    change_config(tmp_path, rope_parameters=None, rope_theta=12_345.0, rope_scaling=None)
    assert read_config(tmp_path)[1].rotary_base == 12_345.0


def test_what_old_configs_leave_out(tmp_path: Path) -> None:
    """The first Llama's config.json had none of these keys."""
    keys = ("num_key_value_heads", "rope_parameters", "attention_bias", "mlp_bias", "head_dim")
    make_theirs(llama(num_key_value_heads=4)).save_pretrained(tmp_path)
    change_config(tmp_path, **dict.fromkeys((*keys, "tie_word_embeddings")))
    shape = read_config(tmp_path)[1]
    assert (shape.kv_heads, shape.rotary_base, shape.bias) == (4, 10_000.0, False)


# --- what is refused ---


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
    checkpoint = write_random_checkpoint(tmp_path / "ours", GPTShape(**options))
    with pytest.raises(InputError, match=faults):
        export(checkpoint, tmp_path / "hf", tok)
    assert names_in(tmp_path) == {"ours"}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def change_config(directory: Path, **changes: Any) -> None:
    """Set keys of config.json; None removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_bytes()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories by family."""
    folder = tmp_path_factory.mktemp("saved")
    for name in ("llama", "llama tied, biases", "mistral", "gpt2"):
        make_theirs(THEIR_CONFIGS[name]()).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(
    ("family", "changes", "key"),
    [
        ("llama", {"model_type": "bert"}, "model_type: is 'bert'"),
        ("llama", {"model_type": None}, "model_type: is None"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: is"),
        ("llama", {"auto_map": {"AutoModel": "a.B"}}, "auto_map: names code"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: is"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: is"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters: is"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: is 0.5"),
        ("llama", {"head_dim": 16}, "head_dim: is 16"),
        ("llama", {"hidden_act": "gelu"}, 'hidden_act: is "gelu"'),
        ("llama", {"attention_bias": True}, "attention_bias: is true, and mlp_bias is not"),
        ("llama", {"mlp_bias": True}, "attention_bias: is false, and mlp_bias is not"),
        ("llama", {"hidden_size": None}, "hidden_size: is missing"),
        ("llama", {"num_hidden_layers": "2"}, "num_hidden_layers: is '2', not a positive"),
        ("llama", {"rms_norm_eps": 0}, "rms_norm_eps: is 0, not a positive"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings: is 'no'"),
        ("llama", {"num_attention_heads": 5, "head_dim": None}, "num_attention_heads: 5 heads do"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads: 3 heads of keys"),
        ("mistral", {"sliding_window": 4096}, "sliding_window: is 4096"),
        ("gpt2", {"activation_function": "relu"}, 'activation_function: is "relu"'),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights: is false"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: is"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention: is true"),
    ],
)
def test_configs_that_cannot_be_taken(
    family: str, changes: dict[str, Any], key: str, saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved / family, tmp_path / "theirs")
    change_config(tmp_path / "theirs", **changes)
    refuse(tmp_path, rf"config\.json: {key}")


def refuse(folder: Path, message: str) -> None:
    """`theirs` is refused in one line, and nothing is left."""
    before = names_in(folder)
    with pytest.raises(InputError, match=message) as refused:
        take(folder / "theirs", folder / "ours")
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
            lambda tensors: tensors.update({"model.other.weight": torch.ones(3)}),
            "no place for model.other.weight",
        ),
        (
            "llama",
            lambda tensors: tensors.update({"score.weight": torch.ones(3)}),
            "no place for score.weight",
        ),
        (
            "llama",
            lambda tensors: tensors.update({NORM: torch.ones(31)}),
            rf"{NORM} has the shape \[31\], config.json wants \[32\]",
        ),
        (
            "llama",
            lambda tensors: tensors.update({NORM: torch.ones(32).long()}),
            f"{NORM} is int64",
        ),
        (
            "llama",
            lambda tensors: tensors.update({NORM.removeprefix("model."): torch.ones(32)}),
            f"{NORM} is there as|is there as {NORM}",
        ),
        (
            "llama tied, biases",
            lambda tensors: tensors.update({"lm_head.weight": torch.ones(VOCAB, 32)}),
            "lm_head.weight is not model.embed_tokens.weight, though tie_word_embeddings",
        ),
        (
            "gpt2",
            lambda tensors: tensors.update(
                {"transformer.h.0.attn.c_attn.weight": torch.ones(96, 32)}
            ),
            r"c_attn.weight has the shape \[96, 32\], config.json wants \[32, 96\]",
        ),
    ],
)
def test_weights_that_do_not_fit(
    family: str, change: Callable[[Tensors], object], message: str, saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved / family, tmp_path / "theirs")
    path = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    refuse(tmp_path, message)


def test_a_tied_head_may_be_stored_too(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "gpt2", tmp_path / "theirs")
    path = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}, path)
    assert "head.weight" not in whole_parameters(take(tmp_path / "theirs", tmp_path / "ours"))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    model = make_theirs(llama())
    model.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    return tmp_path / "theirs"


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
    """What a pickle of tensors alone has not."""


def test_pickles_that_may_run_code(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "llama", tmp_path / "theirs")
    whole = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    path = tmp_path / "theirs" / "pytorch_model.bin"
    torch.save(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": Thing()}, path)
    refuse(tmp_path, "Thing.*--trust-pickle")
    with pytest.raises(InputError, match="inv_freq is no tensor"):
        take(tmp_path / "theirs", tmp_path / "ours", trust_pickle=True)
    torch.save([1], path)
    refuse(tmp_path, "holds no tensors by name")
    path.write_bytes(b"PK")
    refuse(tmp_path, "pytorch_model.bin: is damaged")


def test_no_config(tmp_path: Path) -> None:
    refuse(tmp_path, r"config\.json: cannot be read \(No such file")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text("[]")
    refuse(tmp_path, "is not a JSON object")


def test_numbers_that_fp16_cannot_hold(tok: Path, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "ours", SHAPES["llama"], std=1e5)
    with pytest.raises(InputError, match="model.embed_tokens.weight: has values that fp16"):
        export(checkpoint, tmp_path / "hf", tok, precision="fp16")
    assert names_in(tmp_path) == {"ours"}


# --- which tokenizer ---


def test_the_tokenizer_of_the_run(tok: Path, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(
        tmp_path / "run" / "checkpoints" / "step-00000001", SHAPES["llama"]
    )
    with pytest.raises(InputError, match="its tokenizer is not known; give --tokenizer"):
        export(checkpoint, tmp_path / "hf", None)
    run_file = tmp_path / "run" / "run.json"
    run_file.write_text(json.dumps({"tokenizer": str(tmp_path / "gone")}))
    with pytest.raises(InputError, match="tokenizer: .*gone is gone; give --tokenizer"):
        export(checkpoint, tmp_path / "hf", None)
    run_file.write_text(json.dumps({"tokenizer": str(tok)}))
    export(checkpoint, tmp_path / "hf", None)
    assert Tokenizer.load(tmp_path / "hf").fingerprint == Tokenizer.load(tok).fingerprint


def test_a_tokenizer_larger_than_the_model(tok: Path, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "ours", replace(SHAPES["llama"], vocab=100))
    with pytest.raises(InputError, match="has 700 tokens, the model's vocabulary 100"):
        export(checkpoint, tmp_path / "hf", tok)


def test_the_tokenizer_comes_along_where_it_can(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "llama", tmp_path / "theirs")
    taken = from_hf(tmp_path / "theirs", tmp_path / "a", trust_pickle=False, workers=1)
    assert taken.tokenizer is None
    assert "has no sentencepiece model" in taken.why_no_tokenizer
    assert not (tmp_path / "a" / "tokenizer").exists()

    train_model(tmp_path / "theirs" / "tokenizer.model", vocab_size=300)
    taken = from_hf(tmp_path / "theirs", tmp_path / "b", trust_pickle=False, workers=1)
    assert taken.tokenizer == tmp_path / "b" / "tokenizer"
    export(tmp_path / "b", tmp_path / "hf", None)  # which knows it again
    config = json.loads((tmp_path / "hf" / "config.json").read_bytes())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)

    tokenizer_config = tmp_path / "theirs" / "tokenizer_config.json"
    tokenizer_config.write_text(json.dumps({"tokenizer_class": "XLMRobertaTokenizer"}))
    taken = from_hf(tmp_path / "theirs", tmp_path / "c", trust_pickle=False, workers=1)
    assert taken.tokenizer is None
    assert "XLMRobertaTokenizer numbers the tokens otherwise" in taken.why_no_tokenizer


# --- killed or wrong ---


def test_a_damaged_checkpoint_is_not_exported(tok: Path, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "ours", SHAPES["llama"])
    file = checkpoint / "parameters" / "norm.weight.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="norm.weight.safetensors: has been altered"):
        export(checkpoint, tmp_path / "hf", tok)
    assert names_in(tmp_path) == {"ours"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_export_leaves_no_model(number: int, tok: Path, tmp_path: Path) -> None:
    shape = replace(SHAPES["llama"], hidden=512, ffn=2048, layers=8)
    checkpoint = write_random_checkpoint(tmp_path / "ours", shape)
    command = megaphase(
        "convert", "to-hf", checkpoint, "--out", tmp_path / "hf", "--tokenizer", tok
    )
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and names_in(tmp_path) == {"ours"}:
            time.sleep(0.01)
        process.send_signal(number)
    left = names_in(tmp_path) - {"ours"}
    assert "hf" not in left
    assert number == signal.SIGKILL or not left
