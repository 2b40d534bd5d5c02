"""Megatron-LM checkpoints that were converted from Megaphase's, modified by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from convert_support import write_random_checkpoint

from megaphase.convert.megatron.names import Implementation
from megaphase.convert.megatron.to_megatron import Target, to_megatron
from megaphase.model.shape import GPTShape

LLAMA = GPTShape(vocab=99, seq_len=24, layers=2, hidden=32, heads=8, kv_heads=4, ffn=48)
GPT2 = replace(
    LLAMA,
    norm="layernorm",
    position="learned",
    activation="gelu",
    bias=True,
    kv_heads=8,
    tied_embeddings=True,
    norm_eps=1e-6,
)
SHAPES = {"llama": replace(LLAMA, rotary_base=12345.5), "gpt": GPT2}


def write_shapes(folder: Path) -> dict[str, Path]:
    """Write a Megaphase checkpoint of every shape."""
    return {name: write_random_checkpoint(folder / name, shape) for name, shape in SHAPES.items()}


def save_two_ranks(native: dict[str, Path], folder: Path) -> Path:
    """Convert the Llama to a Megatron-LM checkpoint of two ranks."""
    to_megatron(str(native["llama"]), folder / "megatron", Target(2, "fp32", Implementation.LOCAL))
    return folder / "megatron"


def rank_file(saved: Path, rank: int) -> Path:
    return saved / "release" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def change(path: Path, how: Callable[[Any], object]) -> None:
    state = load(path)
    how(state)
    torch.save(state, path)


def legacy_model(state: Any) -> None:
    """Rename parameters as before Megatron Core."""
    model = state["model"]
    embedding = {"word_embeddings": {"weight": model["embedding.word_embeddings.weight"]}}
    if "embedding.position_embeddings.weight" in model:
        positions = model["embedding.position_embeddings.weight"]
        embedding["position_embeddings"] = {"weight": positions}
    inside = {
        "self_attention.linear_qkv": "self_attention.query_key_value",
        "self_attention.linear_proj": "self_attention.dense",
        "mlp.linear_fc1": "mlp.dense_h_to_4h",
        "mlp.linear_fc2": "mlp.dense_4h_to_h",
        "pre_mlp_layernorm": "post_attention_layernorm",
    }
    encoder = {}
    for name, tensor in model.items():
        if name.startswith("decoder."):
            for new, old in inside.items():
                name = name.replace(new, old)
            encoder[name.removeprefix("decoder.")] = tensor
    whole = {"embedding": embedding, "encoder": encoder}
    if "output_layer.weight" in model:
        whole["output_layer"] = {"weight": model["output_layer.weight"]}
    state["model"] = {"language_model": whole}
