"""Computes two halves of a micro-batch in turns.

As in Domino (Wang et al. 2024, arXiv 2409.15241, section 3.2): rows do not depend on each other, so
while one half waits for a tensor-parallel collective, a layer is computed for the other half. The
layers do not know: only this module splits a block into steps between which the halves alternate.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from megaphase.distributed.costs import BackwardStage, Rank
from megaphase.distributed.linear import ColumnParallelLinear, RowParallelLinear
from megaphase.model.dropout import Dropout
from megaphase.model.forward_context import ForwardContext
from megaphase.model.norms import LayerNorm, RMSNorm

Steps = Generator[None, None, Tensor]
"""A computation in steps: a step ends where a collective has been started, or before one is."""


class Stages(NamedTuple):
    """The forward pass of a layer, row(inner(column(x))): its collectives are in column and row."""

    column: ColumnParallelLinear
    inner: Callable[[Tensor, ForwardContext], Tensor]
    row: RowParallelLinear


class ParallelLayer(Protocol):
    """A tensor-parallel layer: attention, feed-forward."""

    @property
    def stages(self) -> Stages: ...

    def __call__(self, x: Tensor, context: ForwardContext) -> Tensor: ...

    def backward_stages(self, rank: Rank) -> Sequence[BackwardStage]: ...


class ResidualBranch(NamedTuple):
    """A residual branch of a block: x + dropout(post_norm(layer(norm(x)))), without the norms that
    are None."""

    norm: RMSNorm | LayerNorm | None
    layer: ParallelLayer
    post_norm: RMSNorm | LayerNorm | None
    dropout: Dropout

    def enter(self, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + added, and the layer's input."""
        if self.norm is not None:
            normed: tuple[Tensor, Tensor] = self.norm(x, added)
            return normed
        total = x if added is None else x + added
        return total, total

    def leave(self, output: Tensor, context: ForwardContext) -> Tensor:
        """The summand of the residual stream, from the layer's output."""
        if self.post_norm is not None:
            _, output = self.post_norm(output)
        return self.dropout(output, context.dropout_seeds)


def branch_steps(
    branches: Sequence[ResidualBranch], x: Tensor, context: ForwardContext, parallel: bool
) -> Steps:
    """`Block.add_branches` in steps."""
    outputs: list[Tensor] = []
    for branch in branches:
        x, entering = branch.enter(x, outputs.pop() if outputs and not parallel else None)
        column, inner, row = branch.layer.stages
        gathered = column.start(entering)
        yield
        activations = inner(gathered(), context)
        yield
        summed = row.start(activations)
        yield
        outputs.append(branch.leave(summed(), context))
    return sum(outputs, x)


def interleave(computations: Sequence[Steps]) -> tuple[Tensor, ...]:
    """The results of computations, one step of each in turn; all have the same number of steps.

    The first is one step ahead: the collective that it starts at the end of a step is on its way
    while the others compute their next one, and the other way round.
    """
    results: dict[int, Tensor] = {}

    def advance(number: int) -> None:
        try:
            next(computations[number])
        except StopIteration as end:
            results[number] = end.value

    if len(computations) > 1:
        advance(0)
    while len(results) < len(computations):
        for number in range(len(computations)):
            if number not in results:
                advance(number)
    return tuple(results[number] for number in range(len(computations)))
