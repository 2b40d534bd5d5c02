"""The families of Hugging Face models that correspond to a GPT: one table each, of the keys of
config.json and of the names of the model's parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from megaphase.convert.hugging_face.config_file import ConfigFile
from megaphase.convert.hugging_face.config_keys import (
    Fixed,
    Key,
    NoRopeLayers,
    NumberOrNone,
    Option,
    QueryScalar,
    Window,
    unread,
)
from megaphase.convert.hugging_face.family import Family
from megaphase.convert.hugging_face.gpt_families import GPT2, GPT_NEOX
from megaphase.convert.hugging_face.rope import Rope, RopeOfKinds
from megaphase.model.shape import GPTShape
from megaphase.ops.xielu import BETA, EPS
from megaphase.utils.errors import InputError


def family_for(shape: GPTShape, where: object) -> Family:
    """Return the family of a shape.

    Raises:
        InputError: there is none; names the options that prevent it. where: starts the message.
    """
    nearest = min(FAMILIES, key=lambda family: len(family.faults(shape)))
    if faults := nearest.faults(shape):
        expected = ", ".join(f"{key} {value}" for key, value in nearest.options.items())
        heads = "" if nearest.grouped else ", kv_heads equal to heads"
        raise InputError(
            where,
            f"{', '.join(faults)} cannot be expressed; {nearest.title} models have {expected}"
            f"{heads}",
            "for other readers write `megaphase convert reshape --portable`",
        )
    return nearest


def _kv_heads(absent: int | None) -> Callable[[ConfigFile], int]:
    """As many as of queries where the key is null, `absent` where there is no key."""

    def default(config: ConfigFile) -> int:
        missing = config.get("num_key_value_heads", absent)
        return missing or config.size("num_attention_heads")

    return default


_LLAMA_OPTIONS = {"norm": "rmsnorm", "position": "rotary", "activation": "swiglu"}
_SILU = Fixed(("silu", "swish"), "silu")
_LLAMA_KEYS: dict[str, Key] = {
    "vocab_size": Option("vocab"),
    "max_position_embeddings": Option("seq_len", default=2048),
    "num_hidden_layers": Option("layers"),
    "hidden_size": Option("hidden"),
    "num_attention_heads": Option("heads"),
    "num_key_value_heads": Option("kv_heads", default=_kv_heads(None)),
    "head_dim": Option("head_dim", optional=True),
    "intermediate_size": Option("ffn"),
    "hidden_act": _SILU,
    "rms_norm_eps": Option("norm_eps", "number", 1e-6),
    "tie_word_embeddings": Option("tied_embeddings", "flag", False),
    "rope_parameters": Rope(),
}
_LLAMA_MODULES = {
    "embedding": ("embed_tokens",),
    "attention_norm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.o_proj",),
    "feed_forward_norm": ("post_attention_layernorm",),
    "feed_forward.up": ("mlp.gate_proj", "mlp.up_proj"),
    "feed_forward.down": ("mlp.down_proj",),
    "norm": ("norm",),
}
_NO_DROPOUT = {"attention_dropout": 0.0}

LLAMA = Family(
    title="Llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    options=_LLAMA_OPTIONS,
    keys={
        **_LLAMA_KEYS,
        "attention_bias": Option("bias", "flag", False),
        "mlp_bias": Option("ffn_bias", "flag", False),
        "rope_interleaved": unread(False),
    },
    harmless={
        "is_llama_config": "of the program that trained it",
        "max_sequence_length": "not read by transformers in such models",
    },
    written=_NO_DROPOUT,
    heads_divide=True,
    prefix="model.",
    blocks="layers",
    modules=_LLAMA_MODULES,
)
MISTRAL = Family(
    title="Mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    options=_LLAMA_OPTIONS,
    keys={
        **_LLAMA_KEYS,
        "max_position_embeddings": Option("seq_len", default=131_072),
        "num_key_value_heads": Option("kv_heads", default=_kv_heads(8)),
        "sliding_window": Window(),
    },
    written=_NO_DROPOUT,
    prefix="model.",
    blocks="layers",
    modules=_LLAMA_MODULES,
)


def _above_max_window_layers(config: ConfigFile, layer: int) -> bool:
    first = config.get("max_window_layers", 28)
    config.refuse_if("max_window_layers", type(first) is not int)
    return layer >= int(first)


_QWEN_KEYS: dict[str, Key] = {
    **_LLAMA_KEYS,
    "max_position_embeddings": Option("seq_len", default=32_768),
    "num_key_value_heads": Option("kv_heads", default=_kv_heads(32)),
    "sliding_window": Window(_above_max_window_layers, switched=True),
    "use_mrope": unread(False),
}
QWEN2 = Family(
    title="Qwen 2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    options={**_LLAMA_OPTIONS, "bias": False, "qkv_bias": True},
    keys=_QWEN_KEYS,
    written=_NO_DROPOUT,
    prefix="model.",
    blocks="layers",
    modules=_LLAMA_MODULES,
)
QWEN3 = Family(
    title="Qwen 3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    options={**_LLAMA_OPTIONS, "qk_norm": "head"},
    keys={
        **_QWEN_KEYS,
        "head_dim": Option("head_dim", default=128),
        "attention_bias": Fixed((False,), False),
    },
    written=_NO_DROPOUT,
    prefix="model.",
    blocks="layers",
    modules=_LLAMA_MODULES
    | {
        "attention.qk_norm.query": ("self_attn.q_norm",),
        "attention.qk_norm.key": ("self_attn.k_norm",),
    },
)
OLMO2 = Family(
    title="OLMo 2",
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    options={**_LLAMA_OPTIONS, "qk_norm": "projection", "norm_position": "after"},
    keys={
        **_LLAMA_KEYS,
        "rms_norm_eps": Option("norm_eps", "number", 1e-5),
        "attention_bias": Fixed((False,), False),
        "clip_qkv": unread(None),
    },
    written=_NO_DROPOUT,
    prefix="model.",
    blocks="layers",
    modules={
        "embedding": ("embed_tokens",),
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.qk_norm.query": ("self_attn.q_norm",),
        "attention.qk_norm.key": ("self_attn.k_norm",),
        "attention.out": ("self_attn.o_proj",),
        "attention_post_norm": ("post_attention_layernorm",),
        "feed_forward.up": ("mlp.gate_proj", "mlp.up_proj"),
        "feed_forward.down": ("mlp.down_proj",),
        "feed_forward_post_norm": ("post_feedforward_layernorm",),
        "norm": ("norm",),
    },
)

OLMO3 = replace(
    OLMO2,
    title="OLMo 3",
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    keys={
        **OLMO2.keys,
        "rope_parameters": RopeOfKinds(500_000.0, 500_000.0),
        "sliding_window": Window(lambda _, layer: (layer + 1) % 4 != 0),
    },
)


def _has_no_rope(config: ConfigFile, layer: int) -> bool:
    interval = NoRopeLayers().read("no_rope_layers", config)["no_rotary_interval"]
    return (layer + 1) % int(interval) == 0


SMOLLM3 = Family(
    title="SmolLM 3",
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    options=_LLAMA_OPTIONS,
    keys={
        **_QWEN_KEYS,
        "num_key_value_heads": Option("kv_heads", default=_kv_heads(4)),
        "tie_word_embeddings": Option("tied_embeddings", "flag", True),
        "rope_parameters": Rope(2_000_000.0),
        "no_rope_layers": NoRopeLayers(),
        "sliding_window": Window(_has_no_rope, switched=True, default=None),
        "attention_bias": Option("bias", "flag", False),
        "mlp_bias": Option("ffn_bias", "flag", False),
    },
    harmless={"max_window_layers": "not read by transformers in such models"},
    written=_NO_DROPOUT,
    prefix="model.",
    blocks="layers",
    modules=_LLAMA_MODULES,
)
APERTUS = Family(
    title="Apertus",
    model_type="apertus",
    architecture="ApertusForCausalLM",
    options={**_LLAMA_OPTIONS, "activation": "xielu", "qk_norm": "head", "ffn_bias": False},
    keys={
        **_LLAMA_KEYS,
        "max_position_embeddings": Option("seq_len", default=65_536),
        "hidden_act": Fixed(("xielu",), "xielu"),
        "rms_norm_eps": Option("norm_eps", "number", 1e-5),
        "rope_parameters": Rope(
            12_000_000.0,
            default={
                "rope_type": "llama3",
                "rope_theta": 12_000_000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 8192,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        ),
        "attention_bias": Option("bias", "flag", False),
        "mlp_bias": unread(False),
        "post_norm": unread(False),
        "qk_norm": unread(True),
    },
    harmless={"hidden_dropout": "dropout of training; the run file has its own"},
    written=_NO_DROPOUT,
    prefix="model.",
    blocks="layers",
    modules={
        "embedding": ("embed_tokens",),
        "attention_norm": ("attention_layernorm",),
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.qk_norm.query": ("self_attn.q_norm",),
        "attention.qk_norm.key": ("self_attn.k_norm",),
        "attention.out": ("self_attn.o_proj",),
        "feed_forward_norm": ("feedforward_layernorm",),
        "feed_forward.up": ("mlp.up_proj",),
        "feed_forward.xielu.alpha_p": ("mlp.act_fn.alpha_p",),
        "feed_forward.xielu.alpha_n": ("mlp.act_fn.alpha_n",),
        "feed_forward.down": ("mlp.down_proj",),
        "norm": ("norm",),
    },
    constants={"mlp.act_fn.beta": BETA, "mlp.act_fn.eps": EPS},
)
_GEMMA_KEYS: dict[str, Key] = {
    **{name: key for name, key in _LLAMA_KEYS.items() if name != "hidden_act"},
    "num_key_value_heads": Option("kv_heads", default=_kv_heads(4)),
    "head_dim": Option("head_dim", default=256),
    "hidden_activation": Fixed(("gelu_pytorch_tanh",), "gelu_pytorch_tanh"),
    "tie_word_embeddings": Option("tied_embeddings", "flag", True),
    "query_pre_attn_scalar": QueryScalar(),
    "attention_bias": Fixed((False,), False),
    "use_bidirectional_attention": Fixed((False, None), None),
}
GEMMA2 = Family(
    title="Gemma 2",
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    options={
        "norm": "rmsnorm",
        "position": "rotary",
        "activation": "geglu",
        "norm_position": "both",
        "zero_centered_norms": True,
    },
    derived={"embedding_multiplier": lambda shape: math.sqrt(shape.hidden)},
    keys={
        **_GEMMA_KEYS,
        "max_position_embeddings": Option("seq_len", default=8192),
        "attn_logit_softcapping": NumberOrNone("attention_softcap", 50.0),
        "final_logit_softcapping": NumberOrNone("logit_softcap", 30.0),
        "sliding_window": Window(lambda _, layer: layer % 2 == 0),
    },
    harmless=dict.fromkeys(
        ("hidden_act", "sliding_window_size"), "not read by transformers in such models"
    ),
    written=_NO_DROPOUT,
    heads_divide=True,
    prefix="model.",
    blocks="layers",
    modules=_LLAMA_MODULES
    | {
        "attention_post_norm": ("post_attention_layernorm",),
        "feed_forward_norm": ("pre_feedforward_layernorm",),
        "feed_forward_post_norm": ("post_feedforward_layernorm",),
    },
)


def _not_at_the_interval(config: ConfigFile, layer: int) -> bool:
    return (layer + 1) % config.size("sliding_window_pattern", 6) != 0


GEMMA3 = replace(
    GEMMA2,
    title="Gemma 3",
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    options={**GEMMA2.options, "qk_norm": "head"},
    keys={
        **_GEMMA_KEYS,
        "max_position_embeddings": Option("seq_len", default=131_072),
        # Not read by transformers in its attention.
        "attn_logit_softcapping": Fixed((None,), None),
        "final_logit_softcapping": NumberOrNone("logit_softcap"),
        "sliding_window": Window(_not_at_the_interval),
        "rope_parameters": RopeOfKinds(1_000_000.0, 10_000.0, "rope_local_base_freq"),
    },
    harmless={**GEMMA2.harmless, "_sliding_window_pattern": "what layer_types says"},
    modules={
        **GEMMA2.modules,
        "attention.qk_norm.query": ("self_attn.q_norm",),
        "attention.qk_norm.key": ("self_attn.k_norm",),
    },
)
# The first of those that fit a shape is written.
FAMILIES = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    OLMO2,
    OLMO3,
    SMOLLM3,
    GEMMA2,
    GEMMA3,
    APERTUS,
    GPT_NEOX,
    GPT2,
)
