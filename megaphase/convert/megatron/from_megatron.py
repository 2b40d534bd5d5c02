"""Convert a Megatron-LM checkpoint (--ckpt-format torch) to one from which a run can start."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from megaphase.checkpoint.parameters import WEIGHT
from megaphase.convert.megatron.arguments import shape_of, stored_vocab
from megaphase.convert.megatron.files import OTHER_CHECKPOINT, RankFile, rank_files
from megaphase.convert.megatron.names import (
    WORD_EMBEDDINGS,
    Implementation,
    deinterleaved,
    megatron_parameters,
    rank_folder,
)
from megaphase.convert.output import new_folder
from megaphase.convert.parameter_mapping import check_names
from megaphase.convert.safe_torch_load import check_archives
from megaphase.convert.weight_import import write_foreign, write_model_section
from megaphase.convert.weights import fp32_bytes
from megaphase.model.parameters import parameter_layouts
from megaphase.utils.errors import InputError
from megaphase.utils.files import real_path


def from_megatron(
    source: Path,
    out: Path,
    *,
    vocab: int | None = None,
    trust_pickle: bool = False,
    workers: int = 1,
    console: Console | None = None,
) -> str:
    """Write the weights of a Megatron-LM checkpoint into the folder `out`, with model.yaml.

    Args:
        source: the folder of --save, or a folder iter_… or release in it.
        vocab: the tokenizer's size, if it is not in the checkpoint.
        trust_pickle: see `load_pickle`.

    Returns the run file's section for the model, YAML.

    Raises:
        InputError: names what is missing, damaged, unknown, or not supported.
    """
    files = rank_files(source)
    ranks = [RankFile(path, trust_pickle=trust_pickle) for path in files]
    weights = MegatronWeights(ranks, vocab)
    origin = {
        "format": "Megatron-LM",
        "path": str(real_path(source)),
        "iteration": ranks[0].iteration,
    }
    with new_folder(out, fp32_bytes(weights.shape)) as folder:
        check_archives(files, console)
        write_foreign(folder, weights, weights.shape, origin, workers=workers, console=console)
        return write_model_section(folder, weights.shape)


class MegatronWeights:
    """The weights of all tensor-parallel ranks, joined, in Megaphase's order.

    Attributes:
        shape: of the model.
        layouts, kinds: see `Weights`.
    """

    kinds = (WEIGHT,)

    def __init__(self, ranks: Sequence[RankFile], vocab: int | None) -> None:
        """
        Args:
            ranks: in order.
                vocab: the tokenizer's size, if it is not in their args.

            Raises:
                InputError: they do not belong together, or the model is not supported.
        """
        self._ranks = ranks
        first, size = ranks[0], len(ranks)
        _check_together(ranks)
        if WORD_EMBEDDINGS not in first.tensors:
            raise InputError(first.path, f"has no tensor {WORD_EMBEDDINGS}", OTHER_CHECKPOINT)
        padded = len(first.tensors[WORD_EMBEDDINGS]) * size
        vocab = stored_vocab(first.args, padded, first.path) if vocab is None else vocab
        if not 0 < vocab <= padded:
            raise InputError(
                f"--vocab {vocab}",
                f"the embedding in {first.path} has {padded} rows",
                "give the tokenizer's size",
            )
        self.shape = shape_of(first.args, vocab, first.path)
        self.layouts = parameter_layouts(self.shape, 1)
        self._parameters = megatron_parameters(
            self.shape, size, padded, _implementation(first.tensors)
        )
        for rank in ranks:
            self._check_tensors(rank)

    def whole(self, name: str, kind: str) -> Tensor:
        """Return a parameter, fp32, contiguous, in its layout's shape."""
        parameter = self._parameters[name]
        parts = [rank.tensors[parameter.name] for rank in self._ranks]
        if parameter.layout.dim is None:
            self._check_same(parameter.name)
        joined = parameter.layout.unshard((part.float() for part in parts), len(parts))
        return deinterleaved(joined, self.shape) if parameter.interleaved else joined.contiguous()

    def _check_tensors(self, rank: RankFile) -> None:
        size = len(self._ranks)
        wanted = {each.name: each.layout.shard_shape(size) for each in self._parameters.values()}
        check_names(rank.path, wanted, rank.tensors)
        for name, shape in wanted.items():
            found = tuple(rank.tensors[name].shape)
            if found != shape:
                raise InputError(
                    rank.path,
                    f"{name} has the shape {list(found)}, its args want {list(shape)}",
                    OTHER_CHECKPOINT,
                )

    def _check_same(self, name: str) -> None:
        """Reject ranks with different copies of tensors that are not split."""
        first, *others = self._ranks
        for rank in others:
            if not torch.equal(rank.tensors[name], first.tensors[name]):
                raise InputError(
                    rank.path, f"{name} is not that of {rank_folder(0)}", OTHER_CHECKPOINT
                )


def _check_together(ranks: Sequence[RankFile]) -> None:
    first = ranks[0]
    size = _tensor_parallel_size(first.args)
    if size is not None and size != len(ranks):
        folder = first.path.parents[1]
        missing = size > len(ranks)
        raise InputError(
            folder / rank_folder(min(size, len(ranks))),
            "is missing" if missing else "is one too many",
            f"{first.path} wants {size} tensor-parallel ranks",
        )
    for rank in ranks:
        if rank.iteration != first.iteration:
            raise InputError(
                rank.path,
                f"is of iteration {rank.iteration}, {rank_folder(0)} of {first.iteration}",
                OTHER_CHECKPOINT,
            )


def _tensor_parallel_size(args: Namespace) -> int | None:
    earlier = getattr(args, "model_parallel_size", None)
    return getattr(args, "tensor_model_parallel_size", earlier)


def _implementation(names: Iterable[str]) -> Implementation:
    fused = any(name.endswith(".linear_qkv.layer_norm_weight") for name in names)
    return Implementation.TRANSFORMER_ENGINE if fused else Implementation.LOCAL
