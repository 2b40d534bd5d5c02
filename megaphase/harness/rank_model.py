"""The GPT of a rank, as scoring and generation call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaphase.distributed.process_grid import ProcessGrid, device
from megaphase.model.gpt import GPT
from megaphase.model.shape import GPTShape


class RankModel:
    """Calls a GPT whose data-parallel ranks have different work.

    Where weights are partitioned over data-parallel ranks (ZeRO-3), every forward pass gathers them
    from all ranks, so that all must compute as many; a rank that has no more work joins the others
    with a single token.

    Attributes:
        shape, compute_dtype, tensor_size: of the GPT. device: where it computes.
    """

    def __init__(
        self,
        gpt: GPT,
        grid: ProcessGrid,
        forward: Callable[..., Any] | None = None,
        *,
        partitioned: bool = False,
    ) -> None:
        """
        Args:
            forward: calls the GPT; by default the GPT itself.
            partitioned: whether every forward pass needs all data-parallel ranks.
        """
        self.grid = grid
        self.shape: GPTShape = gpt.shape
        self.compute_dtype, self.tensor_size = gpt.compute_dtype, gpt.tensor_size
        self.device = device()  # the weights may be offloaded
        self._forward = gpt if forward is None else forward
        self._partitioned = partitioned and grid.data_size > 1

    @property
    def waits_for_others(self) -> bool:
        """Whether a forward pass of this rank waits for other ranks in its middle."""
        return self._partitioned or self.tensor_size > 1

    def __call__(self, tokens: Tensor, *arguments: Any, **options: Any) -> Any:
        """`GPT.forward`."""
        if self._partitioned:
            self._any_has_work(True)
        return self._forward(tokens, *arguments, **options)

    def join_others(self) -> None:
        """Take part in the forward passes of the ranks that still have work."""
        while self._partitioned and self._any_has_work(False):
            with torch.inference_mode():
                self._forward(torch.zeros(1, 1, dtype=torch.int64, device=self.device))

    def _any_has_work(self, own: bool) -> bool:
        found = torch.tensor(int(own), device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.grid.data_group)
        return bool(found.item())
