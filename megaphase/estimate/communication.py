"""What one rank sends, and how long that takes: NCCL's rings, over the links that they cross."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megaphase.estimate.flops import NORMS
from megaphase.estimate.gathered_parameters import gathering
from megaphase.estimate.hardware import Hardware
from megaphase.estimate.setup import FP32_BYTES, Setup
from megaphase.estimate.state_memory import REDUCE_BUCKET
from megaphase.model.parameters import block_sizes, parameter_sizes

# Of a link's line rate, what a ring of large messages gets: NCCL's maintainers give 370 of NVLink's
# 450 GB/s (github.com/NVIDIA/nccl-tests/issues/212), and 4 nodes of 8 x 400 Gbit/s have been seen
# at 320 of 400 GB/s (github.com/NVIDIA/nccl/issues/1221).
LINK_EFFICIENCY = 0.8
# Of a ring with NCCL's protocol for large messages: a collective, a step over NVLink, a step
# between nodes (`baseLat` and `hwLat` in NCCL's src/graph/tuning.cc).
START_SECONDS, NODE_STEP_SECONDS, NETWORK_STEP_SECONDS = 8.4e-6, 3.4e-6, 14e-6
# Rounds of a ring.
ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = 2, 1, 1
# Projections into the tensor-parallel regions of a block, and out of them.
COLUMN_PARALLEL = ("attention.qkv.weight", "feed_forward.up.weight")
ROW_PARALLEL = ("attention.out.weight", "feed_forward.down.weight")
# Of the cross entropy, fp32: the largest logit; the sum of exponentials and the target's logit.
LOSS_VALUES = (1, 2)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends, and seconds that it waits for them.

    Those that go on behind a computation are the less waited for: `behind`.
    """

    sent: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.sent + other.sent, self.seconds + other.seconds)

    def __mul__(self, times: float) -> Traffic:
        return Traffic(self.sent * times, self.seconds * times)

    def behind(self, computing: float, pieces: int | None = None) -> Traffic:
        """The same while a rank computes for some seconds.

        pieces: of which the first or the last one is waited for in any case.
        """
        least = self.seconds / pieces if pieces else 0.0
        return Traffic(self.sent, max(self.seconds - computing, least))


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
    """Data-parallel ranks stand `tensor` ranks apart."""
    in_node = max(1, hardware.gpus_per_node // setup.tensor)
    return Ring(setup.data, min(setup.data, in_node), hardware)


def tensor_forward(setup: Setup, hardware: Hardware) -> Traffic:
    """Tensor-parallel collectives of a forward pass."""
    ring = tensor_ring(setup, hardware)
    loss = Traffic()
    for values in LOSS_VALUES:
        loss += ring.collective(ALL_REDUCE, setup.tokens * values * FP32_BYTES)
    into, out_of = _into_region(setup, ring), _out_of_region(setup, ring)
    return _blocks_forward(setup, hardware) + out_of + into + loss  # embedding, head


def tensor_backward(setup: Setup, hardware: Hardware) -> Traffic:
    """Those of a backward pass, with those of what it computes again.

    Each is the transpose of one of the forward pass, and with sequence parallelism the input of the
    projections into a region is gathered again. These projections' collectives go on behind their
    own products: the gathering behind the gradient of the input, the summing behind that of the
    weight (`distributed.linear`). The gathering that is the transpose of a sum goes on, where
    halves are computed in turn, behind the other half's projections into a region.
    """
    ring = tensor_ring(setup, hardware)
    gathered, summed = (each(setup, ring, setup.halves) for each in (_into_region, _out_of_region))
    block = _interleaved(setup, hardware, gathered, COLUMN_PARALLEL, passes=2)
    for name in COLUMN_PARALLEL:
        computing = _product_seconds(setup, hardware, [name])
        block += gathered.behind(computing) + summed.behind(computing)
    outside = _into_region(setup, ring) + _out_of_region(setup, ring)  # embedding, head
    traffic = block * setup.shape.layers + outside
    if setup.sequence:
        # Gradients of the norms' weights, of which each rank has seen its own positions.
        norm = setup.shape.hidden * setup.parameter_bytes
        traffic += ring.collective(ALL_REDUCE, NORMS * norm) * setup.shape.layers
        traffic += ring.collective(ALL_REDUCE, norm)
    if setup.shape.activation_checkpointing == "full":
        traffic += _blocks_forward(setup, hardware)
    return traffic


def _blocks_forward(setup: Setup, hardware: Hardware) -> Traffic:
    """What one half sends goes on behind the next product of the other, see `model.interleave`."""
    ring = tensor_ring(setup, hardware)
    gathered, summed = (each(setup, ring, setup.halves) for each in (_into_region, _out_of_region))
    block = _interleaved(setup, hardware, gathered, ROW_PARALLEL)
    block += _interleaved(setup, hardware, summed, COLUMN_PARALLEL)
    return block * setup.shape.layers


def _interleaved(
    setup: Setup, hardware: Hardware, each: Traffic, products: Sequence[str], passes: int = 1
) -> Traffic:
    """One collective for every region of a block, behind some products where halves take turns.

    That of one half at a block's edge is waited for in any case.
    """
    traffic = each * len(products)
    if setup.halves == 1:
        return traffic
    computing = passes * _product_seconds(setup, hardware, products)
    return traffic.behind(computing, pieces=setup.halves * len(products))


def _product_seconds(setup: Setup, hardware: Hardware, names: Sequence[str]) -> float:
    sizes = block_sizes(setup.shape, setup.tensor)
    return hardware.matrix_seconds(2 * setup.tokens * sum(sizes[name] for name in names))


def _into_region(setup: Setup, ring: Ring, pieces: int = 1) -> Traffic:
    """What `parallel.region.TensorRegion` sends on the way in."""
    if not setup.sequence:
        return Traffic()
    return ring.split_collective(ALL_GATHER, _whole(setup), pieces)


def _out_of_region(setup: Setup, ring: Ring, pieces: int = 1) -> Traffic:
    rounds = REDUCE_SCATTER if setup.sequence else ALL_REDUCE
    return ring.split_collective(rounds, _whole(setup), pieces)


def _whole(setup: Setup) -> int:
    """Bytes of one tensor of the residual stream inside of a region."""
    return setup.tokens * setup.shape.hidden * setup.compute_bytes


@dataclass(frozen=True)
class DataTraffic:
    """What data-parallel ranks send to each other, by when: see `training.deepspeed_config`.

    forward, backward: in that pass of every micro-batch, while it computes
    end: once a step, when nothing is computed
    pieces: of what goes along with a pass, one after the other
    """

    forward: Traffic = Traffic()
    backward: Traffic = Traffic()
    end: Traffic = Traffic()
    pieces: int = 1


def data_traffic(setup: Setup, hardware: Hardware) -> DataTraffic:
    """What ZeRO's stages send, as DeepSpeed 0.19.8 does it.

    0: gradients, all-reduced in fp32 after the last micro-batch. 1: in the type of the parameters,
    and the new weights gathered. 2: all-reduced, too, and not scattered (`allreduce_and_scatter` in
    stage_1_and_2.py), but in every micro-batch. 3: weights gathered block by block, in both passes
    or, near the loss, in the forward pass alone, and gradients scattered; those weights that are
    kept are gathered once, when the optimizer has changed them (`memory.gathered`).
    """
    ring = data_ring(setup, hardware)
    sizes = parameter_sizes(setup.shape, setup.tensor)
    parameters = sum(sizes.values())
    size = parameters * setup.parameter_bytes
    if setup.zero == 3:
        return _partitioned_weights(setup, ring, sizes)
    buckets = math.ceil(parameters / REDUCE_BUCKET)
    reduced = ring.split_collective(ALL_REDUCE, size, buckets)
    if setup.zero == 0:
        return DataTraffic(end=reduced)
    weights = ring.collective(ALL_GATHER, size)
    if setup.zero == 1:
        return DataTraffic(end=reduced + weights)
    return DataTraffic(backward=reduced, end=weights, pieces=buckets)


def _partitioned_weights(setup: Setup, ring: Ring, sizes: Mapping[str, int]) -> DataTraffic:
    """Stage 3."""
    found = gathering(sizes, setup.keep_gathered)
    parameters, each = sum(sizes.values()), setup.parameter_bytes
    pieces = setup.shape.layers + 2  # embedding and head

    def in_pieces(rounds: int, elements: int) -> Traffic:
        """As many pieces as their share of the weights has."""
        count = math.ceil(pieces * elements / parameters)
        return ring.split_collective(rounds, elements * each, count) if count else Traffic()

    return DataTraffic(
        forward=in_pieces(ALL_GATHER, found.reused + found.twice),
        backward=in_pieces(ALL_GATHER, found.twice) + in_pieces(REDUCE_SCATTER, parameters),
        end=in_pieces(ALL_GATHER, found.kept),
        pieces=pieces,
    )
