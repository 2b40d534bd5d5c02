"""Convert the arguments stored in Megatron-LM's checkpoints to a model's shape.

Names and defaults are those of megatron/training/arguments.py; a checkpoint may have been written
by an older version that did not have all of them.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megaphase.model.config import Activation, AttentionKind, RotaryScalingConfig
from megaphase.model.shape import GPTShape
from megaphase.utils.errors import InputError

Norm = Literal["rmsnorm", "layernorm"]
Position = Literal["rotary", "learned"]

_NORMALIZATIONS: dict[str, Norm] = {"RMSNorm": "rmsnorm", "LayerNorm": "layernorm"}
_POSITIONS: dict[str, Position] = {"rope": "rotary", "learned_absolute": "learned"}

# Values with which Megatron-LM's model is Megaphase's GPT; None and a missing value are also
# allowed.
_WANTED: dict[str, tuple[Any, ...]] = {
    "rotary_interleaved": (False,),
    "yarn_rotary_scaling_factor": (),
    "position_embedding_type": tuple(_POSITIONS),
    "normalization": tuple(_NORMALIZATIONS),
    "apply_layernorm_1p": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "qk_l2_norm": (False,),
    "multi_latent_attention": (False,),
    "attention_output_gate": (False,),
    "softmax_type": ("vanilla",),
    "softmax_scale": (),
    "linear_attention_freq": (),
    "experimental_attention_variant": (),
    "squared_relu": (False,),
    "openai_gelu": (False,),
    "quick_geglu": (False,),
    "geglu": (False,),
    "reglu": (False,),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (),
    "use_mup": (False,),
    "num_experts": (0,),
    "mtp_num_layers": (0,),
    "heterogeneous_layers_config_path": ("",),
    "heterogeneous_layers_config_encoded_json": ("",),
    "hybrid_override_pattern": (),
    "hybrid_layer_pattern": (),
    "is_hybrid_model": (False,),
    "spec": (),
    "expert_model_parallel_size": (1,),
}

# Of Llama 3.1, as Megatron-LM's --use-rope-scaling has them.
LLAMA3: dict[str, Any] = {
    "original_seq_len": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def shape_of(args: Namespace, vocab: int, where: Path) -> GPTShape:
    """Return the shape of the model that Megatron-LM builds from these arguments.

    vocab: the tokenizer's size. where: the file with the arguments.

    Raises:
        InputError: names the argument that is missing or has no equivalent in Megaphase's GPT.
    """
    given = _Given(args, where)
    given.check(_WANTED)
    position = given.position()
    bias = given.flag("add_bias_linear", not given.flag("disable_bias_linear"))
    gated = given.flag("swiglu")
    if not gated:
        given.check({"use_te_activation_func": (False,)})  # by tanh, without a bias in between
    hidden, heads, kv_heads, head_dim = given.heads()
    layers = given.size("num_layers")
    window, pattern = given.window(layers)
    return GPTShape(
        vocab=vocab,
        seq_len=given.size("max_position_embeddings" if position == "learned" else "seq_length"),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=given.size("ffn_hidden_size"),
        norm=_NORMALIZATIONS[given.get("normalization", "LayerNorm")],
        position=position,
        activation="swiglu" if gated else given.gelu(bias),
        tied_embeddings=not given.flag("untie_embeddings_and_output_weights"),
        bias=bias,
        qkv_bias=bias or given.flag("add_qkv_bias"),
        rotary_base=given.number("rotary_base", 10_000.0),
        qk_norm="head" if given.qk_norm() else None,
        rotary_dim=given.rotary_dim(head_dim) if position == "rotary" else None,
        rotary_scaling=given.scaling() if position == "rotary" else None,
        no_rotary_interval=given.bare_interval(layers) if position == "rotary" else None,
        sliding_window=window,
        attention_pattern=pattern,
        norm_eps=given.number("norm_epsilon", given.number("layernorm_epsilon", 1e-5)),
    )


def stored_vocab(args: Namespace, padded: int, where: Path) -> int:
    """Return the tokenizer's size.

    padded: rows of the embedding. where: the file with the arguments.

    Raises:
        InputError: the arguments do not determine it.
    """
    size = getattr(args, "vocab_size", None)
    if type(size) is not int:
        raise InputError(
            where,
            f"does not tell the tokenizer's size, and some of the embedding's {padded} rows may "
            "only pad",
            f"pass --vocab SIZE (--vocab {padded} to keep all rows)",
        )
    # This tokenizer's end-of-document token is not included.
    return size + 1 if getattr(args, "tokenizer_type", None) == "NullTokenizer" else size


class _Given:
    """The arguments of a checkpoint; None counts as not given."""

    def __init__(self, args: Namespace, where: Path) -> None:
        self._args, self._where = args, where

    def get(self, name: str, default: Any = None) -> Any:
        """Return an argument."""
        value = getattr(self._args, name, None)
        return default if value is None else value

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a boolean argument."""
        return bool(self.get(name, default))

    def number(self, name: str, default: float) -> float:
        """Return a positive number."""
        value = self.get(name, default)
        if not isinstance(value, int | float) or not value > 0:
            raise self.refusal(name, "a positive number is wanted")
        return float(value)

    def size(self, name: str) -> int:
        """Return a required positive whole number."""
        value = self.get(name)
        if type(value) is not int or value < 1:
            raise self.refusal(name, "a positive whole number is wanted")
        return value

    def heads(self) -> tuple[int, int, int, int]:
        """Return the hidden size, the numbers of query heads and of key and value heads, and the
        width of a head."""
        hidden, heads = self.size("hidden_size"), self.size("num_attention_heads")
        if self.get("kv_channels") is None and hidden % heads:
            raise self.refusal("num_attention_heads", f"it does not divide hidden_size={hidden}")
        width = hidden // heads if self.get("kv_channels") is None else self.size("kv_channels")
        if not self.flag("group_query_attention"):
            return hidden, heads, heads, width
        kv_heads = self.size("num_query_groups")
        if heads % kv_heads:
            problem = f"it does not divide num_attention_heads={heads}"
            raise self.refusal("num_query_groups", problem)
        return hidden, heads, kv_heads, width

    def qk_norm(self) -> bool:
        """Return whether queries and keys are normalized."""
        if self.flag("qk_layernorm"):
            normalization = self.get("normalization", "LayerNorm")
            if _NORMALIZATIONS[normalization] != "rmsnorm":
                problem = (
                    f"queries and keys have an RMS norm in our GPT, and here a {normalization}"
                )
                raise self.refusal("qk_layernorm", problem)
        return self.flag("qk_layernorm")

    def gelu(self, bias: bool) -> Activation:
        """Return the GELU: by tanh where it is fused with a bias, otherwise by erf."""
        return "gelu" if bias and self.flag("bias_gelu_fusion", True) else "gelu_erf"

    def rotary_dim(self, head_dim: int) -> int:
        """Return the width of the part of a head that is rotated."""
        percent = self.number("rotary_percent", 1.0)
        width = int(head_dim * percent)
        if percent > 1 or width < 2 or width % 2:
            problem = f"an even part of a head of {head_dim} is wanted"
            raise self.refusal("rotary_percent", problem)
        return width

    def scaling(self) -> RotaryScalingConfig | None:
        """Return the scaling of rotary positions: Llama 3's, or linear."""
        factor = self.number("rotary_seq_len_interpolation_factor", 1.0)
        if self.flag("use_rope_scaling"):
            self.check({"rotary_seq_len_interpolation_factor": (1, 1.0)})
            factor = self.number("rope_scaling_factor", 8.0)
            return RotaryScalingConfig(type="llama3", factor=factor, **LLAMA3)
        if factor == 1:
            return None
        return RotaryScalingConfig(type="linear", factor=factor)

    def window(self, layers: int) -> tuple[int | None, tuple[AttentionKind, ...] | None]:
        """Return how many tokens a token attends to, itself included, and the kinds of the layers,
        None if all have the window."""
        size = self.get("window_size")
        if size is None:
            return None, None
        if (
            not isinstance(size, tuple | list)
            or [type(each) for each in size] != [int, int]
            or size[0] < 0
            or size[1] != 0
        ):
            raise self.refusal("window_size", "only (tokens before, 0) can be converted")
        window, skipped = size[0] + 1, self.get("window_attn_skip_freq")
        if skipped is None:
            return window, None
        if type(skipped) is int and skipped > 0:
            slides = [number % skipped != 0 for number in range(1, layers + 1)]
        else:
            slides = self._layer_list("window_attn_skip_freq", layers)
        kinds: list[AttentionKind] = ["sliding" if each else "full" for each in slides]
        return window, tuple(kinds)

    def bare_interval(self, layers: int) -> int | None:
        """Return at which interval layers have no rotary positions."""
        value = self.get("no_rope_freq")
        if value is None or (type(value) is int and value > 0):
            return value
        bare = self._layer_list("no_rope_freq", layers)
        if not any(bare):
            return None
        interval = bare.index(True) + 1
        if bare != [number % interval == 0 for number in range(1, layers + 1)]:
            raise self.refusal("no_rope_freq", "only layers at an interval can be converted")
        return interval

    def _layer_list(self, name: str, layers: int) -> list[bool]:
        value = self.get(name)
        if not isinstance(value, list | tuple) or len(value) != layers:
            raise self.refusal(name, f"a whole number, or a list for {layers} layers, is wanted")
        return [bool(each) for each in value]

    def position(self) -> Position:
        """Return the model's position encoding."""
        rotary = self.flag("use_rotary_position_embeddings")
        name = self.get("position_embedding_type", "rope" if rotary else "learned_absolute")
        if name == "learned_absolute" and not self.flag("add_position_embedding", True):
            raise self.refusal("add_position_embedding", "our GPT knows positions")
        return _POSITIONS[name]

    def check(self, wanted: Mapping[str, tuple[Any, ...]]) -> None:
        """Reject the first argument that does not have one of its allowed values."""
        for name, allowed in wanted.items():
            value = self.get(name)
            if value is not None and value not in allowed:
                only = " or ".join(repr(each) for each in allowed) or "None"
                raise self.refusal(name, f"only {only} can be converted")

    def refusal(self, name: str, problem: str) -> InputError:
        """Return the error for an argument without an equivalent in Megaphase's GPT."""
        return InputError(
            self._where, f"{name}={self.get(name)!r} in its args: {problem}", "use another model"
        )
