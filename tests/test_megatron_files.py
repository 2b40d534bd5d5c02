"""Megatron-LM's files without Megatron-LM: there and back bit for bit, and what is refused."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_support import assert_same_shards, whole_parameters, write_random_checkpoint
from test_pickles import Payload
from typer.testing import CliRunner

from megaphase.checkpoint.store import read_state
from megaphase.convert.commands import convert_app
from megaphase.convert.from_megatron import from_megatron
from megaphase.convert.megatron import Implementation
from megaphase.convert.source import open_source
from megaphase.convert.to_megatron import Target, to_megatron
from megaphase.errors import InputError
from megaphase.model.shape import GPTShape

LLAMA = GPTShape(vocab=99, seq_len=24, layers=2, hidden=32, heads=8, kv_heads=4, ffn=48)
GPT2 = replace(
    LLAMA,
    norm="layernorm",
    position="learned",
    activation="gelu",
    bias=True,
    kv_heads=8,
    tied_embeddings=True,
    norm_eps=1e-6,
)
SHAPES = {"llama": replace(LLAMA, rotary_base=12345.5), "gpt": GPT2}
NAMES = list(Implementation)
QKV = "decoder.layers.1.self_attention.linear_qkv.weight"


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("ours")
    return {name: write_random_checkpoint(folder / name, shape) for name, shape in SHAPES.items()}


@pytest.fixture
def saved(ours, tmp_path) -> Path:
    """A checkpoint of Megatron-LM, of two ranks."""
    out = tmp_path / "megatron"
    to_megatron(str(ours["llama"]), out, Target(2, "fp32", Implementation.LOCAL))
    return out


def rank_file(saved: Path, rank: int) -> Path:
    return saved / "release" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def change(path: Path, how: Callable[[Any], object]) -> None:
    state = load(path)
    how(state)
    torch.save(state, path)


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_there_and_back_is_bit_equal(name, size, implementation, ours, tmp_path) -> None:
    to_megatron(
        str(ours[name]), tmp_path / "there", Target(size, "fp32", implementation), workers=2
    )
    section = from_megatron(tmp_path / "there", tmp_path / "back", workers=2)
    assert_same_shards(ours[name], tmp_path / "back")
    assert open_source(str(tmp_path / "back")).shape == SHAPES[name]
    assert (tmp_path / "back" / "model.yaml").read_text() == section
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_precision(dtype, ours, tmp_path) -> None:
    to_megatron(str(ours["llama"]), tmp_path / "there", Target(2, dtype))
    state = load(rank_file(tmp_path / "there", 1))
    kept = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert {tensor.dtype for tensor in state["model"].values()} == {kept}
    assert (state["args"].bf16, state["args"].fp16) == (dtype == "bf16", dtype == "fp16")
    from_megatron(tmp_path / "there", tmp_path / "back")
    whole = open_source(str(tmp_path / "back")).weights.whole
    before = open_source(str(ours["llama"])).weights.whole
    for name in open_source(str(ours["llama"])).weights.layouts:
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
    """Megatron-LM's is ours only where it adds a bias."""
    checkpoint = write_random_checkpoint(tmp_path / "ours", replace(GPT2, bias=False))
    to_megatron(str(checkpoint), tmp_path / "there", Target(2, "fp32"))
    from_megatron(tmp_path / "there", tmp_path / "back")
    source = open_source(str(tmp_path / "back"))
    assert source.shape == GPT2
    for name, tensor in whole_parameters(checkpoint).items():
        assert torch.equal(source.weights.whole(name, "weight"), tensor)
    for name in source.weights.layouts.keys() - whole_parameters(checkpoint).keys():
        assert not source.weights.whole(name, "weight").any()


def test_a_tensor_parallel_size_that_does_not_fit(ours, tmp_path) -> None:
    with pytest.raises(InputError, match="--tensor 8: does not divide the model's kv_heads, 4"):
        to_megatron(str(ours["llama"]), tmp_path / "out", Target(8))
    assert not list(tmp_path.iterdir())


def test_an_iteration_of_a_run(saved, tmp_path) -> None:
    """With what else a rank saves, half of it of no use here."""
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


def legacy_model(state: Any) -> None:
    """The names from before Megatron Core."""
    model = state["model"]
    embedding = {"word_embeddings": {"weight": model["embedding.word_embeddings.weight"]}}
    if "embedding.position_embeddings.weight" in model:
        positions = model["embedding.position_embeddings.weight"]
        embedding["position_embeddings"] = {"weight": positions}
    inside = {
        "self_attention.linear_qkv": "self_attention.query_key_value",
        "self_attention.linear_proj": "self_attention.dense",
        "mlp.linear_fc1": "mlp.dense_h_to_4h",
        "mlp.linear_fc2": "mlp.dense_4h_to_h",
        "pre_mlp_layernorm": "post_attention_layernorm",
    }
    encoder = {}
    for name, tensor in model.items():
        if name.startswith("decoder."):
            for new, old in inside.items():
                name = name.replace(new, old)
            encoder[name.removeprefix("decoder.")] = tensor
    whole = {"embedding": embedding, "encoder": encoder}
    if "output_layer.weight" in model:
        whole["output_layer"] = {"weight": model["output_layer.weight"]}
    state["model"] = {"language_model": whole}


