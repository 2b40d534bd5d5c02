"""Convert a model's shape to the arguments stored in Megatron-LM's checkpoints.

Names are those of megatron/training/arguments.py.
"""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megaphase.convert.megatron.given_arguments import LLAMA3, shape_of
from megaphase.convert.megatron.names import Implementation
from megaphase.distributed.sharding import padded_vocab
from megaphase.model.shape import GPTShape
from megaphase.utils.errors import InputError


def expressed(shape: GPTShape, where: Path) -> GPTShape:
    """Return the shape of the same model that Megatron-LM supports.

    Megatron-LM computes GELU by tanh only fused with the addition of a bias. An option is supported
    if the arguments give it back when they are read.

    Raises:
        InputError: there is none; names the option at fault. where: starts the message.
    """
    wanted = replace(shape, bias=True) if shape.activation == "gelu" else shape
    if fault := _fault(shape) or _lost(wanted, where):
        raise InputError(
            where,
            f"model.{fault}",
            "for other readers write `megaphase convert reshape --portable`",
        )
    return wanted


def _lost(shape: GPTShape, where: Path) -> str | None:
    """The first option that the arguments do not give back."""
    args = megatron_args(
        shape,
        tensor=1,
        vocab_multiple=1,
        dtype=torch.float32,
        implementation=Implementation.LOCAL,
    )
    wanted, carried = shape.architecture(), shape_of(args, shape.vocab, where).architecture()
    for key in {**wanted, **carried}:
        if wanted.get(key) != carried.get(key):
            return f"{key}: {wanted.get(key)} cannot be converted"
    return None


def _fault(shape: GPTShape) -> str | None:
    """The first option that Megatron-LM does not have, with the reason; others: see `_lost`."""
    if shape.bias and not shape.has_qkv_bias:
        return "qkv_bias: false, and Megatron-LM has biases there where all other layers have them"
    if shape.activation not in ("swiglu", "gelu", "gelu_erf"):
        return f"activation: {shape.activation} cannot be converted"
    if shape.norm_after:
        return f"norm_position: {shape.norm_position}, and Megatron-LM has norms before layers only"
    if shape.qk_norm == "projection":
        return "qk_norm: projection, and Megatron-LM normalizes each head"
    if shape.qk_norm is not None and shape.norm != "rmsnorm":
        return f"qk_norm: {shape.qk_norm} is an RMS norm, and Megatron-LM's is a {shape.norm}"
    scaling = shape.rotary_scaling
    if scaling is None:
        return None
    if scaling.type == "yarn":
        return "rotary_scaling.type: yarn cannot be converted"
    if scaling.type == "linear" and not scaling.factor.is_integer():
        return f"rotary_scaling.factor: {scaling.factor}, and Megatron-LM takes whole numbers"
    for key, value in LLAMA3.items():
        if scaling.type == "llama3" and getattr(scaling, key) != value:
            return f"rotary_scaling.{key}: {getattr(scaling, key)}, in Megatron-LM always {value}"
    return None


def _scaling_args(shape: GPTShape) -> dict[str, Any]:
    scaling = shape.rotary_scaling
    if scaling is None:
        return {"use_rope_scaling": False}
    if scaling.type == "linear":
        factor = int(scaling.factor)
        return {"use_rope_scaling": False, "rotary_seq_len_interpolation_factor": factor}
    return {"use_rope_scaling": True, "rope_scaling_factor": scaling.factor}


def _rotary_percent(shape: GPTShape) -> float:
    """Megatron-LM rounds its product with the width of a head down."""
    percent = shape.rotary_size / shape.head_size
    exact = int(shape.head_size * percent) == shape.rotary_size
    return percent if exact else math.nextafter(percent, 1)


def _layer_args(shape: GPTShape) -> dict[str, Any]:
    """In which layers there is a sliding window, or no rotary positions."""
    slides = [int(shape.slides(block)) for block in range(shape.layers)]
    pattern, window = shape.attention_pattern, shape.sliding_window
    skipped: int | list[int] | None = None if pattern is None else slides
    if pattern is not None and pattern == ("sliding",) * (len(pattern) - 1) + ("full",):
        skipped = len(pattern)
    interval = shape.no_rotary_interval
    bare: int | list[int] | None = interval
    if interval is not None and shape.layers % interval:  # Megatron-LM wants one that divides them
        bare = [int(not shape.has_rotary(block)) for block in range(shape.layers)]
    return {
        # How many tokens before a token it attends to, and how many after it.
        "window_size": None if window is None else (window - 1, 0),
        "window_attn_skip_freq": skipped,
        "no_rope_freq": bare,
    }


