"""Peak memory of one GPU within a step, by purpose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from megaphase.distributed.costs import FP32_BYTES
from megaphase.estimate.activation_memory import (
    block_backward,
    block_forward,
    blocks_kept,
    loss_memory,
    residual,
    saved_before_blocks,
    saved_by_final_norm,
)
from megaphase.estimate.setup import Setup
from megaphase.estimate.state_memory import (
    SUB_GROUP,
    SWAP_BUFFERS,
    States,
    average_bytes,
    most_moments,
    states_of,
)
from megaphase.model.parameters import (
    declared_block,
    declared_model,
    elements_of,
    largest_partition,
    parameter_sizes,
)

PARTS = ("weights", "masters", "moments", "gradients", "activations", "gathered", "buffers")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank.

    parts: on the GPU (or, where the device is the CPU, all there are), at `moment`, the one of a
    step when they are most together
    host: of the node's memory, for what is offloaded to it
    """

    parts: dict[str, int]
    host: dict[str, int]
    moment: str

    @property
    def total(self) -> int:
        """Bytes on the GPU."""
        return sum(self.parts.values())


@lru_cache(maxsize=4096)  # layouts and suggestions ask for the same setups again and again
def estimate(setup: Setup) -> MemoryEstimate:
    """The memory of one rank of a run."""
    states = states_of(setup)
    host = _offloaded(setup, states)
    moments = [
        MemoryEstimate(_moved_off(setup, parts, states), host, moment)
        for moment, parts in _peak_points(setup, states)
    ]
    return max(moments, key=lambda at: at.total)


def _peak_points(setup: Setup, states: States) -> Iterator[tuple[str, dict[str, int]]]:
    """The moments of a step in which memory can be at its highest."""
    resident, transient = states.resident, states.transient
    layers = setup.shape.layers
    kept = blocks_kept(setup)
    head, before = loss_memory(setup), saved_before_blocks(setup)
    parameters = sum(parameter_sizes(setup.shape, setup.tensor).values())
    block = elements_of(declared_block(setup.shape), setup.tensor)

    # Named where there is one.
    average = {"average": average_bytes(setup, resident)[0]} if setup.average != "none" else {}

    def at(activations: int, gradients: int, gathered: int, buffers: int) -> dict[str, int]:
        return {
            "weights": resident.weights + transient.secondary,
            "masters": resident.masters,
            "moments": resident.moments,
            "gradients": resident.gradients + gradients,
            "activations": activations,
            "gathered": gathered,
            "buffers": buffers,
            **average,
        }

    carried, backward = transient.carried, block_backward(setup)
    held, gathered = transient.held, transient.gathered
    forward = kept[layers] + block_forward(setup) + before
    yield "forward pass", at(forward, carried, gathered, transient.arriving + transient.between)
    before_head = kept[layers] + saved_by_final_norm(setup) + before
    yield "loss", at(before_head + head.loss, carried, gathered, transient.between)
    yield (
        "backward pass of the head",
        at(before_head + head.backward, carried, gathered, transient.bucket),
    )
    above = parameters - layers * block
    if not setup.shape.tied_embeddings:
        above -= elements_of(declared_model(setup.shape).embedding, setup.tensor)
    least = transient.returned + transient.passing
    turns = [
        (transient.limit, transient.growing),
        (gathered - least, gathered - held),
    ]
    # Between these blocks all that follows is linear in the number that is left.
    for left in _turning_points(layers, block, above, parameters, turns):
        share = (above + (layers - left) * block) / parameters
        waiting = min(int(transient.growing * share), transient.limit)
        there = max(held + int((gathered - held) * (1 - share)), least)
        activations = kept[left] + before
        name = f"backward pass of block {left}"
        yield (
            name,
            at(activations + backward, carried + waiting, there, transient.bucket),
        )
        if transient.limit <= waiting and transient.limit < transient.growing:
            handing_on = transient.bucket + transient.reduction
            yield name, at(activations, carried + waiting, there, handing_on)
    waiting = min(transient.growing, transient.limit)
    end = transient.bucket + transient.reduction
    yield "reduction of gradients", at(residual(setup), carried + waiting, transient.returned, end)
    step = 0 if setup.offload != "none" else transient.step
    yield "optimizer step", at(0, step, 0, 0)


def _turning_points(
    layers: int, block: int, above: int, parameters: int, turns: list[tuple[int, int]]
) -> list[int]:
    """The first and the last number of blocks left, and those next to where a limit is reached.

    turns: limits of what grows with the share of the parameters whose gradients are there, each
    with what it would grow to.
    """
    found = {1, layers}
    for limit, whole in turns:
        if whole > 0:
            left = layers - (limit / whole * parameters - above) / block
            found.update(range(int(left) - 2, int(left) + 4))
    return sorted((left for left in found if 1 <= left <= layers), reverse=True)


def _offloaded(setup: Setup, states: States) -> dict[str, int]:
    """Bytes of the node's memory, by part; of what lies on NVMe, the buffers on the way to it."""
    if setup.device == "cpu":
        return {}
    resident, host = states.resident, {}
    average = average_bytes(setup, resident)[1]
    pinned = []
    if setup.offload == "cpu":
        host = {
            "masters": resident.masters,
            "moments": resident.moments,
            "gradients": resident.masters,
        }
        pinned = [host["gradients"]]
        if setup.zero < 3:
            # The new weights in the model's type, on their way to the GPU.
            host["copies"] = resident.masters * setup.parameter_bytes // FP32_BYTES
            pinned += [host["masters"], host["copies"]]
    elif setup.offload == "nvme":
        # Weights, moments and gradients of a sub-group at a time.
        tensors = 2 + most_moments(setup)
        host = {"buffers": tensors * min(resident.masters, SUB_GROUP * FP32_BYTES)}
    if setup.offload_parameters == "cpu":
        host["weights"] = resident.weights
        pinned.append(host["weights"])
    elif setup.offload_parameters == "nvme":
        largest = largest_partition(setup.shape, setup.tensor, setup.data)
        swapped = SWAP_BUFFERS * largest * setup.parameter_bytes
        host["buffers"] = host.get("buffers", 0) + swapped
    if average:
        host["average"] = average
    if pinned:
        host["rounding"] = sum(_power_of_two(size) - size for size in pinned)
    return host


def _power_of_two(size: int) -> int:
    """The bytes that torch allocates for so many pinned ones."""
    return 1 << max(0, size - 1).bit_length()


def _moved_off(setup: Setup, parts: dict[str, int], states: States) -> dict[str, int]:
    """The parts without what is offloaded; where the device is the CPU, nothing leaves it."""
    if setup.device == "cpu":
        return parts
    left = dict(parts)
    if setup.offload != "none":
        left |= {"masters": 0, "moments": 0}
        left["gradients"] -= states.resident.gradients
    if setup.offload_parameters != "none":
        left["weights"] = 0
    return left
