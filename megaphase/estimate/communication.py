"""The bytes that one rank sends, and how long that takes with NCCL's rings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from megaphase.distributed.costs import Collective, CollectiveKind, CostedLayer, layers_of
from megaphase.distributed.linear import ColumnParallelLinear, RowParallelLinear
from megaphase.distributed.parameter_spec import spec_of
from megaphase.estimate.gathered_parameters import gathering, reduce_bucket
from megaphase.estimate.hardware import Hardware
from megaphase.estimate.setup import Setup
from megaphase.estimate.state_memory import REDUCE_BUCKET
from megaphase.model.parameters import declared_block, declared_model, parameter_sizes

# Of a link's line rate, what a ring of large messages gets: NCCL's maintainers give 370 of NVLink's
# 450 GB/s (github.com/NVIDIA/nccl-tests/issues/212), and 4 nodes of 8 x 400 Gbit/s have been seen
# at 320 of 400 GB/s (github.com/NVIDIA/nccl/issues/1221).
LINK_EFFICIENCY = 0.8
# Of a ring with NCCL's protocol for large messages: a collective, a step over NVLink, a step
# between nodes (`baseLat` and `hwLat` in NCCL's src/graph/tuning.cc).
START_SECONDS, NODE_STEP_SECONDS, NETWORK_STEP_SECONDS = 8.4e-6, 3.4e-6, 14e-6
# Rounds of a ring.
ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = 2, 1, 1
ROUNDS = {
    CollectiveKind.ALL_REDUCE: ALL_REDUCE,
    CollectiveKind.ALL_GATHER: ALL_GATHER,
    CollectiveKind.REDUCE_SCATTER: REDUCE_SCATTER,
}


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends, and seconds that it waits for them.

    `behind` accounts for communication that overlaps with computation.

    secondary: of the bytes, those to the ranks with which it shares a second partition of the
    weights
    """

    sent: float = 0.0
    seconds: float = 0.0
    secondary: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.sent + other.sent,
            self.seconds + other.seconds,
            self.secondary + other.secondary,
        )

    def __mul__(self, times: float) -> Traffic:
        return Traffic(self.sent * times, self.seconds * times, self.secondary * times)

    def behind(self, computing: float, pieces: int | None = None) -> Traffic:
        """The same while a rank computes for some seconds.

        pieces: of which the first or the last one is waited for in any case.
        """
        least = self.seconds / pieces if pieces else 0.0
        return replace(self, seconds=max(self.seconds - computing, least))


@dataclass(frozen=True)
class Ring:
    """A group of `size` ranks, `in_node` of them on every node that it spans."""

    size: int
    in_node: int
    hardware: Hardware

    @property
    def nodes(self) -> int:
        return math.ceil(self.size / self.in_node)

    @property
    def bandwidth(self) -> float:
        """Bytes/s that each rank sends: across nodes, all its ranks on a node share their links."""
        link = self.hardware.node_link
        if self.nodes > 1:
            link = min(link, self.in_node * self.hardware.network)
        return link * LINK_EFFICIENCY

    def collective(self, rounds: int, size: float) -> Traffic:
        """Of `size` bytes in all, as the rank has them that has all."""
        if self.size == 1:
            return Traffic()
        sent = rounds * (self.size - 1) / self.size * size
        steps, across = rounds * (self.size - 1), rounds * (self.nodes - 1)
        latency = (steps - across) * NODE_STEP_SECONDS + across * NETWORK_STEP_SECONDS
        return Traffic(sent, START_SECONDS + latency + sent / self.bandwidth)

    def split_collective(self, rounds: int, size: float, pieces: int) -> Traffic:
        """The same bytes in equal pieces."""
        return self.collective(rounds, size / pieces) * pieces


def tensor_ring(setup: Setup, hardware: Hardware) -> Ring:
    """Tensor-parallel ranks are neighbours; see `distributed.process_grid`."""
    return Ring(setup.tensor, min(setup.tensor, hardware.gpus_per_node), hardware)


