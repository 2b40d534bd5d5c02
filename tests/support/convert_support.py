"""Checkpoints written by engines of small models, and independent code that reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from safetensors.torch import load_file
from torch import Tensor

from megaphase.checkpoint.parameters import INDEX_FILE
from megaphase.checkpoint.saver import Saver
from megaphase.checkpoint.state import OPTIMIZER
from megaphase.checkpoint.store import CheckpointStore
from megaphase.config.run import RunConfig
from megaphase.convert.checkpoint_writer import portable_form, write_checkpoint
from megaphase.convert.weight_import import foreign_state
from megaphase.distributed.all_ranks import process_group
from megaphase.distributed.control_group import ControlGroup
from megaphase.distributed.initialization import Initializer
from megaphase.distributed.process_grid import start_process_grid
from megaphase.distributed.sharding import ParameterLayout
from megaphase.model.gpt import GPT
from megaphase.model.parameters import parameter_layouts
from megaphase.model.presets import build_shape
from megaphase.model.shape import GPTShape
from megaphase.training.engine import Engine


def save(
    engine: Engine, config: RunConfig, vocab: int, folder: Path, control_group: ControlGroup
) -> Path:
    """Save an engine's state as a run does; return the folder. Called by all ranks."""
    grid = engine.grid
    state = foreign_state(build_shape(config, vocab), {}) | {
        "optimizer_steps": engine.state.steps,
        OPTIMIZER: engine.state.stored_by,
        "processes": grid.world_size,
        "tensor": grid.tensor_size,
        "zero": config.parallel.zero,
        "precision": config.precision,
    }
    store = CheckpointStore(folder, control_group)
    saver = Saver(store, control_group, keep=1, asynchronous=False, say=lambda text: None)
    saver.save("step-00000001", engine.state.snapshot(), state, {})
    return folder / "step-00000001"


class RandomWeights:
    """Random values for every parameter of a shape, determined by its name and kind."""

    def __init__(
        self, shape: GPTShape, kinds: tuple[str, ...] = ("weight",), std: float = 0.2
    ) -> None:
        self.layouts: Mapping[str, ParameterLayout] = parameter_layouts(shape, 1)
        self.kinds = kinds
        self.std = std

    def whole(self, name: str, kind: str) -> Tensor:
        seed = crc32(f"{kind}/{name}".encode())
        values = torch.randn(
            self.layouts[name].shape, generator=torch.Generator().manual_seed(seed)
        )
        return values * self.std + (1.0 if "norm" in name and name.endswith("weight") else 0.0)


def write_random_checkpoint(
    folder: Path,
    shape: GPTShape,
    kinds: tuple[str, ...] = ("weight",),
    *,
    precision: str = "fp32",
    std: float = 0.2,
) -> Path:
    """Write a portable checkpoint with random values."""
    folder.mkdir(parents=True)
    weights = RandomWeights(shape, kinds, std)
    state = foreign_state(shape, {}) | {"precision": precision}
    write_checkpoint(folder, weights, kinds, portable_form(shape), state, workers=1)
    return folder


def stored_tensors(checkpoint: Path) -> dict[str, dict[str, Tensor]]:
    """Return every tensor but the random generators', as the safetensors package reads them."""
    files = json.loads((checkpoint / INDEX_FILE).read_text())["shards"]
    return {
        file: {
            name: tensor
            for name, tensor in load_file(checkpoint / file).items()
            if not name.startswith("random/")
        }
        for file in files
    }


def assert_same_shards(one: Path, other: Path) -> None:
    """Check that both have the same files with the same pieces, bit for bit."""
    indices = [json.loads((path / INDEX_FILE).read_text()) for path in (one, other)]
    for index in indices:
        for shard in index["shards"].values():
            shard["pieces"] = dict(sorted(shard["pieces"].items()))
    assert indices[0] == indices[1]
    left, right = stored_tensors(one), stored_tensors(other)
    assert left.keys() == right.keys()
    for file, tensors in left.items():
        assert tensors.keys() == right[file].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, right[file][name]), (file, name)


def whole_parameters(checkpoint: Path, kind: str = "weight") -> dict[str, Tensor]:
    """Return whole parameters, assembled according to docs/checkpoints.md; checks for overlaps."""
    index: dict[str, Any] = json.loads((checkpoint / INDEX_FILE).read_text())
    files = {file: load_file(checkpoint / file) for file in index["shards"]}
    return {
        name: _whole(index, files, f"{kind}/{name}", name, facts)
        for name, facts in index["parameters"].items()
    }


@torch.no_grad()
def megaphase_logits(checkpoint: Path, shape: GPTShape, tokens: Tensor) -> Tensor:
    """Return the logits of a checkpoint's weights: [batch, seq, vocab]."""
    with process_group():
        model = GPT(shape, Initializer(0, torch.float32), start_process_grid(1))
        weights = whole_parameters(checkpoint)
        parameters = dict(model.named_parameters())
        assert parameters.keys() == weights.keys()
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
        return model(tokens)


def _whole(
    index: Any, files: Mapping[str, Mapping[str, Tensor]], tensor: str, name: str, facts: Any
) -> Tensor:
    cuts = []
    for rank in range(index["tensor"] if facts["dim"] is not None else 1):
        runs = [
            (*shard["pieces"][name], files[file][tensor].reshape(-1))
            for file, shard in index["shards"].items()
            if shard["tensor_rank"] == rank and name in shard["pieces"]
        ]
        runs.sort(key=lambda run: run[0])
        end = 0
        for first, stop, values in runs:
            assert first == end
            assert len(values) == stop - first
            end = stop
        shape = list(facts["shape"])
        if facts["dim"] is not None:
            shape[facts["dim"]] = sum(facts["segments"]) // index["tensor"]
        cuts.append(torch.cat([values for _, _, values in runs]).view(shape))
    dim, columns, done = facts["dim"], [], 0
    if dim is None:
        return cuts[0]
    for segment in facts["segments"]:
        size = segment // len(cuts)
        columns += [cut.narrow(dim, done, size) for cut in cuts]
        done += size
    return torch.cat(columns, dim).narrow(dim, 0, facts["shape"][dim])
