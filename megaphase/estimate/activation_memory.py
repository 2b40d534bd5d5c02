"""Activations that are saved for the backward pass, and memory that the backward pass adds.

Bytes of one micro-batch on one rank, summed over the model's layers, which declare them (see
`distributed.costs`). Blocks differ in their attention alone.
"""

from __future__ import annotations

from itertools import accumulate

from megaphase.distributed.costs import region_bytes, residual_bytes, saved_bytes
from megaphase.distributed.vocab_parallel import LossMemory
from megaphase.estimate.setup import Setup
from megaphase.model.gpt import Block
from megaphase.model.parameters import block_kinds, declared_model, kinds_of_blocks


def residual(setup: Setup) -> int:
    """One tensor of the residual stream."""
    return residual_bytes(setup, setup.shape.hidden)


def blocks_kept(setup: Setup) -> list[int]:
    """Saved of the first 0, 1, … all blocks until their backward passes: everything, or only their
    inputs with full recomputation."""
    kept = {kind: _kept(block, setup) for kind, (block, _) in enumerate(block_kinds(setup.shape))}
    return list(accumulate((kept[kind] for kind in kinds_of_blocks(setup.shape)), initial=0))


def block_forward(setup: Setup) -> int:
    """Memory that a block's forward pass needs at its end, beyond `blocks_kept` of all blocks."""
    output = 2 * region_bytes(setup, setup.shape.hidden)
    beyond = max(saved_bytes(b, setup) - _kept(b, setup) for b, _ in block_kinds(setup.shape))
    return max(beyond, 0) + output + residual(setup)


def block_backward(setup: Setup) -> int:
    """The peak of one block's backward pass, beyond `blocks_kept` of all blocks."""
    return max(_backward(block, setup) for block, _ in block_kinds(setup.shape))


def _kept(block: Block, setup: Setup) -> int:
    recomputed = setup.shape.activation_checkpointing == "full"
    return residual(setup) if recomputed else saved_bytes(block, setup)


def _backward(block: Block, setup: Setup) -> int:
    """The peak over the stages of the branches' layers, from the last to the first; tensors that a
    stage releases are gone in the next."""
    saved = saved_bytes(block, setup)
    peaks, left = [], saved
    if setup.sequence:  # the gradient of the block's output is gathered
        peaks.append(saved + residual(setup) + region_bytes(setup, setup.shape.hidden))
    for branch in reversed(block.branches):
        layers = (branch.post_norm, branch.layer, branch.norm)
        for layer in (each for each in layers if each is not None):
            for stage in layer.backward_stages(setup):
                peaks.append(left + stage.transient)
                left -= stage.released
    recomputed = setup.shape.activation_checkpointing == "full"
    return max(peaks) - (0 if recomputed else saved)


def saved_before_blocks(setup: Setup) -> int:
    """Saved for the embedding's dropout, and the masks that blocks share."""
    return sum(declared_model(setup.shape).saved(setup).values())


def saved_by_final_norm(setup: Setup) -> int:
    return saved_bytes(declared_model(setup.shape).norm, setup)


def loss_memory(setup: Setup) -> LossMemory:
    """Transient memory of the output projection and the loss."""
    return declared_model(setup.shape).head.loss_memory(setup)
