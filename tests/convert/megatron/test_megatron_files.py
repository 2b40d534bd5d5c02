"""Megatron-LM's files without Megatron-LM: there and back, bit for bit."""

from __future__ import annotations

import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_support import assert_same_shards, whole_parameters, write_random_checkpoint
from megatron_files_support import (
    GPT2,
    SHAPES,
    change,
    legacy_model,
    load,
    rank_file,
    save_two_ranks,
    write_shapes,
)
from pickle_support import Payload
from typer.testing import CliRunner

from megaphase.checkpoint.state import read_state
from megaphase.convert.commands import convert_app
from megaphase.convert.megatron.from_megatron import from_megatron
from megaphase.convert.megatron.names import Implementation
from megaphase.convert.megatron.to_megatron import Target, to_megatron
from megaphase.convert.source import open_source
from megaphase.utils.errors import InputError

NAMES = list(Implementation)


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> dict[str, Path]:
    return write_shapes(tmp_path_factory.mktemp("native"))


@pytest.fixture
def saved(native, tmp_path) -> Path:
    return save_two_ranks(native, tmp_path)


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_there_and_back_is_bit_equal(name, size, implementation, native, tmp_path) -> None:
    to_megatron(
        str(native[name]), tmp_path / "there", Target(size, "fp32", implementation), workers=2
    )
    section = from_megatron(tmp_path / "there", tmp_path / "back", workers=2)
    assert_same_shards(native[name], tmp_path / "back")
    assert open_source(str(tmp_path / "back")).shape == SHAPES[name]
    assert (tmp_path / "back" / "model.yaml").read_text() == section
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_precision(dtype, native, tmp_path) -> None:
    to_megatron(str(native["llama"]), tmp_path / "there", Target(2, dtype))
    state = load(rank_file(tmp_path / "there", 1))
    kept = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert {tensor.dtype for tensor in state["model"].values()} == {kept}
    assert (state["args"].bf16, state["args"].fp16) == (dtype == "bf16", dtype == "fp16")
    from_megatron(tmp_path / "there", tmp_path / "back")
    whole = open_source(str(tmp_path / "back")).weights.whole
    before = open_source(str(native["llama"])).weights.whole
    for name in open_source(str(native["llama"])).weights.layouts:
        assert torch.equal(whole(name, "weight"), before(name, "weight").to(kept).float())


def test_arguments_that_megatron_reads(saved) -> None:
    """Those of --use-checkpoint-args (load_args_from_checkpoint) that decide what is computed."""
    state = load(rank_file(saved, 0))
    args = vars(state["args"])
    assert state["checkpoint_version"] == 3.0
    assert state["iteration"] == 0
    assert (saved / "latest_checkpointed_iteration.txt").read_text() == "release"
    expected = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "seq_length": 24,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "group_query_attention": True,
        "kv_channels": 4,
        "max_position_embeddings": 24,
        "position_embedding_type": "rope",
        "rotary_base": 12345.5,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "add_bias_linear": False,
        "swiglu": True,
        "untie_embeddings_and_output_weights": True,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-5,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "padded_vocab_size": 256,
        "make_vocab_size_divisible_by": 128,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 1,
        "consumed_train_samples": 0,
    }
    assert {name: args[name] for name in expected} == expected


def test_gelu_without_bias(tmp_path) -> None:
    """Megatron-LM's GELU is Megaphase's only if it adds a bias."""
    checkpoint = write_random_checkpoint(tmp_path / "native", replace(GPT2, bias=False))
    to_megatron(str(checkpoint), tmp_path / "there", Target(2, "fp32"))
    from_megatron(tmp_path / "there", tmp_path / "back")
    source = open_source(str(tmp_path / "back"))
    assert source.shape == GPT2
    for name, tensor in whole_parameters(checkpoint).items():
        assert torch.equal(source.weights.whole(name, "weight"), tensor)
    for name in source.weights.layouts.keys() - whole_parameters(checkpoint).keys():
        assert not source.weights.whole(name, "weight").any()


def test_a_tensor_parallel_size_that_does_not_fit(native, tmp_path) -> None:
    with pytest.raises(InputError, match="--tensor 8: does not divide the model's kv_heads, 4"):
        to_megatron(str(native["llama"]), tmp_path / "out", Target(8))
    assert not list(tmp_path.iterdir())


def test_an_iteration_of_a_run(saved, tmp_path) -> None:
    """With everything else that a rank saves, half of which is not needed here."""
    shutil.move(saved / "release", saved / "iter_0000012")
    for rank in range(2):
        path = saved / "iter_0000012" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"

        def add(state: Any) -> None:
            state |= {"iteration": 12, "optimizer": {"fp32": torch.zeros(9)}}
            state["model"]["decoder.layers.0.mlp.linear_fc1._extra_state"] = None

        change(path, add)
    (saved / "latest_checkpointed_iteration.txt").write_text("12\n")
    for number, source in enumerate((saved, saved / "iter_0000012")):
        from_megatron(source, tmp_path / str(number))
        origin = read_state(tmp_path / str(number))["origin"]
        assert origin["iteration"] == 12


@pytest.mark.parametrize("name", SHAPES)
def test_models_from_before_megatron_core(name, native, tmp_path) -> None:
    to_megatron(str(native[name]), tmp_path / "there", Target(2, "fp32", Implementation.LOCAL))
    for rank in range(2):
        change(rank_file(tmp_path / "there", rank), legacy_model)
    from_megatron(tmp_path / "there", tmp_path / "back")
    assert_same_shards(native[name], tmp_path / "back")


@pytest.mark.parametrize(
    ("options", "vocab"),
    [
        ({"vocab_size": 99}, None),
        ({"vocab_size": None}, 99),
        ({"vocab_size": 98, "tokenizer_type": "NullTokenizer"}, None),
        ({"vocab_size": 50}, 99),
    ],
)
def test_the_vocabulary(saved, native, tmp_path, options, vocab) -> None:
    for rank in range(2):
        change(rank_file(saved, rank), lambda state: vars(state["args"]).update(options))
    from_megatron(saved, tmp_path / "out", vocab=vocab)
    assert_same_shards(native["llama"], tmp_path / "out")


def test_trusted_pickles(saved, native, tmp_path) -> None:
    victim = tmp_path / "victim"
    change(rank_file(saved, 1), lambda state: state.update(x=Payload(victim)))
    from_megatron(saved, tmp_path / "out", trust_pickle=True)
    assert victim.exists()
    assert_same_shards(native["llama"], tmp_path / "out")


def test_commands(native, tmp_path) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    run = CliRunner()
    result = run.invoke(
        convert_app,
        [
            "to-megatron",
            str(native["gpt"]),
            "--tensor",
            "2",
            "--dtype",
            "bf16",
            "--out",
            str(there),
        ],
    )
    assert result.exit_code == 0, result.output
    assert f"--load {there} --ckpt-format torch --use-checkpoint-args" in result.stdout
    assert "--norm-epsilon 1e-06 --bf16" in result.stdout
    result = run.invoke(convert_app, ["from-megatron", str(there), "--out", str(back)])
    assert result.exit_code == 0, result.output
    assert "kv_heads: 8" in result.stdout
    assert isinstance(load(rank_file(there, 0))["args"], Namespace)


def test_values_that_fp16_cannot_hold(tmp_path) -> None:
    folder = write_random_checkpoint(tmp_path / "large", SHAPES["llama"], std=1e6)
    with pytest.raises(InputError, match="has values that fp16 cannot hold; choose --dtype bf16"):
        to_megatron(str(folder), tmp_path / "out", Target(1, "fp16"))
    assert not (tmp_path / "out").exists()
