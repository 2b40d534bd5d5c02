"""Distributed checkpoints (torch_dist), written with torch.distributed.checkpoint under
megatron-core's names; test_megatron_layouts.py has those that megatron-core writes itself."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from convert_support import assert_same_shards
from megatron_files_support import SHAPES, change, load, rank_file, write_shapes
from pickle_support import Payload
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from megaphase.checkpoint.state import read_state
from megaphase.convert.inspect import Inspector, inspect
from megaphase.convert.megatron.from_megatron import from_megatron
from megaphase.convert.megatron.to_megatron import Target, to_megatron
from megaphase.utils.errors import InputError

WORDS = "embedding.word_embeddings.weight"
UP = "decoder.layers.mlp.linear_fc1.weight"
DOWN = "decoder.layers.mlp.linear_fc2.weight"
TRAINING = {
    "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight": torch.ones(2),
    "chained_0.optimizer.state.exp_avg.output_layer.weight": torch.ones(2),
}


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> dict[str, Path]:
    return write_shapes(tmp_path_factory.mktemp("native"))


def write(native: Path, folder: Path) -> Path:
    """Convert to the `torch` format, and write its tensors as a distributed checkpoint."""
    to_megatron(str(native), folder / "torch", Target(1, "fp32"))
    state = load(rank_file(folder / "torch", 0))
    saved = folder / "saved"
    dcp.save(stacked(state["model"]) | TRAINING, checkpoint_id=saved, no_dist=True)
    common = {"args": state["args"], "checkpoint_version": 3.0, "iteration": 12}
    torch.save(common, saved / "common.pt")
    (saved / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return saved


def stacked(model: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with all layers in one."""
    layers: dict[str, list[Tensor]] = {}
    for name, tensor in model.items():
        layers.setdefault(re.sub(r"layers\.\d+\.", "layers.", name), []).append(tensor)
    return {
        name: torch.stack(tensors) if ".layers." in name else tensors[0]
        for name, tensors in layers.items()
    }


def change_metadata(saved: Path, how: Callable[[Any], object]) -> None:
    path = saved / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    how(metadata)
    path.write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("name", SHAPES)
def test_tensors_are_those_of_the_torch_format(name, native, tmp_path) -> None:
    saved = write(native[name], tmp_path)
    from_megatron(saved, tmp_path / "back", workers=2)
    assert_same_shards(native[name], tmp_path / "back")
    assert read_state(tmp_path / "back")["origin"]["iteration"] == 12
    assert not list(tmp_path.glob(".*"))


def test_inspection(native, tmp_path) -> None:
    saved = write(native["llama"], tmp_path)
    found = inspect(str(saved), Inspector(True, False, 1, None))
    assert found.format == "Megatron-LM"
    assert found.facts["step"] == 12
    assert found.tensors["decoder.layers.1.mlp.linear_fc1.weight"].shape == (96, 32)
    assert not any("optimizer" in name for name in found.tensors)
    assert found.verified == "the checksums in 2 files of tensors are right"


def test_a_vocabulary_that_is_not_known(native, tmp_path) -> None:
    saved = write(native["llama"], tmp_path)
    change(saved / "common.pt", lambda state: delattr(state["args"], "vocab_size"))
    with pytest.raises(InputError, match=r"128 rows .* pass --vocab"):
        from_megatron(saved, tmp_path / "back")
    from_megatron(saved, tmp_path / "back", vocab=99)
    assert_same_shards(native["llama"], tmp_path / "back")


def test_trusted_pickles(native, tmp_path) -> None:
    saved, victim = write(native["llama"], tmp_path), tmp_path / "victim"
    change_metadata(saved, lambda metadata: setattr(metadata, "planner_data", Payload(victim)))
    with pytest.raises(InputError, match=r"\.metadata: wants to call posix.system.*--trust-pickle"):
        from_megatron(saved, tmp_path / "out")
    assert not victim.exists()
    from_megatron(saved, tmp_path / "out", trust_pickle=True)
    assert victim.exists()
    assert_same_shards(native["llama"], tmp_path / "out")


