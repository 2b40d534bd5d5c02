"""Checkpoints to and from Megatron-LM, compared with models of megatron-core's own layers.

Its local layers run on the CPU (see megatron_support), so their logits are compared. Layers of
Transformer Engine do not: their names are compared with those to which megatron-core maps its local
ones, and the tensors with those of the local form.
"""

from __future__ import annotations

import fnmatch
import re
import shutil
import tempfile
from argparse import Namespace
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import pytest
import torch
from convert_support import megaphase_logits, write_random_checkpoint
from distributed import once, run_ranks
from megatron_support import (
    LLAMA,
    SHAPES,
    build_model,
    logits_of,
    make_each_part_count,
    megatron_on_cpu,
    save_model,
)
from rounding import FP32, assert_close, deviation
from torch import Tensor

from megaphase.convert.megatron.from_megatron import from_megatron
from megaphase.convert.megatron.given_arguments import shape_of
from megaphase.convert.megatron.names import Implementation
from megaphase.convert.megatron.to_megatron import Target, to_megatron
from megaphase.distributed.all_ranks import process_group

LOCAL = Implementation.LOCAL
# Settings of megatron-core (TransformerConfig) that from-megatron need not look at, by the reason.
HARMLESS = {
    "the same model, distributed": """
        tensor_model_parallel_size pipeline_model_parallel_comm_backend pipeline_model_parallel_size
        virtual_pipeline_model_parallel_size sequence_parallel context_parallel_size
        hierarchical_context_parallel_sizes max_seqlen_per_dp_cp_rank hybrid_context_parallel
        num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
        pipeline_model_parallel_layout account_for_embedding_in_pipeline_split
        account_for_loss_in_pipeline_split microbatch_group_size_per_vp_stage
        hetereogenous_dist_checkpoint distribute_saved_activations cp_comm_type
        symmetric_ar_type clone_scatter_output_in_embedding variable_seq_lengths""",
    "the same function, computed otherwise": """
        gradient_accumulation_fusion async_tensor_model_parallel_allreduce cross_entropy_loss_fusion
        cross_entropy_fusion_impl tp_comm_* overlap_p2p_comm use_ring_exchange_p2p
        deallocate_pipeline_outputs defer_embedding_wgrad_compute wgrad_deferral_limit
        overlap_p2p_comm_warmup_flush delay_wgrad_compute ep_overlap_early_attn_memory_release
        overlap_moe_expert_parallel_comm batch_p2p_* attention_backend recompute_*
        masked_softmax_fusion persist_layer_norm memory_efficient_layer_norm bias_dropout_fusion
        apply_rope_fusion fused_single_qkv_rope cuda_graph_* enable_cuda_graph external_cuda_graph
        cpu_offloading* _cpu_offloading_context fine_grained_activation_offloading offload_modules
        min_offloaded_tensor_size num_microbatches_with_partial_activation_checkpoints
        apply_query_key_layer_scaling flash_decode use_inference_optimized_layers
        inference_* mlp_chunks_for_prefill batch_invariant_mode deterministic_mode
        disable_parameter_transpose_cache transformer_impl""",
    "the precision of the computation": """
        fp16 bf16 params_dtype pipeline_dtype enable_autocast autocast_dtype fp8* fp4*
        fp32_residual_connection attention_softmax_in_fp32 disable_bf16_reduced_precision_matmul
        tp_only_amax_red first_last_layers_bf16 num_layers_at_start_in_bf16
        num_layers_at_end_in_bf16 use_kitchen use_kitchen_attention kitchen_attention_backend
        quant_recipe activation_func_fp8_input_store""",
    "of training": """
        perform_initialization use_cpu_initialization init_* output_layer_init_method
        embedding_init_method embedding_init_method_std timers finalize_model_grads_func
        grad_scale_func no_sync_func grad_sync_func param_sync_func use_te_rng_tracker
        barrier_with_L1_time hidden_dropout attention_dropout qk_clip qk_clip_alpha
        qk_clip_threshold log_max_attention_logit test_mode calculate_per_token_loss
        config_logger_dir mtp_loss_scaling_factor mtp_standalone""",
    "part of an option that is refused": """
        moe_* num_moe_experts expert_tensor_parallel_size linear_conv_kernel_dim linear_key_head_dim
        linear_value_head_dim linear_num_key_heads linear_num_value_heads dsa_* mamba_*
        use_mamba_mem_eff_path heterogeneous_block_specs mrope_section
        use_fused_weighted_squared_relu""",
    "read by another name: swiglu, bias_gelu_fusion": """
        gated_linear_unit activation_func bias_activation_fusion""",
}
SIZES = [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 4))]
BATCH = 2
TOKENS = torch.randint(LLAMA.vocab, (BATCH, LLAMA.seq_len), generator=torch.Generator())


Answers: TypeAlias = tuple[dict[tuple[str, str], Tensor], dict[str, str], set[str]]


