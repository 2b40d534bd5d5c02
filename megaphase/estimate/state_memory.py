"""Memory of DeepSpeed for weights, gradients and moments on one rank, by ZeRO stage.

Read off DeepSpeed 0.19.8 under the settings of `training.deepspeed_config`. The bucket sizes are
its defaults; tests compare them, and all sizes here, with those of engines that are really built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megaphase.distributed.costs import FP32_BYTES
from megaphase.estimate.gathered_parameters import (
    block_bucket,
    gathering,
    kept_gathered,
    reduce_bucket,
)
from megaphase.estimate.setup import Setup
from megaphase.model.parameters import embedding_name, parameter_sizes, parameter_specs
from megaphase.optim.parameter_state import Group, groups_of, state_of

# Elements. The first is that of gradients without ZeRO, and in bf16 with stage 1; for those of the
# other stages see `gathered_parameters.reduce_bucket`.
REDUCE_BUCKET = 500_000_000
SUB_GROUP = 1_000_000_000
# For parameters on an NVMe disk: the four matrices of a block and of the one that is read ahead,
# embeddings and output projection, and some that are on their way.
SWAP_BUFFERS = 16
FLAT_ALIGNMENT = 2
# Of the largest matrix, in Muon: what is sent, received, joined, the result, and three products.
COPIES_OF_MATRIX = 7


@dataclass(frozen=True)
class Resident:
    """Bytes on one rank, from one optimizer step to the next."""

    weights: int
    masters: int
    gradients: int
    moments: int


@dataclass(frozen=True)
class Transient:
    """Bytes on one rank that are allocated and freed within a step, beside the resident ones.

    carried:   gradients of earlier micro-batches, while a later one is computed
    growing:   gradients of the micro-batch in work once the backward pass is through, if none had
               been reduced
    limit:     the most of `growing` that waits before it is reduced
    bucket:    buffers for communication during the backward pass
    between:   of those, what stays from one micro-batch to the next
    reduction: while gradients are reduced, beside those that wait
    step:      in the optimizer step
    held:      whole weights that ZeRO-3 keeps gathered from one micro-batch to the next
    gathered:  whole weights that it has gathered, at the loss; with those that it keeps
    arriving:  whole weights beyond these, in the forward pass
    passing:   whole weights of the block in work and of the next, in the backward pass
    returned:  whole weights still there at the end of the backward pass
    secondary: second partition of the weights, from the first forward pass of a step (of the run,
               from its start) to the end of the optimizer step
    """

    carried: int = 0
    growing: int = 0
    limit: int = 0
    bucket: int = 0
    between: int = 0
    reduction: int = 0
    step: int = 0
    held: int = 0
    gathered: int = 0
    arriving: int = 0
    passing: int = 0
    returned: int = 0
    secondary: int = 0


@dataclass(frozen=True)
class States:
    resident: Resident
    transient: Transient = field(default_factory=Transient)


def average_bytes(setup: Setup, resident: Resident) -> tuple[int, int]:
    """Bytes of the average of the fp32 weights: on the GPU, and in the node's memory.

    Where the device is the CPU, all memory is its own.
    """
    if setup.average == "none":
        return 0, 0
    needed = resident.masters if setup.zero > 0 else resident.weights
    leaves = setup.device == "cuda" and (setup.average == "cpu" or setup.offload != "none")
    return (0, needed) if leaves else (needed, 0)


def states_of(setup: Setup) -> States:
    """The memory of this rank if nothing were offloaded."""
    sizes = parameter_sizes(setup.shape, setup.tensor)
    if setup.zero == 0:
        return _without_zero(setup, sizes)
    if setup.zero == 3:
        return _partitioned_weights(setup, sizes)
    if setup.zero == 1 and setup.bf16 and setup.offload == "none":
        return _bf16_optimizer(setup, sizes)
    return _partitioned_optimizer(setup, sizes)


def most_moments(setup: Setup) -> int:
    """The most tensors of an element per weight that the optimizer stores for any weight."""
    states = (state_of(setup.optimizer, spec) for spec in parameter_specs(setup.shape).values())
    return max(len(state.moments) for state in states)


def _factors(setup: Setup) -> int:
    """Bytes of the means of rows and columns, which every rank has of all matrices."""
    specs = parameter_specs(setup.shape).values()
    shapes = [spec.shape for spec in specs if state_of(setup.optimizer, spec).factored]
    return sum(map(sum, shapes)) * FP32_BYTES


def _moments_of_each(setup: Setup, sizes: Mapping[str, int]) -> int:
    """Bytes of the optimizer's state of so many elements of each parameter."""
    specs = parameter_specs(setup.shape)
    elements = sum(
        size * len(state_of(setup.optimizer, specs[name]).moments) for name, size in sizes.items()
    )
    return elements * FP32_BYTES + _factors(setup)