def flip_bit(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 4
    path.write_bytes(content)


def weight_byte(saved: Path) -> int:
    """Where the middle of the down-projections' chunk is in its file."""
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    (info,) = (info for index, info in metadata.storage_data.items() if index.fqn == DOWN)
    return int(info.offset + info.length // 2)


def halve(metadata: Any) -> None:
    (chunk,) = metadata.state_dict_metadata[DOWN].chunks
    metadata.state_dict_metadata[DOWN].chunks = [
        ChunkStorageMetadata(chunk.offsets, torch.Size((1, *chunk.sizes[1:])))
    ]


def twice(metadata: Any) -> None:
    """The second chunk is not where the first ends, and as large as what is left."""
    (chunk,) = metadata.state_dict_metadata[DOWN].chunks
    size = torch.Size((1, *chunk.sizes[1:]))
    place = metadata.storage_data[MetadataIndex(DOWN, chunk.offsets)]
    metadata.state_dict_metadata[DOWN].chunks = [
        ChunkStorageMetadata(torch.Size(offset), size) for offset in ((0, 0, 0), (0, 1, 0))
    ]
    metadata.storage_data[MetadataIndex(DOWN, (0, 1, 0))] = place


def same_place(metadata: Any) -> None:
    data = metadata.storage_data
    one, other = (next(i for i in data if i.fqn == name) for name in (UP, DOWN))
    data[one] = data[other]


def place_of(how: Callable[[Any], object]) -> Callable[[Path], object]:
    def change_place(metadata: Any) -> None:
        (info,) = (info for index, info in metadata.storage_data.items() if index.fqn == DOWN)
        how(info)

    return lambda saved: change_metadata(saved, change_place)


def describe(name: str, how: Callable[[Any], object]) -> Callable[[Path], object]:
    return lambda saved: change_metadata(
        saved, lambda metadata: how(metadata.state_dict_metadata[name])
    )


def set_args(**values: object) -> Callable[[Path], object]:
    return lambda saved: change(
        saved / "common.pt", lambda state: vars(state["args"]).update(values)
    )


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "not complete": (
        r"metadata\.json: is missing: the checkpoint is not complete.*--ckpt-format torch_dist",
        lambda saved: (saved / "metadata.json").unlink(),
    ),
    "format file": (
        r"metadata\.json: is damaged",
        lambda saved: (saved / "metadata.json").write_text("{"),
    ),
    "another format": (
        "names the format zarr, and only torch_dist",
        lambda saved: (saved / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"})),
    ),
    "no metadata": (r"\.metadata: is missing", lambda saved: (saved / ".metadata").unlink()),
    "no common": (r"common\.pt: is missing", lambda saved: (saved / "common.pt").unlink()),
    "no chunks": (
        r"__0_0\.distcp: is missing",
        lambda saved: (saved / "__0_0.distcp").unlink(),
    ),
    "truncated metadata": (
        r"\.metadata: is damaged",
        lambda saved: (saved / ".metadata").write_bytes((saved / ".metadata").read_bytes()[:700]),
    ),
    "other metadata": (
        r"\.metadata: is damaged",
        lambda saved: (saved / ".metadata").write_bytes(pickle.dumps({"a": 1})),
    ),
    "truncated common": (
        r"common\.pt: is damaged",
        lambda saved: (saved / "common.pt").write_bytes((saved / "common.pt").read_bytes()[:700]),
    ),
    "truncated chunks": (
        r"__0_0\.distcp: ends before byte \d+",
        lambda saved: (saved / "__0_0.distcp").write_bytes(
            (saved / "__0_0.distcp").read_bytes()[:9999]
        ),
    ),
    "flipped bit of a weight": (
        r"__0_0\.distcp: is damaged",
        lambda saved: flip_bit(saved / "__0_0.distcp", weight_byte(saved)),
    ),
    "flipped bit of the arguments": (
        r"common\.pt: is damaged",
        lambda saved: flip_bit(saved / "common.pt", (saved / "common.pt").stat().st_size // 2),
    ),
    "no args": (
        r"common\.pt: has no args",
        lambda saved: change(saved / "common.pt", lambda state: state.pop("args")),
    ),
    "argument": (r"common\.pt: squared_relu=True", set_args(squared_relu=True)),
    "other sizes": (
        rf"\.metadata: {re.escape(UP.replace('layers', 'layers.0'))} has the shape \[96, 32\], its"
        r" args want \[192, 32\]",
        set_args(ffn_hidden_size=96),
    ),
    "more layers": (
        r"\.metadata: has no tensor decoder\.layers\.2\.",
        set_args(num_layers=3),
    ),
    "missing tensor": (
        r"\.metadata: has no tensor decoder.layers.0.mlp.linear_fc2.weight",
        lambda saved: change_metadata(
            saved, lambda metadata: metadata.state_dict_metadata.pop(DOWN)
        ),
    ),
    "no embedding": (
        f"has no tensor {WORDS}",
        lambda saved: change_metadata(
            saved, lambda metadata: metadata.state_dict_metadata.pop(WORDS)
        ),
    ),
    "unknown tensor": (
        r"\.metadata: the model has no place for mtp\.weight",
        lambda saved: change_metadata(
            saved,
            lambda metadata: metadata.state_dict_metadata.update(
                {"mtp.weight": metadata.state_dict_metadata[WORDS]}
            ),
        ),
    ),
    "type": (
        f"{WORDS} is torch.int8, not a weight",
        describe(WORDS, lambda stored: setattr(stored.properties, "dtype", torch.int8)),
    ),
    "half of a tensor": (
        f"does not cover {DOWN} with chunks",
        lambda saved: change_metadata(saved, halve),
    ),
    "a part twice": (
        f"does not cover {DOWN} with chunks",
        lambda saved: change_metadata(saved, twice),
    ),
    "no place": (
        r"\.metadata: is damaged",
        lambda saved: change_metadata(saved, lambda metadata: metadata.storage_data.clear()),
    ),
    "the same place": (
        r"\.metadata: gives .* the same place",
        lambda saved: change_metadata(saved, same_place),
    ),
    "elsewhere": (
        r"\.metadata: names \.\./other, elsewhere",
        place_of(lambda info: setattr(info, "relative_path", "../other")),
    ),
    "compressed": (
        r"__0_0\.distcp: is compressed",
        place_of(lambda info: setattr(info, "transform_descriptors", ["stream.zstd"])),
    ),
    "another place": (
        r"__0_0\.distcp: is damaged",
        place_of(lambda info: setattr(info, "offset", info.offset - 8)),
    ),
    "payload": (
        r"common\.pt: wants to call posix.system.*--trust-pickle",
        lambda saved: change(
            saved / "common.pt", lambda state: state.update(x=Payload(Path("victim")))
        ),
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_nothing_is_left(kind, native, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    message, damage = DAMAGE[kind]
    damage(write(native["llama"], tmp_path))
    with pytest.raises(InputError, match=message):
        from_megatron(tmp_path / "saved", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved", "torch"]
