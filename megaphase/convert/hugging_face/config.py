"""Convert config.json of a Hugging Face model to a GPTShape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megaphase.convert.hugging_face.families import FAMILIES, GPT2, LLAMA, Family
from megaphase.model.shape import GPTShape
from megaphase.utils.errors import InputError
from megaphase.utils.files import read_json

CONFIG_FILE = "config.json"
_REMEDY = "megaphase has no such model; use another one"
_GELU = ("gelu_new", "gelu_pytorch_tanh")
_SILU = ("silu", "swish")


def read_config(directory: Path) -> tuple[Family, GPTShape]:
    """Return the family and the shape of the model in a directory.

    Raises:
        InputError: there is no config.json, or it has an unsupported value; names the key.
    """
    config = _Config(directory / CONFIG_FILE)
    config.refuse_if("quantization_config", config.get("quantization_config") is not None)
    if config.get("auto_map") is not None:
        raise config.refusal("auto_map", "names custom code")
    model_type = config.get("model_type")
    if model_type == "gpt2":
        return GPT2, _checked(config, _gpt2_shape(config))
    if model_type == "mistral":
        # If the key is missing, transformers uses a window of 4,096 tokens.
        config.refuse_if("sliding_window", config.get("sliding_window", 4096) is not None)
    elif model_type != "llama":
        known = ", ".join([*(family.model_type for family in FAMILIES), "mistral"])
        raise config.refusal("model_type", f"is {model_type!r}; known are {known}")
    return LLAMA, _checked(config, _llama_shape(config))


class _Config:
    """The keys of a config.json; a null value counts as missing, as in transformers."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._values = read_json(path)
        except OSError as error:
            raise InputError(
                path,
                f"cannot be read ({error.strerror})",
                "give the directory of a Hugging Face model",
            ) from None
        except ValueError:
            self._values = None
        if not isinstance(self._values, dict):
            raise InputError(path, "is not a JSON object", "copy the model again")

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(key, default)

    def size(self, key: str, default: int | None = None) -> int:
        """Return a positive whole number."""
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            problem = "is missing" if value is None else f"is {value!r}, not a positive number"
            raise self.refusal(key, problem, "copy the model again")
        return value

    def number(self, key: str, default: float) -> float:
        """Return a positive number."""
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            problem = f"is {value!r}, not a positive number"
            raise self.refusal(key, problem, "copy the model again")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean."""
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.refusal(key, f"is {value!r}, not true or false", "copy the model again")
        return value

    def refuse_if(self, key: str, refused: bool) -> None:
        """Reject the value of a key."""
        if refused:
            raise self.refusal(key, f"is {json.dumps(self.get(key))}")

    def refusal(self, key: str, problem: str, remedy: str = _REMEDY) -> InputError:
        return InputError(f"{self._path}: {key}", problem, remedy)


def _llama_shape(config: _Config) -> GPTShape:
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    head_dim = config.get("head_dim")
    config.refuse_if("head_dim", head_dim is not None and head_dim * heads != hidden)
    config.refuse_if("hidden_act", config.get("hidden_act", "silu") not in _SILU)
    bias = config.flag("attention_bias", False)
    if bias != config.flag("mlp_bias", False):
        state = "true" if bias else "false"
        raise config.refusal("attention_bias", f"is {state}, and mlp_bias is not")
    return GPTShape(
        vocab=config.size("vocab_size"),
        seq_len=config.size("max_position_embeddings", 2048),
        layers=config.size("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=config.size("num_key_value_heads", heads),
        ffn=config.size("intermediate_size"),
        tied_embeddings=config.flag("tie_word_embeddings", False),
        bias=bias,
        rotary_base=_rotary_base(config),
        norm_eps=config.number("rms_norm_eps", 1e-6),
    )


def _rotary_base(config: _Config) -> float:
    """Version 4 of transformers has rope_theta and rope_scaling, version 5 rope_parameters."""
    base = config.number("rope_theta", 10_000.0)
    config.refuse_if("partial_rotary_factor", config.get("partial_rotary_factor") not in (None, 1))
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key) or {}
        config.refuse_if(key, not isinstance(rope, dict) or not _is_plain(rope))
        base = rope.get("rope_theta", base)
    return float(base)


def _is_plain(rope: dict[str, Any]) -> bool:
    """Return whether rotary positions have no parameters besides their base."""
    if rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}:
        return False
    kind = rope.get("rope_type", rope.get("type", "default"))
    base = rope.get("rope_theta", 1)
    return (
        kind == "default"
        and rope.get("partial_rotary_factor") in (None, 1)
        and isinstance(base, int | float)
        and base > 0
    )


def _gpt2_shape(config: _Config) -> GPTShape:
    hidden, heads = config.size("n_embd"), config.size("n_head")
    config.refuse_if(
        "activation_function", config.get("activation_function", "gelu_new") not in _GELU
    )
    config.refuse_if("scale_attn_weights", not config.flag("scale_attn_weights", True))
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        config.refuse_if(key, config.flag(key, False))
    return GPTShape(
        vocab=config.size("vocab_size"),
        seq_len=config.size("n_positions", 1024),
        layers=config.size("n_layer"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        ffn=config.size("n_inner", 4 * hidden),
        norm="layernorm",
        position="learned",
        activation="gelu",
        tied_embeddings=config.flag("tie_word_embeddings", True),
        bias=True,
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
    )


def _checked(config: _Config, shape: GPTShape) -> GPTShape:
    """Reject inconsistent sizes."""
    if shape.hidden % shape.heads:
        problem = f"{shape.heads} heads do not divide the hidden size, {shape.hidden}"
    elif shape.heads % shape.kv_heads:
        problem = f"{shape.kv_heads} heads of keys and values do not divide {shape.heads} heads"
    elif shape.position == "rotary" and shape.head_dim % 2:
        problem = f"a head of {shape.head_dim} numbers cannot be rotated in pairs"
    else:
        return shape
    raise config.refusal("num_attention_heads", problem, "copy the model again")
