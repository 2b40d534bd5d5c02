"""Megatron-LM checkpoints that are rejected: by name, and nothing is left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_files_support import (
    change,
    legacy_model,
    rank_file,
    save_two_ranks,
    write_shapes,
)
from pickle_support import Payload

from megaphase.convert.megatron.from_megatron import from_megatron
from megaphase.utils.errors import InputError

QKV = "decoder.layers.1.self_attention.linear_qkv.weight"


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> dict[str, Path]:
    return write_shapes(tmp_path_factory.mktemp("native"))


@pytest.fixture
def saved(native, tmp_path) -> Path:
    return save_two_ranks(native, tmp_path)


def test_a_vocabulary_that_is_not_known(saved, tmp_path) -> None:
    change(rank_file(saved, 0), lambda state: delattr(state["args"], "vocab_size"))
    with pytest.raises(InputError, match=r"256 rows .* pass --vocab"):
        from_megatron(saved, tmp_path / "out")
    with pytest.raises(InputError, match="--vocab 300"):
        from_megatron(saved, tmp_path / "out", vocab=300)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rotary_percent", 0.3),
        ("rotary_percent", 1.5),
        ("rotary_interleaved", True),
        ("rotary_seq_len_interpolation_factor", -4),
        ("yarn_rotary_scaling_factor", 4.0),
        ("position_embedding_type", "yarn"),
        ("normalization", "L2Norm"),
        ("apply_layernorm_1p", True),
        ("qk_l2_norm", True),
        ("multi_latent_attention", True),
        ("squared_relu", True),
        ("openai_gelu", True),
        ("num_experts", 8),
        ("mtp_num_layers", 1),
        ("window_size", (128, 1)),
        ("window_size", (-1, 0)),
        ("no_rope_freq", 0),
        ("no_rope_freq", [1, 0]),
        ("no_rope_freq", [0, 0, 1]),
        ("kv_channels", -8),
        ("num_query_groups", 3),
        ("num_attention_heads", 0),
        ("num_layers", None),
        ("ffn_hidden_size", "wide"),
        ("norm_epsilon", -1.0),
    ],
)
def test_options_that_ours_has_not(saved, tmp_path, name, value) -> None:
    for rank in range(2):
        change(rank_file(saved, rank), lambda state: setattr(state["args"], name, value))
    with pytest.raises(InputError, match=rf"model_optim_rng\.pt: {name}="):
        from_megatron(saved, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]


def rename(old: str, new: str) -> Callable[[Any], object]:
    return lambda state: state["model"].update({new: state["model"].pop(old)})


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no rank 1": (
        "mp_rank_01: is missing.*2 tensor-parallel ranks",
        lambda saved: shutil.rmtree(rank_file(saved, 1).parent),
    ),
    "no rank 0": ("mp_rank_00.*missing", lambda saved: shutil.rmtree(rank_file(saved, 0).parent)),
    "too many ranks": (
        "mp_rank_02: is one too many",
        lambda saved: shutil.copytree(rank_file(saved, 1).parent, rank_file(saved, 2).parent),
    ),
    "no file": (
        r"mp_rank_01/model_optim_rng\.pt: is missing",
        lambda saved: rank_file(saved, 1).unlink(),
    ),
    "no iteration": (
        "release: is missing",
        lambda saved: shutil.move(saved / "release", saved / "iter_0000001"),
    ),
    "tracker": (
        "names no iteration",
        lambda saved: (saved / "latest_checkpointed_iteration.txt").write_text("last"),
    ),
    "no stage 1": (
        "mp_rank_00_001: is missing.*2 pipeline stages",
        lambda saved: [
            change(
                rank_file(saved, rank),
                lambda state: setattr(state["args"], "pipeline_model_parallel_size", 2),
            )
            for rank in range(2)
        ],
    ),
    "one rank of a stage": (
        "ranks with and without pipeline stages",
        lambda saved: shutil.move(rank_file(saved, 1).parent, saved / "release" / "mp_rank_00_001"),
    ),
    "experts": (
        "cut by expert parallelism",
        lambda saved: [
            shutil.move(
                rank_file(saved, rank).parent, saved / "release" / f"mp_rank_0{rank}_000_001"
            )
            for rank in range(2)
        ],
    ),
    "missing tensor": (
        f"mp_rank_01.*has no tensor {QKV}",
        lambda saved: change(rank_file(saved, 1), lambda state: state["model"].pop(QKV)),
    ),
    "unknown tensor": (
        "mp_rank_01.*no place for decoder.layers.2.mlp",
        lambda saved: change(
            rank_file(saved, 1),
            lambda state: state["model"].update({"decoder.layers.2.mlp": torch.ones(2)}),
        ),
    ),
    "other shape": (
        rf"mp_rank_01.*{QKV} has the shape \[1, 32\], its args want \[32, 32\]",
        lambda saved: change(
            rank_file(saved, 1), lambda state: state["model"].update({QKV: torch.ones(1, 32)})
        ),
    ),
    "other type": (
        f"mp_rank_01.*{QKV} is torch.int8",
        lambda saved: change(
            rank_file(saved, 1),
            lambda state: state["model"].update({QKV: state["model"][QKV].char()}),
        ),
    ),
    "twice": (
        "mp_rank_01.*decoder.layers.0.input_layernorm.weight twice",
        lambda saved: change(
            rank_file(saved, 1),
            lambda state: (
                legacy_model(state),
                state["model"]["language_model"].update(
                    transformer={"layers.0.input_layernorm.weight": torch.ones(32)}
                ),
            ),
        ),
    ),
    "ranks differ": (
        r"mp_rank_01.*decoder\.final_layernorm\.weight is not that of mp_rank_00",
        lambda saved: change(
            rank_file(saved, 1),
            lambda state: state["model"]["decoder.final_layernorm.weight"].add_(1),
        ),
    ),
    "iterations differ": (
        "mp_rank_01.*is of iteration 7, mp_rank_00 of 0",
        lambda saved: change(rank_file(saved, 1), lambda state: state.update(iteration=7)),
    ),
    "old version": (
        "mp_rank_00.*checkpoint_version 1.0",
        lambda saved: change(
            rank_file(saved, 0), lambda state: state.update(checkpoint_version=1.0)
        ),
    ),
    "no args": (
        "mp_rank_00.*has no args",
        lambda saved: change(rank_file(saved, 0), lambda state: state.pop("args")),
    ),
    "no model": (
        "mp_rank_00.*has no model",
        lambda saved: change(rank_file(saved, 0), lambda state: state.pop("model")),
    ),
    "no words": (
        "mp_rank_00.*has no tensor embedding.word_embeddings.weight",
        lambda saved: change(
            rank_file(saved, 0), rename("embedding.word_embeddings.weight", "embedding")
        ),
    ),
    "truncated": (
        "mp_rank_01.*is damaged",
        lambda saved: rank_file(saved, 1).write_bytes(rank_file(saved, 1).read_bytes()[:9999]),
    ),
    "flipped bit": ("mp_rank_01.*is damaged", lambda saved: flip_bit(rank_file(saved, 1))),
    "payload": (
        "mp_rank_01.*posix.system.*--trust-pickle",
        lambda saved: change(
            rank_file(saved, 1), lambda state: state.update(x=Payload(Path("victim")))
        ),
    ),
}


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_nothing_is_left(kind, saved, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    message, damage = DAMAGE[kind]
    damage(saved)
    with pytest.raises(InputError, match=message):
        from_megatron(saved, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]
