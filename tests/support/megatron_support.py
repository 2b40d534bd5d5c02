"""Models built from megatron-core's own modules, on the CPU.

megatron-core uses CUDA in three places where it is not needed here: the device of buffers and
angles, the generators of dropout (which is 0 here), and `torch.compile` of fused activations. These
are replaced, and so are moves of tensors to the GPU; layers, names, sharding and the order of
computation are its own.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from megaphase.model.config import RotaryScalingConfig
from megaphase.model.shape import GPTShape

ITERATION = 5
# Of models that Megatron-LM has, each with something that others have not.
LLAMA = GPTShape(
    vocab=99, seq_len=24, layers=2, hidden=32, heads=8, kv_heads=4, ffn=48, rotary_base=5000.0
)
SHAPES = {
    "llama": LLAMA,
    "llama-tied": replace(LLAMA, tied_embeddings=True, kv_heads=8, norm_eps=1e-6),
    "llama-bias": replace(LLAMA, bias=True),
    "llama-3.1": replace(
        LLAMA,
        rotary_scaling=RotaryScalingConfig(type="llama3", factor=8.0, original_seq_len=8192),
        rotary_base=500_000.0,
        head_dim=12,
    ),
    "llama-linear": replace(LLAMA, rotary_scaling=RotaryScalingConfig(type="linear", factor=3.0)),
    "qwen3": replace(LLAMA, qk_norm="head", head_dim=8),
    "qwen2": replace(LLAMA, qkv_bias=True),
    "mistral": replace(LLAMA, sliding_window=7),
    "sliding": replace(
        LLAMA, layers=3, sliding_window=5, attention_pattern=("sliding", "full"), head_dim=8
    ),
    "smollm3": replace(LLAMA, layers=4, no_rotary_interval=2),
    "rope-in-a-list": replace(
        LLAMA,
        layers=3,
        no_rotary_interval=2,
        sliding_window=5,
        attention_pattern=("full", "sliding", "sliding"),
    ),
    "gpt-neox": replace(
        LLAMA, norm="layernorm", activation="gelu_erf", bias=True, head_dim=8, rotary_dim=2
    ),
    "gelu": replace(LLAMA, norm="layernorm", activation="gelu_erf", tied_embeddings=True),
    "gpt": replace(
        LLAMA,
        norm="layernorm",
        position="learned",
        activation="gelu",
        bias=True,
        tied_embeddings=True,
        kv_heads=8,
    ),
}


@contextmanager
def megatron_on_cpu(
    tensor: int, pipeline: int = 1, virtual_pipeline: int | None = None
) -> Iterator[None]:
    """Form megatron-core's groups over gloo; what these sizes leave over is data parallelism."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    from megatron.core import parallel_state
    from megatron.core.transformer import dot_product_attention

    tracker = Namespace(fork=lambda *name: nullcontext())
    tensor_parallel = dot_product_attention.tensor_parallel
    with (
        patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")),
        patch.object(torch.cuda, "synchronize", lambda: None),
        patch.object(torch, "ones", partial(_without_device, torch.ones)),
        patch.object(torch.Tensor, "cuda", lambda tensor: tensor),
        patch.object(tensor_parallel, "get_cuda_rng_tracker", lambda: tracker),
    ):
        parallel_state.initialize_model_parallel(tensor, pipeline, virtual_pipeline)
        yield
        parallel_state.destroy_model_parallel()


