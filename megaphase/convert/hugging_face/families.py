"""The families of Hugging Face models that correspond to a GPT: one table each, of the keys of
config.json and of the names of the model's parts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from megaphase.convert.hugging_face.config_file import ConfigFile
from megaphase.convert.hugging_face.config_keys import (
    Fixed,
    Key,
    NoRopeLayers,
    OnEveryLayer,
    Option,
)
from megaphase.convert.hugging_face.rope import Rope
from megaphase.convert.parameter_mapping import ParameterMapping
from megaphase.distributed.sharding import ParameterLayout
from megaphase.model.parameters import parameter_layouts
from megaphase.model.shape import NOT_ARCHITECTURE, GPTShape
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
        architecture: its class in transformers.
        options: options that all of its models have, by their name in GPTShape.
        derived: further ones that follow from the rest of a shape.
        keys: how each key of config.json is read and written.
        harmless: further keys that change no logits, and why.
        written: further keys that are written.
        always_biased: whether all linear layers have biases.
        heads_divide: whether transformers wants hidden to be a multiple of the heads in any case.
        prefix: prefix of all tensors except the output projection's.
        blocks: the name of the list of blocks.
        modules: the family's modules by Megaphase's; one module may be split into several.
        transposed: modules in a block whose weights are stored as [inputs, outputs].
    """

    title: str
    model_type: str
    architecture: str
    options: Mapping[str, Any]
    keys: Mapping[str, Key]
    prefix: str
    blocks: str
    modules: Mapping[str, tuple[str, ...]]
    derived: Mapping[str, Callable[[GPTShape], Any]] = field(default_factory=dict)
    harmless: Mapping[str, str] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=dict)
    always_biased: bool = False
    heads_divide: bool = False
    transposed: frozenset[str] = frozenset()

    def faults(self, shape: GPTShape) -> list[str]:
        """Return a shape's options that no model of this family has, as `model.KEY: VALUE`."""
        free = {each for key in self.keys.values() for each in key.fields} | NOT_ARCHITECTURE
        if self.always_biased:
            free |= {"bias"}
        if shape.position == "learned":
            free |= {"rotary_base"}  # which then means nothing
        wanted = {
            each.name: self.options.get(each.name, each.default)
            for each in fields(GPTShape)
            if each.name not in free
        }
        if wanted.get("kv_heads") is MISSING:  # of the sizes, the only one it may not have
            wanted["kv_heads"] = shape.heads
        nearest = self.completed(replace(shape, **wanted))
        wrong = [key for key in wanted if getattr(shape, key) != getattr(nearest, key)]
        if self.heads_divide and shape.hidden % shape.heads:
            wrong.append("heads")
        return [f"model.{key}: {getattr(shape, key)}" for key in wrong]

    def completed(self, shape: GPTShape) -> GPTShape:
        """Return a shape with the options that follow from the others."""
        return replace(shape, **{name: of(shape) for name, of in self.derived.items()})

    def config(self, shape: GPTShape) -> dict[str, Any]:
        """Return the architecture's keys of config.json."""
        written: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
        }
        for name, key in self.keys.items():
            written |= key.write(name, shape)
        written |= {"initializer_range": shape.init_std, "use_cache": True}
        return {**written, **self.written}

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


def _grouped(family: Family) -> bool:
    """Whether there may be fewer heads of keys and values than of queries."""
    return any("kv_heads" in key.fields for key in family.keys.values())


def family_for(shape: GPTShape, where: object) -> Family:
    """Return the family of a shape.

    Raises:
        InputError: there is none; names the options that prevent it. where: starts the message.
    """
    nearest = min(FAMILIES, key=lambda family: len(family.faults(shape)))
    if faults := nearest.faults(shape):
        expected = ", ".join(f"{key} {value}" for key, value in nearest.options.items())
        heads = "" if _grouped(nearest) else ", kv_heads equal to heads"
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
_NO_WINDOW_USED = "of sliding windows, which are refused"

LLAMA = Family(
    title="Llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    options=_LLAMA_OPTIONS,
    keys={
        **_LLAMA_KEYS,
        "attention_bias": Option("bias", "flag", False),
        "mlp_bias": Option("bias", "flag", False),
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
        # If the key is missing, transformers uses a window of 4,096 tokens.
        "sliding_window": Fixed((None,), 4096),
    },
    written=_NO_DROPOUT,
    prefix="model.",
    blocks="layers",
    modules=_LLAMA_MODULES,
)
_QWEN_KEYS: dict[str, Key] = {
    **_LLAMA_KEYS,
    "max_position_embeddings": Option("seq_len", default=32_768),
    "num_key_value_heads": Option("kv_heads", default=_kv_heads(32)),
    "use_sliding_window": Fixed((False,), False),
    "layer_types": OnEveryLayer("full_attention"),
}
_QWEN_HARMLESS = dict.fromkeys(("sliding_window", "max_window_layers"), _NO_WINDOW_USED)
QWEN2 = Family(
    title="Qwen 2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    options={**_LLAMA_OPTIONS, "bias": False, "qkv_bias": True},
    keys=_QWEN_KEYS,
    harmless=_QWEN_HARMLESS,
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
    harmless=_QWEN_HARMLESS,
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
        "attention_bias": Option("bias", "flag", False),
        "mlp_bias": Option("bias", "flag", False),
    },
    harmless=_QWEN_HARMLESS,
    written=_NO_DROPOUT,
    prefix="model.",
    blocks="layers",
    modules=_LLAMA_MODULES,
)
GPT2 = Family(
    title="GPT-2",
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    options={"norm": "layernorm", "position": "learned", "activation": "gelu"},
    keys={
        "vocab_size": Option("vocab"),
        "n_positions": Option("seq_len", default=1024),
        "n_layer": Option("layers"),
        "n_embd": Option("hidden"),
        "n_head": Option("heads"),
        "n_inner": Option("ffn", default=lambda c: 4 * c.size("n_embd")),
        "activation_function": Fixed(("gelu_new", "gelu_pytorch_tanh"), "gelu_new"),
        "layer_norm_epsilon": Option("norm_eps", "number", 1e-5),
        "scale_attn_weights": Fixed((True,), True),
        "scale_attn_by_inverse_layer_idx": Fixed((False,), False),
        "tie_word_embeddings": Option("tied_embeddings", "flag", True),
    },
    harmless={
        **dict.fromkeys(
            ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
            "dropout of training; the run file has its own",
        ),
        **dict.fromkeys(
            (
                "summary_type",
                "summary_use_proj",
                "summary_activation",
                "summary_proj_to_labels",
                "summary_first_dropout",
            ),
            "of models that classify",
        ),
        "n_ctx": "n_positions in older files",
        "reorder_and_upcast_attn": "in which precision attention is computed",
    },
    written={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
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
)
# The first of those that fit a shape is written.
FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, SMOLLM3, GPT2)
