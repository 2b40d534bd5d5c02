"""`megaphase convert inspect`: every format is recognised, and damage is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from convert_support import write_random_checkpoint
from typer.testing import CliRunner

from megaphase.checkpoint.parameters import MOMENTS, WEIGHT
from megaphase.cli import app
from megaphase.convert.partition import Layout
from megaphase.convert.reshape import reshape
from megaphase.convert.source import open_source
from megaphase.model.parameters import parameter_count
from megaphase.model.shape import GPTShape
from megaphase.utils.errors import InputError

SHAPE = GPTShape(vocab=50, seq_len=8, layers=3, hidden=16, heads=4, kv_heads=2, ffn=24)
LAYOUT = Layout(tensor=2, data=3, zero=1)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Make a checkpoint of random weights and moments for six processes."""
    whole = write_random_checkpoint(tmp_path / "portable", SHAPE, (WEIGHT, *MOMENTS))
    reshape(str(whole), tmp_path / "six", LAYOUT, weights_only=False, workers=1)
    return tmp_path / "six"


def inspected(*arguments: object) -> str:
    """Return the command's output; its errors are raised."""
    found = CliRunner().invoke(
        app, ["convert", "inspect", *map(str, arguments)], env={"COLUMNS": "200"}
    )
    if found.exception is not None:
        raise found.exception
    return found.stdout


def as_json(*arguments: object) -> dict:
    return json.loads(inspected(*arguments, "--json"))


def test_a_checkpoint_of_ours(checkpoint: Path) -> None:
    found = as_json(checkpoint)
    assert found["format"] == "megaphase"
    assert found["layout"] == "tensor 2 × data 3, ZeRO 1"
    assert found["parameters"] == parameter_count(SHAPE)
    assert found["tensors"]["blocks.2.attention.qkv.weight"] == {"dtype": "fp32", "shape": [32, 16]}
    assert found["kinds"] == "weight, exp_avg, exp_avg_sq"
    assert (found["step"], found["tokens"], found["optimizer steps"]) == (0, 0, 0)
    assert found["verified"] == "all 8 files are as they were written"
    assert found["bytes"] == sum(path.stat().st_size for path in checkpoint.iterdir())
    assert as_json(checkpoint, "--no-verify")["verified"] is None
    assert as_json(checkpoint.parent / "portable")["layout"] == "portable, a file a parameter"


def test_blocks_are_one_line(checkpoint: Path) -> None:
    lines = inspected(checkpoint).splitlines()
    assert sum("blocks." in line for line in lines) == 6
    (line,) = (line for line in lines if "feed_forward.up" in line)
    assert line.split() == ["│", "blocks.0…2.feed_forward.up.weight", "│", "48", "×", "16", "│",
                            "fp32", "│"]  # fmt: skip


def test_damage_is_found_unless_it_is_not_looked_for(checkpoint: Path) -> None:
    shard = checkpoint / "shard-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match=r"shard-00003\.safetensors: has been altered"):
        inspected(checkpoint)
    assert "tensor 2 × data 3" in inspected(checkpoint, "--no-verify")