def _without_device(function: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    return function(*args, **options | {"device": None})


def build_model(args: Namespace, chunk: int | None = None) -> torch.nn.Module:
    """Build the GPTModel that Megatron-LM builds from these arguments
    (core_transformer_config_from_args and model_provider), from megatron-core's local layers.

    chunk: of this rank's stage, where stages are virtual.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else None,
        kv_channels=args.kv_channels,
        normalization=args.normalization,
        layernorm_epsilon=args.norm_epsilon,
        gated_linear_unit=args.swiglu,
        activation_func=F.silu if args.swiglu else F.gelu,
        bias_activation_fusion=args.bias_swiglu_fusion if args.swiglu else args.bias_gelu_fusion,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        qk_layernorm=args.qk_layernorm,
        window_size=args.window_size,
        window_attn_skip_freq=args.window_attn_skip_freq,
        no_rope_freq=args.no_rope_freq,
        attention_dropout=args.attention_dropout,
        hidden_dropout=args.hidden_dropout,
        params_dtype=args.params_dtype,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=getattr(
            args, "virtual_pipeline_model_parallel_size", None
        ),
        pipeline_dtype=args.params_dtype,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=args.normalization, qk_layernorm=args.qk_layernorm),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
        vp_stage=chunk,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=getattr(args, "rope_scaling_factor", 8.0),
        seq_len_interpolation_factor=getattr(args, "rotary_seq_len_interpolation_factor", None),
    ).eval()


def make_each_part_count(model: torch.nn.Module) -> None:
    """Change a new model's zero biases and unit norms, so that every part affects the result."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.arange(len(parameter)).cos() * (1 + len(name) % 3)
        else:
            parameter.data *= 8


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Return logits of this rank's vocabulary: [batch, seq, padded vocabulary / tensor]."""
    seq = tokens.shape[1]
    mask = torch.triu(torch.ones(1, 1, seq, seq, dtype=torch.bool), 1)
    positions = torch.arange(seq).expand_as(tokens)
    return model(tokens, positions, mask).clone()


@torch.no_grad()
def pipelined_logits(chunks: Sequence[torch.nn.Module], tokens: Tensor) -> Tensor | None:
    """Return logits as `logits_of`, on the last stage; None on the others.

    chunks: of this rank's stage.
    """
    from megatron.core import parallel_state

    stages = parallel_state.get_pipeline_model_parallel_world_size()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    ranks = torch.distributed.get_process_group_ranks(
        parallel_state.get_pipeline_model_parallel_group()
    )
    hidden = torch.empty(tokens.shape[1], tokens.shape[0], chunks[0].config.hidden_size)
    for number, chunk in enumerate(chunks):
        if number or stage:
            torch.distributed.recv(hidden, ranks[(stage - 1) % stages])
            chunk.set_input_tensor(hidden)
        result = logits_of(chunk, tokens)
        if stage == stages - 1 and number == len(chunks) - 1:
            return result
        torch.distributed.send(result, ranks[(stage + 1) % stages])
    return None


def save_model(chunks: Sequence[torch.nn.Module], args: Namespace, folder: Path, rank: str) -> None:
    """Save like save_checkpoint and generate_state_dict with --ckpt-format torch.

    rank: the name of its folder.
    """
    path = folder / f"iter_{ITERATION:07d}" / rank / "model_optim_rng.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    models = [chunk.state_dict_for_save_checkpoint() for chunk in chunks]
    torch.save(_state(args, models), path)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))


def save_distributed(
    chunks: Sequence[torch.nn.Module], args: Namespace, folder: Path, **metadata: bool
) -> None:
    """Save like them with --ckpt-format torch_dist; called by all ranks.

    metadata: what megatron-core's sharded_state_dict takes.
    """
    from megatron.core import dist_checkpointing, parallel_state

    path = folder / f"iter_{ITERATION:07d}"
    if torch.distributed.get_rank() == 0:
        path.mkdir(parents=True)
        (folder / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    torch.distributed.barrier()
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    models = [
        chunk.sharded_state_dict(metadata={"dp_cp_group": group, **metadata}) for chunk in chunks
    ]
    dist_checkpointing.save(_state(args, models), str(path))


def _state(args: Namespace, models: Sequence[Any]) -> dict[str, Any]:
    named = {f"model{number}": model for number, model in enumerate(models)}
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": ITERATION,
        **(named if len(models) > 1 else {"model": models[0]}),
    }
