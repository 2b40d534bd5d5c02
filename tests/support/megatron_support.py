"""Models built from megatron-core's own modules, on the CPU.

megatron-core uses CUDA in three places where it is not needed here: the device of buffers and
angles, the generators of dropout (which is 0 here), and `torch.compile` of fused activations. These
are replaced; layers, names, sharding and the order of computation are its own.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

ITERATION = 5


@contextmanager
def megatron_on_cpu(tensor: int) -> Iterator[None]:
    """Form megatron-core's groups over gloo; all processes are one tensor-parallel group."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    from megatron.core import parallel_state
    from megatron.core.transformer import dot_product_attention

    tracker = Namespace(fork=lambda *name: nullcontext())
    tensor_parallel = dot_product_attention.tensor_parallel
    with (
        patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")),
        patch.object(tensor_parallel, "get_cuda_rng_tracker", lambda: tracker),
    ):
        parallel_state.initialize_model_parallel(tensor)
        yield
        parallel_state.destroy_model_parallel()


def build_model(args: Namespace) -> torch.nn.Module:
    """Build the GPTModel that Megatron-LM builds from these arguments
    (core_transformer_config_from_args and model_provider), from megatron-core's local layers.
    """
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
        attention_dropout=args.attention_dropout,
        hidden_dropout=args.hidden_dropout,
        params_dtype=args.params_dtype,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=args.normalization, qk_layernorm=args.qk_layernorm),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=getattr(args, "rope_scaling_factor", 8.0),
        seq_len_interpolation_factor=getattr(args, "rotary_seq_len_interpolation_factor", None),
    ).eval()


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Return logits of this rank's vocabulary: [batch, seq, padded vocabulary / tensor]."""
    seq = tokens.shape[1]
    mask = torch.triu(torch.ones(1, 1, seq, seq, dtype=torch.bool), 1)
    positions = torch.arange(seq).expand_as(tokens)
    return model(tokens, positions, mask).clone()


def save_model(model: torch.nn.Module, args: Namespace, folder: Path, rank: int) -> None:
    """Save like save_checkpoint and generate_state_dict with --ckpt-format torch."""
    path = folder / f"iter_{ITERATION:07d}" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": ITERATION,
        "model": model.state_dict_for_save_checkpoint(),
    }
    torch.save(state, path)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
