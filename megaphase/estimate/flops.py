"""The work of one rank for a micro-batch: floating-point operations and memory traffic.

Summed over the model's layers, which declare it (see `distributed.costs`). Layers that are too
small to matter (embedding, biases) are not counted.
"""

from __future__ import annotations

from megaphase.distributed import costs
from megaphase.distributed.costs import FP32_BYTES, Work
from megaphase.estimate.setup import Setup
from megaphase.model.gpt import Block
from megaphase.model.parameters import (
    block_kinds,
    declared_block,
    declared_model,
    parameter_sizes,
)

# A gradient is read, and added to the fp32 sum or to a bucket, which is read and written.
GRADIENT_TRAFFIC = 2 * FP32_BYTES
# A weight that is kept in fp32 is read and written in bf16, and its gradient the other way.
CAST_TRAFFIC = 12


def forward_work(setup: Setup) -> Work:
    """The work of a forward pass."""
    model = declared_model(setup.shape)
    blocks = (costs.forward_work(b, setup) * n for b, n in block_kinds(setup.shape))
    head = costs.forward_work(model.norm, setup) + costs.forward_work(model.head, setup)
    return sum(blocks, head)


def backward_work(setup: Setup) -> Work:
    """The work of a backward pass, with recomputation."""
    model = declared_model(setup.shape)
    blocks = (
        (costs.backward_work(block, setup) + recomputed_work(setup, block)) * count
        for block, count in block_kinds(setup.shape)
    )
    head = costs.backward_work(model.norm, setup) + costs.backward_work(model.head, setup)
    return sum(blocks, head + _gradients(setup))


def recomputed_work(setup: Setup, block: Block | None = None) -> Work:
    """The part of a block's forward pass that its backward pass repeats; of the first block's if
    none is given."""
    block = block or declared_block(setup.shape)
    if setup.shape.activation_checkpointing == "full":
        return costs.forward_work(block, setup)
    return costs.recomputed_work(block, setup)


def _gradients(setup: Setup) -> Work:
    """Gradients passed on, and casts of weights that are not kept in the type of the compute."""
    parameters = sum(parameter_sizes(setup.shape, setup.tensor).values())
    bytes_each = setup.parameter_bytes + GRADIENT_TRAFFIC
    if setup.compute_bytes != setup.parameter_bytes:
        bytes_each += CAST_TRAFFIC
    return Work(0, 0, parameters * bytes_each)
