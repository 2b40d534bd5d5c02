"""Read the `torch` format of Megatron-LM: a file for every tensor-parallel rank of a stage."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from megaphase.checkpoint.tensor_file import TensorKind
from megaphase.convert.megatron.files import OTHER_CHECKPOINT, RankFile, rank_files
from megaphase.convert.megatron.names import (
    OUTPUT_LAYER,
    WORD_EMBEDDINGS,
    MegatronParameter,
    rank_folder,
)
from megaphase.convert.parameter_mapping import check_names
from megaphase.convert.safe_torch_load import check_archives
from megaphase.utils.errors import InputError

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


class TensorRanks:
    """The weights of all ranks; see `SavedModel`."""

    def __init__(self, folder: Path, *, trust_pickle: bool) -> None:
        """
        Args:
            folder: of an iteration.
            trust_pickle: see `load_pickle`.

        Raises:
            InputError: a file is missing or damaged, or they do not belong together.
        """
        self.folder = folder
        self._paths = rank_files(folder)
        files = [
            [RankFile(path, trust_pickle=trust_pickle) for path in stages] for stages in self._paths
        ]
        first = files[0][0]
        self.path, self.args, self.iteration = first.path, first.args, first.iteration
        self.tensor = len(files)
        self._check_together(files)
        self._ranks = [_joined_stages(stages) for stages in files]
        self.kinds: Mapping[str, TensorKind] = {
            name: TensorKind(tensor.dtype, tuple(tensor.shape))
            for name, (_, tensor) in self._ranks[0].items()
        }
        stages = "" if len(files[0]) == 1 else f" × pipeline {len(files[0])}"
        self.layout = f"tensor {self.tensor}{stages}; the tensors below are those of the first rank"

    def check(self, parameters: Collection[MegatronParameter]) -> None:
        """Compare names and shapes of every rank; see `SavedModel`."""
        wanted = {each.name: each.layout.shard_shape(self.tensor) for each in parameters}
        for rank, tensors in enumerate(self._ranks):
            paths = self._paths[rank]
            check_names(paths[0] if len(paths) == 1 else self._stages(rank), wanted, tensors)
            for name, shape in wanted.items():
                path, tensor = tensors[name]
                if tuple(tensor.shape) != shape:
                    raise InputError(
                        path,
                        f"{name} has the shape {list(tensor.shape)}, its args want {list(shape)}",
                        OTHER_CHECKPOINT,
                    )

    def read(self, parameter: MegatronParameter) -> Tensor:
        """Join the ranks' shards; see `SavedModel`."""
        shards = [tensors[parameter.name] for tensors in self._ranks]
        if parameter.layout.dim is None:
            for path, copy in shards[1:]:
                if not torch.equal(copy, shards[0][1]):
                    problem = f"{parameter.name} is not that of {shards[0][0].parent.name}"
                    raise InputError(path, problem, OTHER_CHECKPOINT)
        return parameter.layout.unshard((shard.float() for _, shard in shards), len(shards))

    def verify(self, console: Console | None) -> int:
        """Compare the checksums that torch has stored; see `SavedModel`."""
        paths = [path for stages in self._paths for path in stages]
        check_archives(paths, console)
        return len(paths)

    def _stages(self, rank: int) -> Path:
        return self.folder / f"{rank_folder(rank)}_*"

    def _check_together(self, files: Sequence[Sequence[RankFile]]) -> None:
        if (getattr(self.args, "expert_model_parallel_size", None) or 1) != 1:
            raise InputError(
                self.path, "is cut by expert parallelism", "only models without experts"
            )
        stage = None if self.path.parent.name == rank_folder(0) else 0
        ranks, wanted = len(files), _tensor_size(self.args)
        end = rank_folder(min(ranks, wanted or ranks), stage)
        self._check_count(ranks, wanted, "tensor-parallel ranks", end)
        stages, wanted = len(files[0]), getattr(self.args, "pipeline_model_parallel_size", None)
        end = rank_folder(0, min(stages, wanted or stages))
        self._check_count(stages, wanted, "pipeline stages", end)
        for file in (file for stage_files in files for file in stage_files):
            if file.iteration != self.iteration:
                raise InputError(
                    file.path,
                    f"is of iteration {file.iteration}, {self.path.parent.name} of "
                    f"{self.iteration}",
                    OTHER_CHECKPOINT,
                )
            if len(file.chunks) != len(files[0][0].chunks):
                raise InputError(
                    file.path,
                    f"has {len(file.chunks)} virtual stages, {self.path.parent.name} has "
                    f"{len(files[0][0].chunks)}",
                    OTHER_CHECKPOINT,
                )

    def _check_count(self, found: int, wanted: int | None, what: str, end: str) -> None:
        """end: the folder of the first that is missing or too many."""
        if wanted is not None and found != wanted:
            raise InputError(
                self.folder / end,
                "is missing" if wanted > found else "is one too many",
                f"{self.path} wants {wanted} {what}",
            )


def _joined_stages(stages: Sequence[RankFile]) -> dict[str, tuple[Path, Tensor]]:
    """The tensors of a tensor-parallel rank by their names in the whole model, with their files.

    The first chunks of all stages come first, then their second ones: Megatron-LM's order with
    virtual pipeline stages.
    """
    joined: dict[str, tuple[Path, Tensor]] = {}
    before = 0
    order = [(stage, chunk) for chunk in range(len(stages[0].chunks)) for stage in stages]
    for stage, chunk in order:
        layers = 0
        for name, tensor in stage.chunks[chunk].items():
            if match := _LAYER.match(name):
                layers = max(layers, int(match[1]) + 1)
                name = f"decoder.layers.{int(match[1]) + before}.{name[match.end() :]}"
            if name in joined:
                earlier = joined[name][0].parent.name
                raise InputError(stage.path, f"has {name}, as {earlier} has", OTHER_CHECKPOINT)
            joined[name] = stage.path, tensor
        before += layers
    if len(order) > 1 and not getattr(stages[0].args, "untie_embeddings_and_output_weights", False):
        _drop_copy(joined)
    return joined


def _drop_copy(joined: dict[str, tuple[Path, Tensor]]) -> None:
    """Drop the last stage's copy of the embedding, which a model with tied embeddings has."""
    if OUTPUT_LAYER not in joined or WORD_EMBEDDINGS not in joined:
        return
    path, copy = joined.pop(OUTPUT_LAYER)
    first, embedding = joined[WORD_EMBEDDINGS]
    if not torch.equal(copy, embedding):
        raise InputError(
            path,
            f"{OUTPUT_LAYER} is tied to the embedding, and is not that of {first.parent.name}",
            OTHER_CHECKPOINT,
        )


def _tensor_size(args: Namespace) -> int | None:
    earlier = getattr(args, "model_parallel_size", None)
    return getattr(args, "tensor_model_parallel_size", earlier)
