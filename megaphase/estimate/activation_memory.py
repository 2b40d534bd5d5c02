"""Activations that are saved for the backward pass, and memory that the backward pass adds.

Bytes of one micro-batch on one rank, summed over the model's layers, which declare them (see
`distributed.costs`). All blocks are alike.
"""

from __future__ import annotations

from megaphase.distributed.costs import region_bytes, residual_bytes, saved_bytes
from megaphase.distributed.vocab_parallel import LossMemory
from megaphase.estimate.setup import Setup
from megaphase.model.parameters import declared_block, declared_model


def residual(setup: Setup) -> int:
    """One tensor of the residual stream."""
    return residual_bytes(setup, setup.shape.hidden)


def block_saved(setup: Setup) -> int:
    """All that autograd saves of one block."""
    return saved_bytes(declared_block(setup.shape), setup)


def block_kept(setup: Setup) -> int:
    """Saved of a block until its backward pass: everything, or only its input with full
    recomputation."""
    if setup.shape.activation_checkpointing == "full":
        return residual(setup)
    return block_saved(setup)


def block_forward(setup: Setup) -> int:
    """Memory that a block's forward pass needs at its end, beyond `block_kept` of all blocks."""
    output = 2 * region_bytes(setup, setup.shape.hidden)
    return max(block_saved(setup) - block_kept(setup), 0) + output + residual(setup)


def block_backward(setup: Setup) -> int:
    """The peak of one block's backward pass, beyond `block_kept` of all blocks.

    The stages are those of the branches' layers, from the last to the first; tensors that a stage
    releases are gone in the next.
    """
    saved = block_saved(setup)
    peaks, left = [], saved
    if setup.sequence:  # the gradient of the block's output is gathered
        peaks.append(saved + residual(setup) + region_bytes(setup, setup.shape.hidden))
    for branch in reversed(declared_block(setup.shape).branches):
        layers = (branch.post_norm, branch.layer, branch.norm)
        for layer in (each for each in layers if each is not None):
            for stage in layer.backward_stages(setup):
                peaks.append(left + stage.transient)
                left -= stage.released
    recomputed = setup.shape.activation_checkpointing == "full"
    return max(peaks) - (0 if recomputed else saved)


def saved_before_blocks(setup: Setup) -> int:
    """Saved for the embedding's dropout, and the mask of documents, which all blocks share."""
    return sum(declared_model(setup.shape).saved(setup).values())


def saved_by_final_norm(setup: Setup) -> int:
    return saved_bytes(declared_model(setup.shape).norm, setup)


def loss_memory(setup: Setup) -> LossMemory:
    """Transient memory of the output projection and the loss."""
    return declared_model(setup.shape).head.loss_memory(setup)