@pytest.mark.parametrize("name", SHAPES)
def test_models_from_before_megatron_core(name, ours, tmp_path) -> None:
    to_megatron(str(ours[name]), tmp_path / "there", Target(2, "fp32", Implementation.LOCAL))
    for rank in range(2):
        change(rank_file(tmp_path / "there", rank), legacy_model)
    from_megatron(tmp_path / "there", tmp_path / "back")
    assert_same_shards(ours[name], tmp_path / "back")


@pytest.mark.parametrize(
    ("options", "vocab"),
    [
        ({"vocab_size": 99}, None),
        ({"vocab_size": None}, 99),
        ({"vocab_size": 98, "tokenizer_type": "NullTokenizer"}, None),
        ({"vocab_size": 50}, 99),
    ],
)
def test_the_vocabulary(saved, ours, tmp_path, options, vocab) -> None:
    for rank in range(2):
        change(rank_file(saved, rank), lambda state: vars(state["args"]).update(options))
    from_megatron(saved, tmp_path / "out", vocab=vocab)
    assert_same_shards(ours["llama"], tmp_path / "out")


def test_a_vocabulary_that_is_not_known(saved, tmp_path) -> None:
    change(rank_file(saved, 0), lambda state: delattr(state["args"], "vocab_size"))
    with pytest.raises(InputError, match=r"256 rows .* pass --vocab"):
        from_megatron(saved, tmp_path / "out")
    with pytest.raises(InputError, match="--vocab 300"):
        from_megatron(saved, tmp_path / "out", vocab=300)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rotary_percent", 0.5),
        ("rotary_interleaved", True),
        ("rotary_seq_len_interpolation_factor", 4),
        ("use_rope_scaling", True),
        ("position_embedding_type", "yarn"),
        ("normalization", "L2Norm"),
        ("apply_layernorm_1p", True),
        ("qk_layernorm", True),
        ("multi_latent_attention", True),
        ("squared_relu", True),
        ("add_qkv_bias", True),
        ("num_experts", 8),
        ("mtp_num_layers", 1),
        ("window_size", (128, 0)),
        ("kv_channels", 8),
        ("num_query_groups", 3),
        ("num_attention_heads", 7),
        ("num_layers", None),
        ("ffn_hidden_size", "wide"),
        ("norm_epsilon", -1.0),
        ("pipeline_model_parallel_size", 2),
        ("swiglu", False),
    ],
)
def test_options_that_ours_has_not(saved, tmp_path, name, value) -> None:
    for rank in range(2):
        change(rank_file(saved, rank), lambda state: setattr(state["args"], name, value))
    at_fault = "add_bias_linear" if name == "swiglu" else name
    with pytest.raises(InputError, match=rf"model_optim_rng\.pt: {at_fault}="):
        from_megatron(saved, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]


def test_exact_gelu_is_refused(ours, tmp_path) -> None:
    to_megatron(str(ours["gpt"]), tmp_path / "there", Target())
    change(
        rank_file(tmp_path / "there", 0),
        lambda state: setattr(state["args"], "bias_gelu_fusion", False),
    )
    with pytest.raises(InputError, match=r"bias_gelu_fusion=False.*tanh"):
        from_megatron(tmp_path / "there", tmp_path / "out")


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
    "stages": (
        "pipeline or expert",
        lambda saved: shutil.move(rank_file(saved, 1).parent, saved / "release" / "mp_rank_00_001"),
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


def test_distributed_checkpoints_are_refused_by_their_name(tmp_path) -> None:
    folder = tmp_path / "iter_0000010"
    folder.mkdir()
    (folder / "metadata.json").write_text("{}")
    with pytest.raises(InputError, match=r"torch_dist.*--ckpt-convert-format torch"):
        from_megatron(folder, tmp_path / "out")


def test_trusted_pickles(saved, ours, tmp_path) -> None:
    victim = tmp_path / "victim"
    change(rank_file(saved, 1), lambda state: state.update(x=Payload(victim)))
    from_megatron(saved, tmp_path / "out", trust_pickle=True)
    assert victim.exists()
    assert_same_shards(ours["llama"], tmp_path / "out")


def test_commands(ours, tmp_path) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    run = CliRunner()
    result = run.invoke(
        convert_app,
        ["to-megatron", str(ours["gpt"]), "--tensor", "2", "--dtype", "bf16", "--out", str(there)],
    )
    assert result.exit_code == 0, result.output
    assert f"--load {there} --ckpt-format torch --use-checkpoint-args" in result.stdout
    assert "--norm-epsilon 1e-06 --bf16" in result.stdout
    result = run.invoke(convert_app, ["from-megatron", str(there), "--out", str(back)])
    assert result.exit_code == 0, result.output
    assert "kv_heads: 8" in result.stdout
    assert isinstance(load(rank_file(there, 0))["args"], Namespace)
