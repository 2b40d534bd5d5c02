"""A checkpoint is verified while it is converted: whatever its files' order, every damage is found,
and no shard is read a second time for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from convert_support import RandomWeights, assert_same_shards, write_random_checkpoint
from safetensors import safe_open

from megaphase.checkpoint.parameters import MOMENTS, WEIGHT
from megaphase.checkpoint.state import MANIFEST_FILE
from megaphase.convert import verification
from megaphase.convert.average import average
from megaphase.convert.checkpoint_writer import form_for, write_checkpoint
from megaphase.convert.hugging_face.to_hf import to_hf
from megaphase.convert.partition import Layout
from megaphase.convert.reshape import reshape
from megaphase.convert.source import open_source
from megaphase.convert.weight_import import foreign_state
from megaphase.generation.model import load_model
from megaphase.model.shape import GPTShape
from megaphase.utils.errors import InputError

KINDS = (WEIGHT, *MOMENTS)
SHAPE = GPTShape(vocab=51, seq_len=8, layers=2, hidden=64, heads=4, kv_heads=4, ffn=96)
LAYOUTS = [Layout(1, 2, 3), Layout(2, 2, 1)]
FORMS = {
    "portable": None,
    "by-name": LAYOUTS[0],
    "by-kind": LAYOUTS[0],
    "tensor-by-kind": LAYOUTS[1],
}


def write(folder: Path, form: str) -> Path:
    """Write a checkpoint of random values; by kind: in the order of the trainer's files."""
    layout = FORMS[form]
    if layout is None:
        return write_random_checkpoint(folder, SHAPE, KINDS)
    folder.mkdir()
    weights = RandomWeights(SHAPE, KINDS)
    order = [(name, kind) for name in weights.layouts for kind in KINDS]
    if form.endswith("by-kind"):
        order = [(name, kind) for kind in KINDS for name in weights.layouts]
    state = foreign_state(SHAPE, {}) | {"precision": "fp32"}
    form_of = form_for(SHAPE, layout)
    write_checkpoint(folder, weights, KINDS, form_of, state, order=order, workers=1)
    return folder


def convert_to_layout(source: Path, out: Path) -> object:
    return reshape(str(source), out, LAYOUTS[1], weights_only=False, workers=3)


def convert_to_portable(source: Path, out: Path) -> object:
    return reshape(str(source), out, None, weights_only=True, workers=3)


def export(source: Path, out: Path) -> object:
    return to_hf(
        str(source), out, precision=None, tokenizer=None, no_tokenizer=True,
        max_shard_bytes=1 << 30, workers=3,
    )  # fmt: skip


def average_with_another(source: Path, out: Path) -> object:
    other = source.parent / "other"
    if not other.exists():
        write_random_checkpoint(other, SHAPE)
    return average([str(source), str(other)], None, out, workers=3)


def load(source: Path, out: Path) -> object:
    return load_model(open_source(str(source)), "fp32")


Conversion = Callable[[Path, Path], object]
CONVERSIONS = [convert_to_layout, convert_to_portable, export, average_with_another, load]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("convert", CONVERSIONS)
def test_every_damage_is_found(convert: Conversion, form: str, tmp_path: Path) -> None:
    source, out = write(tmp_path / "source", form), tmp_path / "out"
    files = json.loads((source / MANIFEST_FILE).read_text())["files"]
    shards = sorted(file for file in files if file.endswith(".safetensors"))
    for file in {shards[0], shards[len(shards) // 2], shards[-1]}:
        path = source / file
        content = path.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        for place in (header, (header + len(content)) // 2, len(content) - 1):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(InputError, match=f"{file}: has been altered"):
                convert(source, out)
            assert not out.exists()
        path.write_bytes(content)
    convert(source, out)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("convert", CONVERSIONS)
def test_shards_are_hashed_while_they_are_read(
    convert: Conversion, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "source", form)
    again: list[str] = []

    def noted(path: Path, described: dict[str, Any], advance: Any) -> None:
        again.append(path.name)

    monkeypatch.setattr(verification, "file_damage", noted)
    convert(source, tmp_path / "out")
    assert set(again) == {"state.json", "parameters.json"}


@pytest.mark.parametrize("form", FORMS)
def test_tensors_follow_in_the_order_in_which_they_are_read(form: str, tmp_path: Path) -> None:
    """Kind by kind from the trainer's files, otherwise parameter by parameter; the same values."""
    source = write(tmp_path / "source", form)
    reshape(str(source), tmp_path / "out", LAYOUTS[1], weights_only=False, workers=2)
    reshape(
        str(write(tmp_path / "plain", "portable")), tmp_path / "expected", LAYOUTS[1],
        weights_only=False, workers=1,
    )  # fmt: skip
    assert_same_shards(tmp_path / "out", tmp_path / "expected")
    with safe_open(tmp_path / "out" / "shard-00000.safetensors", "pt") as file:
        kinds = [name.partition("/")[0] for name in file.offset_keys()]
    changes = sum(one != other for one, other in pairwise(kinds))
    assert changes == (2 if form.endswith("by-kind") else len(kinds) - 1)
