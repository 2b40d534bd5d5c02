"""Small models of Megaphase and of transformers, and the logits of both."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from convert_support import whole_parameters
from plain_gpt import PlainGPT, PlainShape
from torch import Tensor

from megaphase.convert.hugging_face.from_hf import from_hf
from megaphase.convert.hugging_face.to_hf import to_hf
from megaphase.convert.source import open_source
from megaphase.distributed.initialization import Initializer
from megaphase.distributed.process_grid import ProcessGrid
from megaphase.model.gpt import GPT
from megaphase.model.shape import GPTShape

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ALONE = ProcessGrid(1, 0, 1, None, None)  # type: ignore[arg-type]  # one process needs no groups
VOCAB = 707  # odd, and larger than the tokenizer's
SEQ_LEN = 48
LLAMA: dict[str, Any] = {
    "vocab": VOCAB,
    "seq_len": SEQ_LEN,
    "layers": 2,
    "hidden": 32,
    "heads": 4,
    "kv_heads": 4,
    "ffn": 80,
}
GPT2 = LLAMA | {"norm": "layernorm", "position": "learned", "activation": "gelu"}
SHAPES: dict[str, GPTShape] = {
    name: GPTShape(**sizes)
    for name, sizes in {
        "llama": LLAMA,
        "llama grouped": LLAMA | {"kv_heads": 2, "rotary_base": 500_000.0, "norm_eps": 1e-6},
        "llama one group, tied": LLAMA | {"kv_heads": 1, "tied_embeddings": True},
        "llama grouped, biases": LLAMA | {"kv_heads": 2, "bias": True},
        "gpt2": GPT2 | {"bias": True},
        "gpt2 tied": GPT2 | {"bias": True, "tied_embeddings": True, "norm_eps": 1e-6},
        "gpt2 tied, no biases": GPT2 | {"tied_embeddings": True},
        "gpt2 no biases": GPT2,
    }.items()
}


def random_tokens(vocab: int, *, batch: int = 3, seq: int = SEQ_LEN) -> Tensor:
    return torch.randint(vocab, (batch, seq), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def loaded_model(checkpoint: Path) -> GPT:
    """Return the GPT in this process, with weights read by other code."""
    model = GPT(open_source(str(checkpoint)).shape, Initializer(1, torch.float32), ALONE)
    weights = whole_parameters(checkpoint)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == weights.keys()
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
    return model.eval()


@torch.no_grad()
def megaphase_logits(checkpoint: Path, tokens: Tensor) -> Tensor:
    """Return the logits of that model."""
    logits: Tensor = loaded_model(checkpoint)(tokens)
    return logits


@torch.no_grad()
def plain_logits(checkpoint: Path, tokens: Tensor) -> Tensor:
    """Return the logits in float64, one head and one formula at a time."""
    shape = open_source(str(checkpoint)).shape
    plain = PlainShape(
        shape.layers,
        shape.heads,
        shape.kv_heads,
        layernorm=shape.norm == "layernorm",
        gelu=shape.activation == "gelu",
        eps=shape.norm_eps,
        rotary_base=shape.rotary_base,
    )
    return PlainGPT(whole_parameters(checkpoint), plain).logits(tokens)


@torch.no_grad()
def transformers_logits(directory: Path, tokens: Tensor) -> Tensor:
    """Return the logits of `AutoModelForCausalLM` for a directory, all weights of which it must
    use."""
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    return model.eval()(tokens).logits


# --- conversions ---


def export(checkpoint: Path, out: Path, tok: Path | None, **options: Any) -> Path:
    settings: dict[str, Any] = {"precision": None, "max_shard_bytes": 10**9, "workers": 2}
    to_hf(str(checkpoint), out, tokenizer=tok, **settings | options)
    return out


def take(directory: Path, out: Path, *, trust_pickle: bool = False) -> Path:
    from_hf(directory, out, trust_pickle=trust_pickle, workers=2)
    return out


# --- files written by transformers ---


LLAMA_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": SEQ_LEN,
}


def llama(**changes: Any) -> Any:
    import transformers

    return transformers.LlamaConfig(**LLAMA_SIZES | changes)


def mistral() -> Any:
    import transformers

    return transformers.MistralConfig(**LLAMA_SIZES, sliding_window=None)


def qwen2() -> Any:
    import transformers

    return transformers.Qwen2Config(**LLAMA_SIZES)


def apertus() -> Any:
    import transformers

    return transformers.ApertusConfig(**LLAMA_SIZES)


def gpt_neox() -> Any:
    import transformers

    sizes = {key: value for key, value in LLAMA_SIZES.items() if key != "num_key_value_heads"}
    return transformers.GPTNeoXConfig(**sizes)


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
    "qwen2": qwen2,
    "gpt2": gpt2,
    "neox": gpt_neox,
    "apertus": apertus,
    "gpt2 untied": lambda: gpt2(tie_word_embeddings=False, n_inner=72, layer_norm_epsilon=1e-6),
}


def make_transformers_model(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Make a model with random weights, biases and norms."""
    import transformers

    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms multiply by about 1: by their weight, or by 1 + weight.
            around = float(parameter.mean()) if parameter.dim() == 1 else 0.0
            parameter.normal_(around, 0.1)
    return model


def change_config(directory: Path, **changes: Any) -> None:
    """Set keys of config.json; None removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_bytes()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
