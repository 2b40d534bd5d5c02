"""Checkpoints that megatron-core writes in other layouts of processes: pipeline stages, virtual
ones, and distributed checkpoints (see megatron_support)."""

from __future__ import annotations

import shutil
import tempfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_support import assert_same_shards, megaphase_logits
from distributed import once, run_ranks
from megatron_support import (
    LLAMA,
    build_model,
    make_each_part_count,
    megatron_on_cpu,
    pipelined_logits,
    save_distributed,
    save_model,
)
from megatron_support import SHAPES as SIZES
from rounding import assert_close
from torch import Tensor

from megaphase.checkpoint.state import read_state
from megaphase.convert.megatron.arguments import megatron_args
from megaphase.convert.megatron.from_megatron import from_megatron
from megaphase.convert.megatron.names import Implementation
from megaphase.convert.source import open_source
from megaphase.distributed.all_ranks import process_group
from megaphase.model.shape import GPTShape

# With a layer for each of the pipeline's stages, virtual ones included.
SHAPES = {name: replace(SIZES[name], layers=4) for name in ("qwen3", "gpt")}
PROCESSES = 4
# Tensor, pipeline and virtual pipeline size.
LAYOUTS = [(2, 2, None), (1, 2, 2), (2, 1, None)]
# How megatron-core names and stacks the tensors of distributed checkpoints.
FORMS: dict[str, dict[str, bool]] = {
    "stacked": {},
    "layer by layer": {"non_homogeneous_layers": True},
    "gates apart": {"singleton_local_shards": True},
}
TOKENS = torch.randint(LLAMA.vocab, (2, LLAMA.seq_len), generator=torch.Generator())


def in_megatron(folder: Path) -> dict[Any, Tensor]:
    """Save random models in every layout and form; return this rank's logits by layout and shape,
    with its tensor rank, if it is on the last stage."""
    from megatron.core import parallel_state

    found = {}
    with process_group():
        for layout in LAYOUTS:
            with megatron_on_cpu(*layout):
                tensor_rank = parallel_state.get_tensor_model_parallel_rank()
                for name, shape in SHAPES.items():
                    args = arguments(shape, layout)
                    chunks = _chunks(args)
                    logits = pipelined_logits(chunks, TOKENS)
                    if logits is not None:
                        found[layout, name, tensor_rank] = logits
                    _save(chunks, args, folder / str(layout) / name)
    return found


def arguments(shape: GPTShape, layout: tuple[int, int, int | None]) -> Namespace:
    tensor, pipeline, virtual = layout
    args = megatron_args(
        shape,
        tensor=tensor,
        vocab_multiple=16,
        dtype=torch.float32,
        implementation=Implementation.LOCAL,
    )
    args.pipeline_model_parallel_size = pipeline
    args.virtual_pipeline_model_parallel_size = virtual
    return args


def _chunks(args: Namespace) -> list[torch.nn.Module]:
    from megatron.core import parallel_state

    chunks = []
    virtual = args.virtual_pipeline_model_parallel_size
    for chunk in [None] if virtual is None else range(virtual):
        # Every rank draws the whole and keeps its part.
        torch.manual_seed(parallel_state.get_pipeline_model_parallel_rank() + 10 * (chunk or 0))
        chunks.append(build_model(args, chunk))
        make_each_part_count(chunks[-1])
    return chunks


def _save(chunks: list[torch.nn.Module], args: Namespace, folder: Path) -> None:
    from megatron.core import parallel_state

    rank = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if args.pipeline_model_parallel_size > 1:
        rank += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    if parallel_state.get_data_parallel_rank() == 0:
        save_model(chunks, args, folder / "torch", rank)
    for form, metadata in FORMS.items():
        save_distributed(chunks, args, folder / form, **metadata)


@once
def shared_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="megaphase-megatron-"))


@once
def answers() -> dict[Any, Tensor]:
    """Return the logits of the whole vocabulary by layout and shape."""
    ranks = run_ranks(in_megatron, PROCESSES, shared_folder())
    parts = {key: logits for each in ranks for key, logits in each.items()}
    return {
        (layout, name): torch.cat([parts[layout, name, rank] for rank in range(layout[0])], -1)
        for layout in LAYOUTS
        for name in SHAPES
    }


@pytest.fixture(scope="module")
def folder():
    path = shared_folder()
    yield path
    shutil.rmtree(path)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_we_compute_megatrons_logits(layout, name, folder: Path, tmp_path: Path) -> None:
    logits = answers()[layout, name]
    saved = folder / str(layout) / name
    from_megatron(saved / "torch", tmp_path / "torch")
    native = megaphase_logits(tmp_path / "torch", SHAPES[name], TOKENS)
    assert native.abs().max() > 0.5
    assert_close(logits[..., : LLAMA.vocab], native)
    for form in FORMS:
        from_megatron(saved / form, tmp_path / form, workers=2)
        assert_same_shards(tmp_path / "torch", tmp_path / form)
        assert open_source(str(tmp_path / form)).shape == SHAPES[name]
        assert read_state(tmp_path / form)["origin"]["iteration"] == 5