def in_megatron(folder: Path) -> Answers:
    """Return this rank's logits of Megaphase's weights, `exported`, and of random ones that
    Megatron-LM saves, `native`; the names that local layers have in shared checkpoints, by their
    own; and the settings of a model."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    with process_group():
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        found = {}
        with megatron_on_cpu(size):
            for name in SHAPES:
                path = folder / f"exported-{size}" / name / "release" / f"mp_rank_{rank:02d}"
                state = torch.load(path / "model_optim_rng.pt", weights_only=False)
                model = build_model(state["args"])
                model.load_state_dict(state["model"], strict=True)
                found["exported", name] = logits_of(model, TOKENS)
                unfused = Namespace(**(vars(state["args"]) | {"bias_gelu_fusion": False}))
                model = build_model(unfused)
                model.load_state_dict(state["model"], strict=True)
                found["without bias_gelu_fusion", name] = logits_of(model, TOKENS)
                torch.manual_seed(1)  # every rank draws the whole and keeps its part
                model = build_model(state["args"])
                make_each_part_count(model)
                found["native", name] = logits_of(model, TOKENS)
                native = folder / f"native-{size}" / name
                save_model([model], state["args"], native, f"mp_rank_{rank:02d}")
        names = get_gpt_layer_local_spec().submodules.sharded_state_dict_keys_map
        return found, names, {field.name for field in fields(TransformerConfig)}


@once
def shared_folder() -> Path:
    """Make a folder with the checkpoint of every shape in `native`."""
    folder = Path(tempfile.mkdtemp(prefix="megaphase-megatron-"))
    for name, shape in SHAPES.items():
        write_random_checkpoint(folder / "native" / name, shape)
    return folder


@once
def answers(size: int) -> Answers:
    """Return the result of `in_megatron` for the whole vocabulary."""
    folder = shared_folder()
    for name in SHAPES:
        target = Target(size, "fp32", LOCAL, vocab_multiple=16)
        to_megatron(str(folder / "native" / name), folder / f"exported-{size}" / name, target)
    ranks = run_ranks(in_megatron, size, folder)
    logits = {key: torch.cat([each[0][key] for each in ranks], -1) for key in ranks[0][0]}
    return logits, *ranks[0][1:]


@pytest.fixture(scope="module")
def folder():
    path = shared_folder()
    yield path
    shutil.rmtree(path)


def assert_same_logits(reference: Tensor, native: Tensor) -> None:
    assert native.abs().max() > 0.5
    assert_close(reference[..., : native.shape[-1]], native)


@pytest.mark.distributed
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SHAPES)
def test_megatron_computes_our_logits(name: str, size: int, folder: Path) -> None:
    logits = answers(size)[0]["exported", name]
    assert_same_logits(logits, megaphase_logits(folder / "native" / name, SHAPES[name], TOKENS))
    padding = logits[..., LLAMA.vocab :]
    assert padding.shape[-1] == {1: 112, 2: 128, 4: 128}[size] - LLAMA.vocab
    assert torch.equal(padding, logits[..., LLAMA.vocab - 1 : LLAMA.vocab].expand_as(padding))


@pytest.mark.distributed
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SHAPES)
def test_we_compute_megatrons_logits(name: str, size: int, folder: Path, tmp_path: Path) -> None:
    logits = answers(size)[0]["native", name]
    out = tmp_path / "taken"
    from_megatron(folder / f"native-{size}" / name, out)
    assert_same_logits(logits, megaphase_logits(out, SHAPES[name], TOKENS))


@pytest.mark.distributed
def test_gelu_is_by_tanh_only_where_it_is_fused_with_the_bias(folder: Path) -> None:
    """This is why one without a bias, and one that is not fused, is `gelu_erf` here."""
    logits = answers(1)[0]
    for name, shape in SHAPES.items():
        fused, unfused = logits["exported", name], logits["without bias_gelu_fusion", name]
        if shape.activation == "gelu":
            assert deviation(unfused, fused) > 10 * FP32
            erf = replace(shape, activation="gelu_erf")
            ours = megaphase_logits(folder / "native" / name, erf, TOKENS)
            assert_same_logits(unfused, ours)
        else:
            assert torch.equal(unfused, fused)


@pytest.mark.distributed
@pytest.mark.parametrize("name", SHAPES)
def test_names_of_transformer_engine(name: str, folder: Path, tmp_path: Path) -> None:
    """They are those to which megatron-core's local layers map their own in shared checkpoints."""
    to_megatron(
        str(folder / "native" / name), tmp_path / "out", Target(1, "fp32", vocab_multiple=16)
    )
    fused, local = (
        torch.load(saved / "release" / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)
        for saved in (tmp_path / "out", folder / "exported-1" / name)
    )
    assert fused["args"].transformer_impl == "transformer_engine"
    names = local["model"]
    for own, shared in answers(1)[1].items():
        names = {
            re.sub(rf"(layers\.\d+\.){re.escape(own)}", rf"\1{shared}", each): tensor
            for each, tensor in names.items()
        }
    assert fused["model"].keys() == names.keys() != local["model"].keys()
    for each, tensor in fused["model"].items():
        assert torch.equal(tensor, names[each])


class Recorded(Namespace):
    """Arguments that know which of them were read."""

    read: ClassVar[set[str]] = set()

    def __getattribute__(self, name: str) -> Any:
        type(self).read.add(name)
        return super().__getattribute__(name)


@pytest.mark.distributed
def test_every_setting_of_megatron_core_is_read_refused_or_harmless(folder: Path) -> None:
    settings = answers(1)[2]
    for name, shape in SHAPES.items():
        path = folder / "exported-1" / name / "release" / "mp_rank_00" / "model_optim_rng.pt"
        args = torch.load(path, weights_only=False)["args"]
        assert shape_of(Recorded(**vars(args)), shape.vocab, path) == shape
    harmless = [pattern for names in HARMLESS.values() for pattern in names.split()]
    unknown = {
        name
        for name in settings - Recorded.read
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in harmless)
    }
    assert not unknown
    assert not [pattern for pattern in harmless if not fnmatch.filter(settings, pattern)]
    assert not {name for pattern in harmless for name in fnmatch.filter(Recorded.read, pattern)}