def _flat_sizes(setup: Setup, sizes: Mapping[str, int]) -> dict[Group, int]:
    """Elements of the flat buffer of each parameter group, padded so that all ranks share."""
    unit = FLAT_ALIGNMENT * setup.data
    groups = groups_of(setup.optimizer, parameter_specs(setup.shape))
    return {each: -(-sum(sizes[name] for name in each.names) // unit) * unit for each in groups}


def _moments_of_groups(setup: Setup, groups: Mapping[Group, int]) -> int:
    """Bytes of this rank's part of the optimizer's state."""
    elements = sum(size // setup.data * len(group.state.moments) for group, size in groups.items())
    return elements * FP32_BYTES + _factors(setup)


def _update_buffer(setup: Setup, elements: int) -> int:
    """Bytes that the optimizer allocates for the updates of so many elements."""
    if setup.optimizer.name == "lion":
        return elements * FP32_BYTES
    if setup.optimizer.name == "adafactor":
        return min(elements, max(parameter_sizes(setup.shape, setup.tensor).values())) * FP32_BYTES
    if setup.optimizer.name == "muon":
        specs = parameter_specs(setup.shape).values()
        largest = max(spec.numel for spec in specs if spec.matrix)
        return COPIES_OF_MATRIX * largest * setup.compute_bytes
    return 0


def _without_zero(setup: Setup, sizes: Mapping[str, int]) -> States:
    """fp32 weights in place; torch's optimizer."""
    elements = sum(sizes.values())
    every = elements * FP32_BYTES
    bucket = min(elements, REDUCE_BUCKET) * FP32_BYTES
    return States(
        Resident(every, masters=0, gradients=0, moments=_moments_of_each(setup, sizes)),
        Transient(
            carried=every if setup.accumulation > 1 else 0,
            growing=0 if setup.accumulation > 1 else every,
            limit=every,
            reduction=bucket,  # joined before they travel
            step=every + _update_buffer(setup, elements),
        ),
    )


def _bf16_optimizer(setup: Setup, sizes: Mapping[str, int]) -> States:
    """DeepSpeed's BF16_Optimizer: whole fp32 gradients on every rank."""
    groups = _flat_sizes(setup, sizes)
    elements = sum(groups.values())
    own = elements // setup.data * FP32_BYTES
    low = elements * setup.parameter_bytes
    whole = elements * FP32_BYTES
    # Joined before they travel, where they fit a bucket, and they travel in bf16.
    joined = (whole if elements <= REDUCE_BUCKET else 0) + low
    # Every gradient is added to its sum, and freed, when it is computed; first it is cast.
    cast = max(sizes.values()) * FP32_BYTES
    return States(
        Resident(low, own, gradients=whole, moments=_moments_of_groups(setup, groups)),
        Transient(
            bucket=cast,
            reduction=joined,
            step=_update_buffer(setup, elements // setup.data),
        ),
    )


def _partitioned_optimizer(setup: Setup, sizes: Mapping[str, int]) -> States:
    """DeepSpeedZeroOptimizer, stages 1 and 2.

    Stage 1 keeps the gradients of all micro-batches whole and reduces them with the last one;
    stage 2 reduces those of each.
    """
    groups = _flat_sizes(setup, sizes)
    elements = sum(groups.values())
    own = elements // setup.data * FP32_BYTES
    weights = elements * setup.parameter_bytes
    apart = setup.bf16  # gradients are summed in another type than they are computed in
    offloaded = setup.device == "cuda" and setup.offload != "none"
    staged = setup.parameter_bytes if setup.zero == 2 else FP32_BYTES
    bucket = reduce_bucket(sizes)
    waiting = min(elements, bucket) * staged
    joined = waiting if setup.data > 1 or apart else 0
    cast = max(sizes.values()) * FP32_BYTES if apart else 0
    buffers = 0
    if setup.device == "cuda":
        # Two whole buckets are used alternately. On the CPU, pages that are not written to take no
        # memory.
        buffers = 2 * bucket * staged
        waiting = 0
    # On its way to the host, through a buffer for one parameter.
    leaving = max(sizes.values()) * setup.parameter_bytes if offloaded else 0
    accumulated = setup.accumulation > 1
    # Stage 1 returns its buckets when it has reduced the gradients, with the last micro-batch.
    between = buffers if setup.zero == 1 and accumulated else 0
    whole = elements * (FP32_BYTES if setup.zero == 1 else staged)
    if setup.zero == 1:
        carried, growing = (whole, 0) if accumulated else (0, whole)
        limit = whole
        waiting = 0 if setup.device == "cpu" else waiting
    else:
        carried, growing, limit = own if accumulated else 0, waiting, waiting
    reduction = max(joined, own)
    if apart:
        reduction = joined + cast + (0 if accumulated and setup.zero == 2 else own)
    return States(
        Resident(weights, own, gradients=0, moments=_moments_of_groups(setup, groups)),
        Transient(
            carried=carried,
            growing=growing,
            limit=limit,
            bucket=buffers + leaving,
            between=between + leaving,
            reduction=reduction,
            step=2 * own + _update_buffer(setup, elements // setup.data),
        ),
    )


def _partitioned_weights(setup: Setup, sizes: Mapping[str, int]) -> States:
    """Stage 3: every parameter is partitioned into `data` parts."""
    parts = {name: -(-size // setup.data) for name, size in sizes.items()}
    part = sum(parts.values())
    own = part * FP32_BYTES
    every = sum(sizes.values())
    low = setup.parameter_bytes
    waiting = min(every, reduce_bucket(sizes))
    reduced_bytes = waiting // setup.data * FP32_BYTES if setup.bf16 else 0
    if setup.device == "cpu":
        reduced_bytes = max(reduced_bytes, waiting * low)  # gloo scatters a copy
    held = gathered = arriving = passing = returned = secondary = 0
    if setup.secondary is not None:
        secondary = part * (setup.data // setup.secondary)
    if setup.data > 1 or setup.offload_parameters != "none":
        found = gathering(sizes, setup.keep_gathered)
        held = returned = found.kept
        gathered = held + found.passes.at_loss
        arriving = found.passes.most_forward - found.passes.at_loss
        kept = kept_gathered(sizes, setup.keep_gathered)
        passing = min(2 * block_bucket(sizes, kept), every - held)
        embedding = embedding_name(setup.shape)
        if embedding not in kept:
            returned += sizes[embedding]
    return States(
        Resident(part * low, own, gradients=own, moments=_moments_of_each(setup, parts)),
        Transient(
            growing=every * low,
            limit=waiting * low,
            reduction=waiting * low + reduced_bytes,
            step=min(part, SUB_GROUP) * FP32_BYTES + _update_buffer(setup, min(part, SUB_GROUP)),
            held=held * low,
            gathered=gathered * low,
            arriving=arriving * low,
            passing=passing * low,
            returned=returned * low,
            secondary=secondary * low,
        ),
    )
