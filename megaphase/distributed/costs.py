"""The costs of a layer on one rank, which every layer declares beside its formula.

The estimates of memory and step time sum these costs over the layers of a model that is declared
without memory (`model.parameters.declared_model`). Such a model has one tensor-parallel rank; the
costs are those of one of `rank.tensor`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from torch import nn

FP32_BYTES = 4
BF16_BYTES = 2
# A backward pass has two products, of inputs and of weights, for each one of the forward pass.
BACKWARD_PRODUCTS = 2


class Rank(Protocol):
    """The part of `estimate.setup.Setup` that the costs of a layer depend on."""

    @property
    def tensor(self) -> int: ...
    @property
    def sequence(self) -> bool: ...
    @property
    def masked(self) -> bool: ...
    @property
    def seq_len(self) -> int: ...
    @property
    def compiled(self) -> bool: ...
    @property
    def widened(self) -> bool: ...
    @property
    def bf16(self) -> bool: ...
    @property
    def compute_bytes(self) -> int: ...
    @property
    def parameter_bytes(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def outer_tokens(self) -> int: ...
    @property
    def halves(self) -> int: ...
    @property
    def device(self) -> str: ...


@dataclass(frozen=True)
class Work:
    """FLOPs of matrix products and of attention, and bytes of all that is neither.

    Bytes are those of fused kernels, which read every input once and write every output once;
    matrix products and attention are counted by their operations alone.
    """

    matrices: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.matrices + other.matrices,
            self.attention + other.attention,
            self.elementwise + other.elementwise,
        )

    def __mul__(self, times: float) -> Work:
        return Work(self.matrices * times, self.attention * times, self.elementwise * times)


@dataclass(frozen=True)
class BackwardStage:
    """A stage of a layer's backward pass.

    Attributes:
        transient: bytes that exist during it, beside the saved activations.
        released: bytes of the saved activations that are freed at its end.
    """

    transient: int
    released: int = 0


class CollectiveKind(StrEnum):
    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"


@dataclass(frozen=True)
class Collective:
    """One of the tensor-parallel group. size: bytes of the whole tensor, not of a rank's shard."""

    kind: CollectiveKind
    size: int


class CostedLayer(nn.Module):
    """A layer that declares its costs, without those of its inner layers, which declare their
    own."""

    def flops_per_token(self, seq_len: int) -> int:
        """FLOPs of a forward pass of the whole layer, with attention to all `seq_len` tokens."""
        return 0

    def forward_work(self, rank: Rank) -> Work:
        return Work()

    def backward_work(self, rank: Rank) -> Work:
        """Without the operations that it recomputes."""
        return Work()

    def recomputed_work(self, rank: Rank) -> Work:
        """The part of the forward pass that the backward pass repeats, if recomputation is
        selective."""
        return Work()

    def saved(self, rank: Rank) -> Mapping[str, int]:
        """Bytes that autograd saves until the backward pass, by tensor."""
        return {}

    def backward_stages(self, rank: Rank) -> Sequence[BackwardStage]:
        """With those of its inner layers, in the order of the backward pass."""
        return ()

    def forward_collectives(self, rank: Rank) -> Sequence[Collective]:
        return ()

    def backward_collectives(self, rank: Rank) -> Sequence[Collective]:
        """Without those that gather an input again."""
        return ()


def layers_of(module: nn.Module) -> Iterator[CostedLayer]:
    """A module's layers with those inside of them."""
    return (each for each in module.modules() if isinstance(each, CostedLayer))


def forward_work(module: nn.Module, rank: Rank) -> Work:
    """The forward pass of a module with all its layers."""
    return sum((layer.forward_work(rank) for layer in layers_of(module)), Work())


def backward_work(module: nn.Module, rank: Rank) -> Work:
    """The backward pass of a module with all its layers."""
    return sum((layer.backward_work(rank) for layer in layers_of(module)), Work())


def recomputed_work(module: nn.Module, rank: Rank) -> Work:
    """Selective recomputation in a module with all its layers."""
    return sum((layer.recomputed_work(rank) for layer in layers_of(module)), Work())


def saved_bytes(module: nn.Module, rank: Rank) -> int:
    """Bytes that autograd saves of a module with all its layers."""
    return sum(sum(layer.saved(rank).values()) for layer in layers_of(module))


def residual_bytes(rank: Rank, hidden: int) -> int:
    """Bytes of one tensor of the residual stream."""
    return rank.outer_tokens * hidden * rank.compute_bytes


def region_bytes(rank: Rank, hidden: int) -> int:
    """Bytes of one tensor of the residual stream inside of a tensor-parallel region."""
    return rank.tokens * hidden * rank.compute_bytes


def output_gradient_bytes(rank: Rank, hidden: int) -> int:
    """Bytes of the gradient of a tensor-parallel layer's output in its backward pass.

    With sequence parallelism it is gathered, and otherwise it is that of the residual stream.
    """
    gathered = region_bytes(rank, hidden) if rank.sequence else 0
    return residual_bytes(rank, hidden) + gathered


def enter_collectives(rank: Rank, hidden: int) -> tuple[Collective, ...]:
    """Collectives with which a forward pass enters a tensor-parallel region, and a backward pass
    leaves it."""
    if not rank.sequence:
        return ()
    return (Collective(CollectiveKind.ALL_GATHER, region_bytes(rank, hidden)),)


def leave_collectives(rank: Rank, hidden: int) -> tuple[Collective, ...]:
    """Collectives with which a forward pass leaves a tensor-parallel region, and a backward pass
    enters it."""
    kind = CollectiveKind.REDUCE_SCATTER if rank.sequence else CollectiveKind.ALL_REDUCE
    return (Collective(kind, region_bytes(rank, hidden)),)
