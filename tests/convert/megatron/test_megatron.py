"""Checkpoints to and from Megatron-LM, compared with models of megatron-core's own layers.

Its local layers run on the CPU (see megatron_support), so their logits are compared. Layers of
Transformer Engine do not: their names are compared with those to which megatron-core maps its local
ones, and the tensors with those of the local form.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from argparse import Namespace
from pathlib import Path

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
from megaphase.convert.megatron.names import Implementation
from megaphase.convert.megatron.to_megatron import Target, to_megatron
from megaphase.distributed.all_ranks import process_group

LOCAL = Implementation.LOCAL
SIZES = [1, 2, pytest.param(4, marks=pytest.mark.slow)]
BATCH = 2
TOKENS = torch.randint(LLAMA.vocab, (BATCH, LLAMA.seq_len), generator=torch.Generator())


def in_megatron(folder: Path) -> tuple[dict[tuple[str, str], Tensor], dict[str, str]]:
    """Return this rank's logits of Megaphase's weights, `exported`, and of random ones that
    Megatron-LM saves, `native`; and the names that local layers have in shared checkpoints, by
    their own."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

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
        return found, get_gpt_layer_local_spec().submodules.sharded_state_dict_keys_map


@once
def shared_folder() -> Path:
    """Make a folder with the checkpoint of every shape in `native`."""
    folder = Path(tempfile.mkdtemp(prefix="megaphase-megatron-"))
    for name, shape in SHAPES.items():
        write_random_checkpoint(folder / "native" / name, shape)
    return folder


@once
def answers(size: int) -> tuple[dict[tuple[str, str], Tensor], dict[str, str]]:
    """Return the result of `in_megatron` for the whole vocabulary."""
    folder = shared_folder()
    for name in SHAPES:
        target = Target(size, "fp32", LOCAL, vocab_multiple=16)
        to_megatron(str(folder / "native" / name), folder / f"exported-{size}" / name, target)
    ranks = run_ranks(in_megatron, size, folder)
    logits = {key: torch.cat([each[key] for each, _ in ranks], -1) for key in ranks[0][0]}
    return logits, ranks[0][1]


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
    """This is why a model trained without it is rejected."""
    logits = answers(1)[0]
    for name, shape in SHAPES.items():
        fused, unfused = logits["exported", name], logits["without bias_gelu_fusion", name]
        if shape.activation == "gelu":
            assert deviation(unfused, fused) > 10 * FP32
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
