"""The families of Hugging Face models that correspond to a GPT, and their names for its parts.

- Llama: RMSNorm, rotary positions, SwiGLU, queries in groups or not, biases everywhere or nowhere.
- GPT-2: LayerNorm, learned positions, GELU, biases everywhere; weights stored as [inputs, outputs].

Embeddings are tied or not in both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megaphase.convert.parameter_mapping import ParameterMapping
from megaphase.distributed.sharding import ParameterLayout
from megaphase.model.parameters import parameter_layouts
from megaphase.model.shape import GPTShape
from megaphase.utils.errors import InputError

HEAD = "lm_head.weight"
# Tensors that some versions of transformers store but none needs: angles and causal masks.
_BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")
_NAME = re.compile(
    r"(?:blocks\.(?P<block>\d+)\.)?(?P<module>[a-z_.]+?)(?:\.(?P<kind>weight|bias))?"
)


@dataclass(frozen=True)
class Family:
    """Models of one architecture.

    Attributes:
        title: its name.
        model_type: its model_type in config.json.
        options: options that all of its models have, by their name in GPTShape.
        grouped: whether there may be fewer heads of keys and values than of queries.
        always_biased: whether all linear layers have biases.
        prefix: prefix of all tensors except the output projection's.
        blocks: the name of the list of blocks.
        modules: the family's modules by Megaphase's; one module may be split into several.
        transposed: modules in a block whose weights are stored as [inputs, outputs].
        config: returns the architecture's keys of config.json for a shape.
    """

    title: str
    model_type: str
    options: Mapping[str, str]
    grouped: bool
    always_biased: bool
    prefix: str
    blocks: str
    modules: Mapping[str, tuple[str, ...]]
    transposed: frozenset[str]
    config: Callable[[GPTShape], dict[str, Any]]

    def faults(self, shape: GPTShape) -> list[str]:
        """Return a shape's options that no model of this family has, as `model.KEY: VALUE`."""
        wrong = [key for key, value in self.options.items() if getattr(shape, key) != value]
        if not self.grouped and shape.kv_heads != shape.heads:
            wrong.append("kv_heads")
        return [f"model.{key}: {getattr(shape, key)}" for key in wrong]

    def expressed(self, shape: GPTShape) -> GPTShape:
        """Return the same model with the biases that this family has; added ones are 0."""
        return replace(shape, bias=True) if self.always_biased else shape

    def mappings(self, shape: GPTShape) -> dict[str, ParameterMapping]:
        """Return the mapping of every parameter of an expressed shape, by name, in the model's
        order."""
        layouts = parameter_layouts(shape, 1)
        return {name: self._mapping(name, layout) for name, layout in layouts.items()}

    def canonical(self, name: str) -> str:
        """Return a tensor's name in the whole model; in a base model, a part of it is missing."""
        return name if name == HEAD or name.startswith(self.prefix) else self.prefix + name

    def _mapping(self, name: str, layout: ParameterLayout) -> ParameterMapping:
        found = _NAME.fullmatch(name)
        assert found is not None
        block, module, kind = found.group("block", "module", "kind")
        if module == "head":
            return ParameterMapping(name, (HEAD,), layout.shape[:1])
        place = self.prefix if block is None else f"{self.prefix}{self.blocks}.{block}."
        foreign = tuple(f"{place}{each}.{kind or 'weight'}" for each in self.modules[module])
        rows = layout.segments if len(foreign) > 1 else layout.shape[:1]
        return ParameterMapping(name, foreign, rows, kind == "weight" and module in self.transposed)


def is_buffer(name: str) -> bool:
    """Return whether a tensor is not a parameter, but computed from the config by transformers."""
    return _BUFFERS.search(name) is not None


def family_for(shape: GPTShape, where: object) -> Family:
    """Return the family of a shape.

    Raises:
        InputError: there is none; names the options that prevent it. where: starts the message.
    """
    nearest = min(FAMILIES, key=lambda family: len(family.faults(shape)))
    if faults := nearest.faults(shape):
        expected = ", ".join(nearest.options.values())
        heads = "" if nearest.grouped else " and kv_heads equal to heads"
        raise InputError(
            where,
            f"{', '.join(faults)} cannot be expressed; {nearest.title} models have {expected}"
            f"{heads}",
            "for other readers write `megaphase convert reshape --portable`",
        )
    return nearest


def _llama_config(shape: GPTShape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.seq_len,
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        # Version 4 of transformers reads the first two, version 5 the third.
        "rope_theta": shape.rotary_base,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rotary_base},
        "attention_bias": shape.bias,
        "mlp_bias": shape.bias,
        "attention_dropout": 0.0,
        "tie_word_embeddings": shape.tied_embeddings,
        "initializer_range": shape.init_std,
        "use_cache": True,
    }


def _gpt2_config(shape: GPTShape) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": shape.vocab,
        "n_positions": shape.seq_len,
        "n_layer": shape.layers,
        "n_embd": shape.hidden,
        "n_head": shape.heads,
        "n_inner": shape.ffn,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": shape.norm_eps,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": shape.tied_embeddings,
        "initializer_range": shape.init_std,
        "use_cache": True,
    }


LLAMA = Family(
    title="Llama",
    model_type="llama",
    options={"norm": "rmsnorm", "position": "rotary", "activation": "swiglu"},
    grouped=True,
    always_biased=False,
    prefix="model.",
    blocks="layers",
    modules={
        "embedding": ("embed_tokens",),
        "attention_norm": ("input_layernorm",),
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.out": ("self_attn.o_proj",),
        "feed_forward_norm": ("post_attention_layernorm",),
        "feed_forward.up": ("mlp.gate_proj", "mlp.up_proj"),
        "feed_forward.down": ("mlp.down_proj",),
        "norm": ("norm",),
    },
    transposed=frozenset(),
    config=_llama_config,
)
GPT2 = Family(
    title="GPT-2",
    model_type="gpt2",
    options={"norm": "layernorm", "position": "learned", "activation": "gelu"},
    grouped=False,
    always_biased=True,
    prefix="transformer.",
    blocks="h",
    modules={
        "positions": ("wpe",),
        "embedding": ("wte",),
        "attention_norm": ("ln_1",),
        "attention.qkv": ("attn.c_attn",),
        "attention.out": ("attn.c_proj",),
        "feed_forward_norm": ("ln_2",),
        "feed_forward.up": ("mlp.c_fc",),
        "feed_forward.down": ("mlp.c_proj",),
        "norm": ("ln_f",),
    },
    transposed=frozenset(
        ("attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down")
    ),
    config=_gpt2_config,
)
FAMILIES = (LLAMA, GPT2)
