"""Convert a checkpoint to Megatron-LM's format (--ckpt-format torch), split over tensor ranks."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from megaphase.checkpoint.parameters import WEIGHT
from megaphase.checkpoint.tensor_file import TensorKind
from megaphase.convert.megatron.arguments import expressed, megatron_args
from megaphase.convert.megatron.names import (
    RANK_FILE,
    RELEASE,
    TRACKER_FILE,
    Implementation,
    MegatronParameter,
    megatron_parameters,
    rank_folder,
)
from megaphase.convert.megatron.torch_file import TorchFileWriter
from megaphase.convert.output import new_folder
from megaphase.convert.partition import check_tensor_size
from megaphase.convert.qkv_order import interleaved
from megaphase.convert.source import Precision, open_source
from megaphase.convert.verification import verified_meanwhile
from megaphase.convert.weights import (
    Weights,
    WithZeroBiases,
    as_dtype,
    fp32_bytes,
    in_model_order,
    read_each,
)
from megaphase.model.shape import GPTShape
from megaphase.utils.files import atomic_write_text

_CHECKPOINT_VERSION = 3.0


@dataclass(frozen=True)
class Target:
    """The options of the Megatron-LM checkpoint.

    Attributes:
        tensor: its tensor-parallel size.
        dtype: of all weights; by default the run's, bf16 or fp32.
        implementation: the layers from which Megatron-LM builds the model.
        vocab_multiple: its --make-vocab-size-divisible-by.
    """

    tensor: int = 1
    dtype: Precision | None = None
    implementation: Implementation = Implementation.TRANSFORMER_ENGINE
    vocab_multiple: int = 128


def to_megatron(
    text: str,
    out: Path,
    target: Target,
    *,
    average: bool = False,
    workers: int = 1,
    console: Console | None = None,
) -> Namespace:
    """Write the weights of the checkpoint RUN@NAME, or at a path, into the folder `out`.

    average: write the average of the weights that the checkpoint holds.

    Returns the stored Megatron-LM arguments.

    Raises:
        InputError: the checkpoint is damaged, or its model cannot be split like this.
    """
    source = open_source(text, average=average)
    shape = expressed(source.shape.with_all_positions(), source.folder)
    weights = WithZeroBiases(source.weights, shape)
    check_tensor_size(shape, target.tensor)
    args = megatron_args(
        shape,
        tensor=target.tensor,
        vocab_multiple=target.vocab_multiple,
        dtype=source.dtype(target.dtype),
        implementation=target.implementation,
    )
    parameters = megatron_parameters(
        shape, target.tensor, args.padded_vocab_size, target.implementation
    )
    needed = args.params_dtype.itemsize * sum(
        target.tensor * each.layout.shard_numel(target.tensor) for each in parameters.values()
    )
    with new_folder(out, needed) as folder:
        with _rank_writers(folder / RELEASE, parameters, args) as writers:
            order = in_model_order(weights, (WEIGHT,))
            with verified_meanwhile(
                source, fp32_bytes(shape), order=order, workers=workers, console=console
            ) as advance:
                _write(weights, parameters, writers, args.params_dtype, shape, workers, advance)
            for writer in writers:
                writer.close()
        atomic_write_text(folder / TRACKER_FILE, RELEASE)
    return args


@contextmanager
def _rank_writers(
    folder: Path, parameters: Mapping[str, MegatronParameter], args: Namespace
) -> Iterator[list[TorchFileWriter]]:
    """Yield the writers of all tensor-parallel ranks' files; those not closed are abandoned."""
    size = args.tensor_model_parallel_size
    with ExitStack() as abandoned:
        writers = []
        for rank in range(size):
            model = {
                each.name: TensorKind(args.params_dtype, each.layout.shard_shape(size))
                for each in parameters.values()
            }
            content = {
                "args": args,
                "checkpoint_version": _CHECKPOINT_VERSION,
                "iteration": args.iteration,
                "model": model,
            }
            path = folder / rank_folder(rank) / RANK_FILE
            path.parent.mkdir(parents=True)
            writers.append(TorchFileWriter(path, content))
            abandoned.callback(writers[-1].abandon)
        yield writers


def _write(
    weights: Weights,
    parameters: Mapping[str, MegatronParameter],
    writers: Sequence[TorchFileWriter],
    dtype: torch.dtype,
    shape: GPTShape,
    workers: int,
    advance: Callable[[int], object],
) -> None:
    def write(name: str, kind: str, whole: Tensor) -> None:
        layout, foreign = parameters[name].layout, as_dtype(name, whole, dtype)
        if parameters[name].interleaved:
            foreign = interleaved(foreign, shape)

        def write_part(rank: int) -> None:
            part = layout.shard(foreign, rank, len(writers))
            if layout.padded_shape() != layout.shape:
                _fill_padding(part, foreign, rank)
            writers[rank].write(part)

        list(pool.map(write_part, range(len(writers))))
        advance(whole.nbytes)

    with ThreadPoolExecutor(workers, thread_name_prefix="writer") as pool:
        read_each(weights, in_model_order(weights, (WEIGHT,)), write, workers=workers)


def _fill_padding(part: Tensor, whole: Tensor, rank: int) -> None:
    """Fill the rows after the vocabulary with copies of its last row, as Megatron-LM's tools do.

    Zeros would give logits of 0, which may be larger than those of any token in a trained model.
    """
    first = len(whole) - rank * len(part)
    part[max(first, 0) :] = whole[-1]
