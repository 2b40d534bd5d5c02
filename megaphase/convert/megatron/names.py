"""Megatron-LM's names, order and split of a GPT's parameters, and its files.

DIR/latest_checkpointed_iteration.txt      123, or `release` for weights alone
DIR/iter_0000123/mp_rank_00/model_optim_rng.pt      one for every tensor-parallel rank
DIR/iter_0000123/mp_rank_00_001/model_optim_rng.pt  the same with pipeline stages, here the second
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from megaphase.distributed.sharding import ParameterLayout
from megaphase.model.parameters import parameter_specs
from megaphase.model.shape import GPTShape

TRACKER_FILE = "latest_checkpointed_iteration.txt"
RELEASE = "release"
RANK_FILE = "model_optim_rng.pt"

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"


class Implementation(StrEnum):
    """The layers of Megatron-LM's model (--transformer-impl), which determine the names."""

    LOCAL = "local"
    TRANSFORMER_ENGINE = "transformer_engine"


_NAMES = {
    "positions": "embedding.position_embeddings.weight",
    "embedding.weight": WORD_EMBEDDINGS,
    "head.weight": OUTPUT_LAYER,
    "norm.": "decoder.final_layernorm.",
    "attention.qkv.": "self_attention.linear_qkv.",
    "attention.qk_norm.query.": "self_attention.q_layernorm.",
    "attention.qk_norm.key.": "self_attention.k_layernorm.",
    "attention.out.": "self_attention.linear_proj.",
    "feed_forward.up.": "mlp.linear_fc1.",
    "feed_forward.down.": "mlp.linear_fc2.",
}
_NORMS = {
    Implementation.LOCAL: {
        "attention_norm.": "input_layernorm.",
        "feed_forward_norm.": "pre_mlp_layernorm.",
    },
    # A norm is fused into the linear layer that follows it.
    Implementation.TRANSFORMER_ENGINE: {
        "attention_norm.": "self_attention.linear_qkv.layer_norm_",
        "feed_forward_norm.": "mlp.linear_fc1.layer_norm_",
    },
}

# Parts of the names of models from before Megatron Core, as Megatron Core's own layers have them.
_LEGACY_NAMES = {
    ".language_model.": ".",
    ".encoder.": ".decoder.",
    ".transformer.": ".decoder.",
    ".attention.": ".self_attention.",
    ".query_key_value.": ".linear_qkv.",
    ".dense.": ".linear_proj.",
    ".dense_h_to_4h.": ".linear_fc1.",
    ".dense_4h_to_h.": ".linear_fc2.",
    ".input_norm.": ".input_layernorm.",
    ".post_attention_layernorm.": ".pre_mlp_layernorm.",
    ".post_attention_norm.": ".pre_mlp_layernorm.",
    ".final_norm.": ".final_layernorm.",
    ".word_embeddings_for_head.": ".output_layer.",
}


@dataclass(frozen=True)
class MegatronParameter:
    """A parameter in Megatron-LM.

    Attributes:
        name: its name there.
        layout: how it is split, with the rows in Megatron-LM's order.
        interleaved: whether rows of queries, keys and values follow each other group by group.
    """

    name: str
    layout: ParameterLayout
    interleaved: bool


def megatron_parameters(
    shape: GPTShape, tensor: int, padded_vocab: int, implementation: Implementation
) -> dict[str, MegatronParameter]:
    """Return the parameters by Megaphase's names, in the model's order.

    tensor: the tensor-parallel size. padded_vocab: rows of the embedding on all ranks together.
    """
    names = {**_NAMES, **_NORMS[implementation]}
    parameters = {}
    for name, spec in parameter_specs(shape).items():
        layout = spec.layout(tensor)
        interleaved = ".attention.qkv." in name
        if interleaved:  # every rank gets whole groups
            layout = replace(layout, segments=(sum(layout.segments),))
        elif spec.padded:
            layout = replace(layout, segments=(padded_vocab,))
        parameters[name] = MegatronParameter(_foreign_name(name, names), layout, interleaved)
    return parameters


def rank_folder(rank: int, stage: int | None = None) -> str:
    """Return the folder of a tensor-parallel rank; stage: of the pipeline, None if there is one."""
    return f"mp_rank_{rank:02d}" if stage is None else f"mp_rank_{rank:02d}_{stage:03d}"


def current_name(legacy: str) -> str:
    """Return Megatron Core's name of a parameter of a model from before Megatron Core."""
    name = f".{legacy}"
    for old, new in _LEGACY_NAMES.items():
        name = name.replace(old, new)
    return name[1:]


def _foreign_name(name: str, names: dict[str, str]) -> str:
    block, dot, inside = name.removeprefix("blocks.").partition(".")
    if name.startswith("blocks."):
        return f"decoder.layers.{block}{dot}{_foreign_name(inside, names)}"
    part = next(part for part in names if name.startswith(part))
    return names[part] + name.removeprefix(part)
