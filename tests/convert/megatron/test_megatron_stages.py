"""Pipeline stages of Megatron-LM's `torch` format, split by hand from files without stages.

test_megatron_layouts.py has those of megatron-core.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_support import assert_same_shards
from megatron_files_support import (
    SHAPES,
    change,
    legacy_model,
    load,
    rank_file,
    write_shapes,
)

from megaphase.convert.inspect import Inspector, inspect
from megaphase.convert.megatron.from_megatron import from_megatron
from megaphase.convert.megatron.names import Implementation
from megaphase.convert.megatron.to_megatron import Target, to_megatron
from megaphase.utils.errors import InputError

WORDS, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
NORM = "decoder.final_layernorm.weight"


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> dict[str, Path]:
    return write_shapes(tmp_path_factory.mktemp("native"))


def split(native: Path, folder: Path) -> Path:
    """Convert to a Megatron-LM checkpoint of two tensor-parallel ranks, with a layer in each of two
    pipeline stages."""
    saved = folder / "megatron"
    to_megatron(str(native), saved, Target(2, "fp32", Implementation.LOCAL))
    for rank in range(2):
        state = load(rank_file(saved, rank))
        state["args"].pipeline_model_parallel_size = 2
        whole = state["model"]
        for stage in range(2):
            model = {
                name.replace(".1.", ".0.") if stage else name: tensor
                for name, tensor in whole.items()
                if (f"layers.{stage}." in name)
                or (name.startswith("embedding") and stage == 0)
                or (name in (OUTPUT, NORM, NORM.replace("weight", "bias")) and stage == 1)
            }
            if stage and OUTPUT not in whole:
                model[OUTPUT] = whole[WORDS].clone()
            path = stage_file(saved, rank, stage)
            path.parent.mkdir()
            torch.save(state | {"model": model}, path)
        shutil.rmtree(rank_file(saved, rank).parent)
    return saved


def stage_file(saved: Path, rank: int, stage: int) -> Path:
    return saved / "release" / f"mp_rank_{rank:02d}_{stage:03d}" / "model_optim_rng.pt"


def legacy_stage(state: Any) -> None:
    """Rename parameters as before Megatron Core, where a stage has only what is its own."""
    model = state["model"]
    embedding, output = WORDS in model, model.get(OUTPUT)
    tied = not state["args"].untie_embeddings_and_output_weights
    model.setdefault(WORDS, torch.zeros(1))
    legacy_model(state)
    language_model = state["model"]["language_model"]
    if not embedding:
        del language_model["embedding"]
    if output is not None and tied:
        del language_model["output_layer"]
        state["model"]["word_embeddings_for_head"] = {"weight": output}


@pytest.mark.parametrize("names", ["current", "legacy"])
@pytest.mark.parametrize("name", SHAPES)
def test_stages_are_joined(name, names, native, tmp_path) -> None:
    saved = split(native[name], tmp_path)
    if names == "legacy":
        for rank in range(2):
            for stage in range(2):
                change(stage_file(saved, rank, stage), legacy_stage)
    from_megatron(saved, tmp_path / "back")
    assert_same_shards(native[name], tmp_path / "back")


def test_inspection(native, tmp_path) -> None:
    saved = split(native["llama"], tmp_path)
    found = inspect(str(saved), Inspector(True, False, 1, None))
    assert str(found.facts["layout"]).startswith("tensor 2 × pipeline 2;")
    assert "decoder.layers.1.mlp.linear_fc1.weight" in found.tensors
    assert found.verified == "the checksums in 4 files of tensors are right"


def model_of(how: Callable[[dict[str, Any]], object]) -> Callable[[Any], object]:
    return lambda state: how(state["model"])


def virtual(state: Any) -> None:
    state["model0"] = state.pop("model")
    state["model1"] = {}


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "copy of the embedding": (
        "mp_rank_01_001.*output_layer.weight is tied .* not that of mp_rank_01_000",
        lambda saved: change(
            stage_file(saved, 1, 1), model_of(lambda model: model[OUTPUT][3].add_(1))
        ),
    ),
    "two embeddings": (
        f"mp_rank_00_001.*has {WORDS}, as mp_rank_00_000 has",
        lambda saved: change(
            stage_file(saved, 0, 1), model_of(lambda model: model.update({WORDS: model[OUTPUT]}))
        ),
    ),
    "no layer": (
        r"mp_rank_01_\*: has no tensor decoder.layers.1.input_layernorm",
        lambda saved: change(
            stage_file(saved, 1, 1),
            model_of(lambda model: [model.pop(name) for name in list(model) if "layers" in name]),
        ),
    ),
    "no file": (
        "mp_rank_01_001/model_optim_rng.pt: is missing",
        lambda saved: shutil.rmtree(stage_file(saved, 1, 1).parent),
    ),
    "no stage": (
        "mp_rank_00_001: is missing.*2 pipeline stages",
        lambda saved: [shutil.rmtree(stage_file(saved, rank, 1).parent) for rank in range(2)],
    ),
    "iteration": (
        "mp_rank_00_001.*is of iteration 7, mp_rank_00_000 of 0",
        lambda saved: change(stage_file(saved, 0, 1), lambda state: state.update(iteration=7)),
    ),
    "virtual stages": (
        "mp_rank_01_000.*has 2 virtual stages, mp_rank_00_000 has 1",
        lambda saved: change(stage_file(saved, 1, 0), virtual),
    ),
    "a virtual stage less": (
        "mp_rank_00_000.*has no model",
        lambda saved: change(
            stage_file(saved, 0, 0), lambda state: state.update(model1=state.pop("model"))
        ),
    ),
    "truncated": (
        "mp_rank_01_001.*is damaged",
        lambda saved: stage_file(saved, 1, 1).write_bytes(
            stage_file(saved, 1, 1).read_bytes()[:999]
        ),
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_nothing_is_left(kind, native, tmp_path) -> None:
    message, damage = DAMAGE[kind]
    damage(split(native["gpt"], tmp_path))
    with pytest.raises(InputError, match=message):
        from_megatron(tmp_path / "megatron", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]