def data_ring(setup: Setup, hardware: Hardware) -> Ring:
    """Data-parallel neighbours are `tensor` ranks apart."""
    in_node = max(1, hardware.gpus_per_node // setup.tensor)
    return Ring(setup.data, min(setup.data, in_node), hardware)


def secondary_ring(setup: Setup, hardware: Hardware) -> Ring:
    """Consecutive ranks share a second partition of the weights."""
    assert setup.secondary is not None
    return Ring(setup.secondary, min(setup.secondary, hardware.gpus_per_node), hardware)


def tensor_forward(setup: Setup, hardware: Hardware) -> Traffic:
    """Tensor-parallel collectives of a forward pass."""
    ring, model = tensor_ring(setup, hardware), declared_model(setup.shape)
    traffic = _blocks_forward(setup, hardware)
    for layer in (model.embedding, model.head):
        traffic += _traffic(ring, layer.forward_collectives(setup))
    return traffic + _traffic(ring, model.head.loss_collectives(setup))


def tensor_backward(setup: Setup, hardware: Hardware) -> Traffic:
    """Tensor-parallel collectives of a backward pass, with those of recomputation.

    Each is the transpose of one of the forward pass, and with sequence parallelism the input of the
    column-parallel layers is gathered again. The collectives of these layers run behind their own
    products: the gathering behind the gradient of the input, the summing behind that of the weight
    (`distributed.linear`). The gathering that is the transpose of a sum runs, where halves are
    computed in turn, behind the column-parallel layers of the other half.
    """
    ring, model = tensor_ring(setup, hardware), declared_model(setup.shape)
    columns, rows = _linear_layers(setup)
    gathered = [_traffic(ring, each.backward_collectives(setup), setup.halves) for each in rows]
    block = _interleaved(setup, hardware, gathered, columns, passes=2)
    for layer in columns:
        computing = _product_seconds(setup, hardware, [layer])
        again = _traffic(ring, layer.forward_collectives(setup), setup.halves)
        summed = _traffic(ring, layer.backward_collectives(setup), setup.halves)
        block += again.behind(computing) + summed.behind(computing)
    outside = Traffic()
    for outer in (model.embedding, model.head):
        outside += _traffic(ring, outer.backward_collectives(setup))
    for other in _other_layers(setup):
        block += _traffic(ring, other.backward_collectives(setup), setup.halves)
    traffic = block * setup.shape.layers + outside
    if setup.sequence:
        # Gradients of replicated parameters, of which each rank has seen its own positions.
        in_block = list(declared_block(setup.shape).parameters())
        traffic += _replicated(ring, in_block, setup) * setup.shape.layers
        traffic += _replicated(ring, list(model.norm.parameters()), setup)
        if model.positions is not None:
            traffic += _replicated(ring, [model.positions], setup)
    if setup.shape.activation_checkpointing == "full":
        # torch recomputes a block up to the last tensor that its backward pass needs: without
        # dropout that comes before the last sum of the last half.
        last = 1.0 if setup.shape.dropout else 1 - 1 / setup.halves
        traffic += _blocks_forward(setup, hardware, last)
    return traffic


def _blocks_forward(setup: Setup, hardware: Hardware, last: float = 1.0) -> Traffic:
    """The collectives of one half run behind the next product of the other, see
    `model.interleave`.

    last: the share of a block's last sum that is sent.
    """
    ring = tensor_ring(setup, hardware)
    columns, rows = _linear_layers(setup)
    gathered, summed = (
        [_traffic(ring, layer.forward_collectives(setup), setup.halves) for layer in layers]
        for layers in (columns, rows)
    )
    summed[-1] *= last
    block = _interleaved(setup, hardware, gathered, rows)
    block += _interleaved(setup, hardware, summed, columns)
    for other in _other_layers(setup):
        block += _traffic(ring, other.forward_collectives(setup), setup.halves)
    return block * setup.shape.layers


def _linear_layers(setup: Setup) -> tuple[list[ColumnParallelLinear], list[RowParallelLinear]]:
    """The linear layers of a block that enter a tensor-parallel region, and those that leave it."""
    layers = [branch.layer.stages for branch in declared_block(setup.shape).branches]
    return [each.column for each in layers], [each.row for each in layers]


def _other_layers(setup: Setup) -> list[CostedLayer]:
    """The layers of a block whose collectives nothing hides."""
    linear = (ColumnParallelLinear, RowParallelLinear)
    return [e for e in layers_of(declared_block(setup.shape)) if not isinstance(e, linear)]


def _interleaved(
    setup: Setup,
    hardware: Hardware,
    collectives: Sequence[Traffic],
    products: Sequence[ColumnParallelLinear] | Sequence[RowParallelLinear],
    passes: int = 1,
) -> Traffic:
    """Collectives of a block, behind the products of some layers where halves take turns.

    That of one half at a block's edge is waited for in any case.
    """
    traffic = sum(collectives, Traffic())
    if setup.halves == 1:
        return traffic
    computing = passes * _product_seconds(setup, hardware, products)
    return traffic.behind(computing, pieces=setup.halves * len(products))


def _product_seconds(
    setup: Setup,
    hardware: Hardware,
    layers: Sequence[ColumnParallelLinear] | Sequence[RowParallelLinear],
) -> float:
    return hardware.matrix_seconds(sum(layer.forward_work(setup).matrices for layer in layers))


def _traffic(ring: Ring, collectives: Sequence[Collective], pieces: int = 1) -> Traffic:
    """pieces: equal ones, in which the bytes of each collective are sent."""
    each = (ring.split_collective(ROUNDS[c.kind], c.size, pieces) for c in collectives)
    return sum(each, Traffic())


def _replicated(ring: Ring, parameters: Sequence[nn.Parameter], setup: Setup) -> Traffic:
    """The sum of the gradients of those that are replicated, in one collective."""
    specs = map(spec_of, parameters)
    elements = sum(spec.numel for spec in specs if spec.dim is None)
    return ring.collective(ALL_REDUCE, elements * setup.parameter_bytes)


@dataclass(frozen=True)
class DataTraffic:
    """Data-parallel communication by the time at which it happens: see `training.deepspeed_config`.

    forward, backward: in that pass of every micro-batch, while it computes
    first_forward: in that of the first micro-batch, where it is another
    end: once a step, when nothing is computed
    pieces: number of messages into which the communication during a pass is divided
    """

    forward: Traffic = Traffic()
    backward: Traffic = Traffic()
    first_forward: Traffic | None = None
    end: Traffic = Traffic()
    pieces: int = 1

    def step(self, accumulation: int, in_forward: float = 0.0, in_backward: float = 0.0) -> Traffic:
        """Of a whole step, while each pass of a micro-batch computes for some seconds."""
        first = (self.first_forward or self.forward).behind(in_forward, self.pieces)
        forward = self.forward.behind(in_forward, self.pieces)
        backward = self.backward.behind(in_backward, self.pieces)
        return first + forward * (accumulation - 1) + backward * accumulation + self.end


def data_traffic(setup: Setup, hardware: Hardware) -> DataTraffic:
    """The communication of ZeRO's stages as implemented in DeepSpeed 0.19.8.

    0: gradients, all-reduced in fp32 after the last micro-batch. 1: in the type of the parameters,
    and the new weights gathered. 2: all-reduced, too, and not scattered (`allreduce_and_scatter` in
    stage_1_and_2.py), but in every micro-batch. 3: weights gathered block by block, in both passes
    or, near the loss, in the forward pass alone, and gradients scattered; those weights that are
    kept are gathered once, when the optimizer has changed them (`estimate.gathered_parameters`).
    With a second partition, every weight that is not kept is gathered from all ranks in the first
    forward pass, and otherwise from those of the second partition.
    """
    ring = data_ring(setup, hardware)
    sizes = parameter_sizes(setup.shape, setup.tensor)
    parameters = sum(sizes.values())
    size = parameters * setup.parameter_bytes
    if setup.zero == 3:
        return _partitioned_weights(setup, hardware, sizes)
    buckets = math.ceil(parameters / (reduce_bucket(sizes) if setup.zero == 2 else REDUCE_BUCKET))
    reduced = ring.split_collective(ALL_REDUCE, size, buckets)
    if setup.zero == 0:
        return DataTraffic(end=reduced)
    weights = ring.collective(ALL_GATHER, size)
    if setup.zero == 1:
        return DataTraffic(end=reduced + weights)
    return DataTraffic(backward=reduced, end=weights, pieces=buckets)


def _partitioned_weights(setup: Setup, hardware: Hardware, sizes: Mapping[str, int]) -> DataTraffic:
    """Stage 3."""
    ring = data_ring(setup, hardware)
    found = gathering(sizes, setup.keep_gathered)
    passes = found.passes
    parameters, each = sum(sizes.values()), setup.parameter_bytes
    pieces = setup.shape.layers + 2  # embedding and head

    def in_pieces(rounds: int, elements: int, ring: Ring = ring) -> Traffic:
        """As many pieces as their share of the weights has."""
        count = math.ceil(pieces * elements / parameters)
        return ring.split_collective(rounds, elements * each, count) if count else Traffic()

    def gathered_again(elements: int) -> Traffic:
        if setup.secondary is None:
            return in_pieces(ALL_GATHER, elements)
        traffic = in_pieces(ALL_GATHER, elements, secondary_ring(setup, hardware))
        return replace(traffic, secondary=traffic.sent)

    first = None
    if setup.secondary is not None:
        used = parameters - found.kept
        first = in_pieces(ALL_GATHER, used) + gathered_again(passes.forward - used)
    scattered = in_pieces(REDUCE_SCATTER, parameters)
    return DataTraffic(
        forward=gathered_again(passes.forward),
        backward=gathered_again(passes.backward) + scattered,
        first_forward=first,
        end=in_pieces(ALL_GATHER, found.kept),
        pieces=pieces,
    )