def test_models_of_hugging_face(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=24,
        vocab_size=30,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    found = as_json(tmp_path / "hf")
    assert found["format"] == "Hugging Face"
    assert found["architecture"] == "LlamaForCausalLM"
    assert found["parameters"] == sum(each.numel() for each in model.parameters())
    assert found["tensors"]["model.layers.1.mlp.up_proj.weight"] == {
        "dtype": "bf16", "shape": [24, 16],
    }  # fmt: skip
    assert found["verified"] is None


def test_checkpoints_of_megatron(checkpoint: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app,
        ["convert", "to-megatron", str(checkpoint), "--tensor", "2", "--out", str(tmp_path / "m")],
    )
    assert result.exception is None
    found = as_json(tmp_path / "m")
    assert found["format"] == "Megatron-LM"
    assert found["layout"].startswith("tensor 2;")
    assert found["tensors"]["decoder.layers.2.mlp.linear_fc1.weight"]["shape"] == [24, 16]
    assert found["verified"] == "the checksums in 2 files of tensors are right"
    (file,) = (tmp_path / "m").glob("*/mp_rank_01/model_optim_rng.pt")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"mp_rank_01/model_optim_rng\.pt: is"):
        inspected(tmp_path / "m")


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (["zero_pp_rank_{}_mp_rank_{:02d}_model_states.pt",
          "bf16_zero_pp_rank_{}_mp_rank_{:02d}_optim_states.pt"], "tensor 2 × data 3, ZeRO 3"),
        (["mp_rank_{1:02d}_model_states.pt", "zero_pp_rank_{}_mp_rank_{:02d}_optim_states.pt"],
         "tensor 2 × data 3, ZeRO 1 or 2"),
        (["mp_rank_{1:02d}_model_states.pt"], "tensor 2 × data 1, ZeRO 0"),
    ],
)  # fmt: skip
def test_checkpoints_of_deepspeed_by_their_names(names, layout, tmp_path: Path) -> None:
    folder = tmp_path / "saved" / "global_step7"
    folder.mkdir(parents=True)
    for name in names:
        for data in range(3):
            for tensor in range(2):
                (folder / name.format(data, tensor)).touch()
    (tmp_path / "saved" / "latest").write_text("global_step7")
    for path in (folder, tmp_path / "saved"):
        found = as_json(path)
        assert (found["format"], found["layout"]) == ("DeepSpeed", layout)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README").touch()
    for path in (tmp_path, tmp_path / "README", tmp_path / "nowhere"):
        with pytest.raises(InputError, match="is no checkpoint of megaphase, Hugging Face"):
            inspected(path)


def test_types_of_tensors_that_only_others_have(tmp_path: Path) -> None:
    import safetensors.torch

    tensors = {
        "a": torch.zeros(4, dtype=torch.float8_e4m3fn),
        "b": torch.zeros(2, dtype=torch.int8),
    }
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    found = as_json(tmp_path / "model.safetensors")
    assert found["tensors"]["a"]["shape"] == [4]
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "other.safetensors").write_bytes(content.replace(b"F8_E4M3", b"F8_E8M0"))
    with pytest.raises(InputError, match=r"other\.safetensors: a has the type F8_E8M0, which"):
        inspected(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("config", "said"),
    [("{broken", "is not a JSON object"), ("[1]", "is not a JSON object"),
     ('{"architectures": 5}', None), ('{"architectures": [null, "A"]}', None)],
)  # fmt: skip
def test_a_damaged_config_of_hugging_face(config: str, said: str | None, tmp_path: Path) -> None:
    import safetensors.torch

    folder = tmp_path / "a@b" / "model"
    folder.mkdir(parents=True)
    safetensors.torch.save_file({"a": torch.zeros(4)}, folder / "model.safetensors")
    (folder / "config.json").write_text(config)
    if said is None:
        assert as_json(folder)["format"] == "Hugging Face"
        return
    with pytest.raises(InputError, match=said):
        inspected(folder)


def test_a_checkpoint_in_a_store(checkpoint: Path) -> None:
    place = checkpoint.parent / "run" / "checkpoints" / "step-00000001"
    place.parent.mkdir(parents=True)
    checkpoint.rename(place)
    found = as_json(f"file://{place}")
    assert found["parameters"] == parameter_count(SHAPE)


@pytest.mark.parametrize(
    ("old", "new"),
    [('"embedding.weight"', '"embedding.weigh"'), ('"tensor": 2', '"tensor": "2"'),
     ('"tensor": 2', '"tensor": 0')],
)  # fmt: skip
def test_an_altered_index_is_named(old: str, new: str, checkpoint: Path) -> None:
    index = checkpoint / "parameters.json"
    text = index.read_text()
    assert old in text
    index.write_text(text.replace(old, new))
    with pytest.raises(InputError, match=rf"{index}: "):
        open_source(str(checkpoint))
