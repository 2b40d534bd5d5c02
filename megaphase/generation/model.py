"""Load the GPT of a checkpoint for generation and scoring, without an optimizer."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Literal

import torch
from torch import Tensor

from megaphase.checkpoint.parameters import WEIGHT
from megaphase.convert.source import Source
from megaphase.convert.verification import verified_meanwhile
from megaphase.convert.weights import in_model_order, read_each
from megaphase.distributed.initialization import Uninitialized
from megaphase.distributed.process_grid import ProcessGrid
from megaphase.distributed.sharding import layout_of
from megaphase.model.gpt import GPT

Precision = Literal["fp32", "bf16"]

_ALONE = ProcessGrid(1, 0, 1, None, None)  # type: ignore[arg-type]  # one process needs no groups
_READERS = 4


def load_model(
    source: Source,
    precision: Precision | None,
    *,
    verify: bool = True,
    grid: ProcessGrid = _ALONE,
) -> GPT:
    """Load the model, or this rank's shard of it, onto this process's GPU, or the CPU if there is
    none.

    Args:
        precision: precision of weights and activations; None: the run's.
        verify: also verify the hashes of all files.
        grid: of the processes that share the model; by default this one alone.

    Raises:
        InputError: a file is missing, truncated or altered.
    """
    dtype = source.dtype(precision)
    model = GPT(source.shape, Uninitialized(0, dtype), grid, compute_dtype=dtype)
    parameters = dict(model.named_parameters())
    order = in_model_order(source.weights, (WEIGHT,))

    def take(name: str, kind: str, whole: Tensor) -> None:
        parameter = parameters[name]
        shard = layout_of(parameter).shard(whole, grid.tensor_rank, grid.tensor_size)
        parameter.copy_(shard)

    with torch.no_grad(), ExitStack() as stack:
        if verify:
            stack.enter_context(
                verified_meanwhile(source, 0, order=order, workers=_READERS, console=None)
            )
        read_each(source.weights, order, take, workers=_READERS)
    return model.eval().requires_grad_(False)