def megatron_args(
    shape: GPTShape,
    *,
    tensor: int,
    vocab_multiple: int,
    dtype: torch.dtype,
    implementation: Implementation,
) -> Namespace:
    """Return the arguments read by --use-checkpoint-args or compared with a run's own arguments.

    vocab_multiple: --make-vocab-size-divisible-by.
    """
    gated = shape.activation == "swiglu"
    rotary = shape.position == "rotary"
    base = shape.rotary_base
    return Namespace(
        num_layers=shape.layers,
        encoder_num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        group_query_attention=shape.kv_heads != shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_size,
        seq_length=shape.seq_len,
        encoder_seq_length=shape.seq_len,
        max_position_embeddings=shape.seq_len,
        position_embedding_type="rope" if rotary else "learned_absolute",
        add_position_embedding=True,
        use_rotary_position_embeddings=rotary,
        rotary_base=int(base) if base.is_integer() else base,
        rotary_percent=_rotary_percent(shape),
        rotary_interleaved=False,
        **_scaling_args(shape),
        **_layer_args(shape),
        swiglu=gated,
        openai_gelu=False,
        squared_relu=False,
        bias_gelu_fusion=shape.activation == "gelu",
        bias_swiglu_fusion=gated,
        normalization="RMSNorm" if shape.norm == "rmsnorm" else "LayerNorm",
        norm_epsilon=shape.norm_eps,
        apply_layernorm_1p=False,
        apply_residual_connection_post_layernorm=False,
        apply_query_key_layer_scaling=False,
        qk_layernorm=shape.qk_norm is not None,
        multi_latent_attention=False,
        add_bias_linear=shape.bias,
        add_qkv_bias=shape.has_qkv_bias,
        untie_embeddings_and_output_weights=not shape.tied_embeddings,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        num_experts=None,
        vocab_size=shape.vocab,
        padded_vocab_size=padded_vocab(shape.vocab, vocab_multiple * tensor),
        make_vocab_size_divisible_by=vocab_multiple,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=1,
        expert_model_parallel_size=1,
        context_parallel_size=1,
        world_size=tensor,
        data_parallel_size=1,
        transformer_impl=str(implementation),
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        ckpt_format="torch",
        no_save_optim=True,
        no_save_rng=True,
        iteration=0,
        consumed_train_samples=0,
        skipped_train_samples=0,
        consumed_valid_samples=0,
    )


def load_options(args: Namespace) -> str:
    """Return the options that Megatron-LM needs besides --load, since it does not read them
    there."""
    options = {
        "ckpt-format": args.ckpt_format,
        "use-checkpoint-args": None,
        "tensor-model-parallel-size": args.tensor_model_parallel_size,
        "transformer-impl": args.transformer_impl,
        "make-vocab-size-divisible-by": args.make_vocab_size_divisible_by,
        "norm-epsilon": args.norm_epsilon,
        **({"qk-layernorm": None} if args.qk_layernorm else {}),
        **({} if args.swiglu or args.bias_gelu_fusion else {"no-bias-gelu-fusion": None}),
        **_scaling_options(args),
        **_layer_options(args),
        **({"bf16": None} if args.bf16 else {"fp16": None} if args.fp16 else {}),
    }
    return " ".join(
        f"--{name}" if value is None else f"--{name} {value}" for name, value in options.items()
    )


def _scaling_options(args: Namespace) -> dict[str, Any]:
    if args.use_rope_scaling:
        return {"use-rope-scaling": None, "rope-scaling-factor": args.rope_scaling_factor}
    factor = getattr(args, "rotary_seq_len_interpolation_factor", None)
    return {} if factor is None else {"rotary-seq-len-interpolation-factor": factor}


def _layer_options(args: Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if args.window_size is not None:
        options["window-size"] = ",".join(map(str, args.window_size))
    for name in ("window_attn_skip_freq", "no_rope_freq"):
        value = getattr(args, name)
        if value is not None:
            listed = isinstance(value, list)
            options[name.replace("_", "-")] = f'"{value}"'.replace(" ", "") if listed else value
    return options
