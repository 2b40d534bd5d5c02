"""What one rank computes for a micro-batch: floating-point operations, and bytes past its memory.

Read off the model's layers, as `memory.activations` is. Bytes are those of fused kernels, which
read every input once and write every output once; matrix products and attention are counted by
their operations alone, and what is too small to matter (embedding, biases) not at all.
"""

from __future__ import annotations

from dataclasses import dataclass

from megaphase.distributed.sharding import vocab_rows
from megaphase.estimate.activation_memory import residual, widths_of
from megaphase.estimate.setup import FP32_BYTES, Setup
from megaphase.model.parameters import block_sizes, is_matrix, parameter_sizes

# A backward pass has two products, of inputs and of weights, for each one of the forward pass.
BACKWARD_PRODUCTS = 2
# FlashAttention computes the scores again: five products for two (Dao 2023, section 3.1).
BACKWARD_ATTENTION = 2.5
# Causal attention skips the blocks above the diagonal; with a mask nothing is skipped.
CAUSAL_SHARE = 0.5
# Passes over the logits: maximum, sum and gradient read them, and the gradient is written.
LOGIT_PASSES = 4
# Of the residual stream around a norm: it and what is added are read, the sum and the normed sum
# written; backward, both gradients and the sum are read and one gradient written. The normed sum
# alone, computed again, is one more read and one more written.
NORM_FORWARD, NORM_BACKWARD, NORM_AGAIN = 4, 4, 2
NORMS = 2  # of a block
# A gradient is read, and added to the fp32 sum or to a bucket, which is read and written.
GRADIENT_TRAFFIC = 2 * FP32_BYTES
# Gradients of a weight by two halves of a micro-batch: both are read, their sum is written.
SUM_PASSES = 3
# A weight that is kept in fp32 is read and written in bf16, and its gradient the other way.
CAST_TRAFFIC = 12


@dataclass(frozen=True)
class Work:
    """FLOPs of matrix products and of attention, and bytes of all that is neither."""

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


def forward_work(setup: Setup) -> Work:
    """Of a forward pass."""
    return _block_forward(setup) * setup.shape.layers + _head_forward(setup)


def backward_work(setup: Setup) -> Work:
    """Of a backward pass, with what it computes again."""
    block = _block_backward(setup) + recomputed_work(setup)
    return block * setup.shape.layers + _head_backward(setup) + _gradients(setup)


def recomputed_work(setup: Setup) -> Work:
    """What the backward pass of a block computes again of its forward pass."""
    match setup.shape.activation_checkpointing:
        case "full":
            return _block_forward(setup)
        case "selective":
            norms = NORMS * NORM_AGAIN * residual(setup)
            return Work(0, 0, norms + _activation_forward(setup))
        case _:
            return Work()


def _block_forward(setup: Setup) -> Work:
    norms = NORMS * NORM_FORWARD * residual(setup)
    return Work(
        2 * setup.tokens * _block_matrices(setup),
        _attention(setup),
        norms + _rotary(setup) + _activation_forward(setup),
    )


def _block_backward(setup: Setup) -> Work:
    widths, each = widths_of(setup), setup.tokens * setup.compute_bytes
    norms = NORMS * NORM_BACKWARD * residual(setup)
    activation = each * (2 * widths.up + widths.ffn)
    sums = (setup.halves - 1) * SUM_PASSES * _block_matrices(setup) * setup.compute_bytes
    return Work(
        2 * setup.tokens * _block_matrices(setup) * BACKWARD_PRODUCTS,
        _attention(setup) * BACKWARD_ATTENTION,
        norms + _rotary(setup) + activation + sums,
    )


def _activation_forward(setup: Setup) -> int:
    widths = widths_of(setup)
    return setup.tokens * setup.compute_bytes * (widths.up + widths.ffn)


def _rotary(setup: Setup) -> int:
    """Queries, keys and values read, and written side by side."""
    if setup.shape.position != "rotary":
        return 0
    return 2 * setup.tokens * setup.compute_bytes * widths_of(setup).qkv


def _block_matrices(setup: Setup) -> int:
    sizes = block_sizes(setup.shape, setup.tensor)
    return sum(size for name, size in sizes.items() if is_matrix(name))


def _attention(setup: Setup) -> float:
    """FLOPs of the scores and of their product with the values."""
    whole = 4 * setup.tokens * setup.shape.seq_len * setup.shape.hidden / setup.tensor
    return whole if (setup.masked and not setup.variable_length) else whole * CAUSAL_SHARE


def _head_forward(setup: Setup) -> Work:
    norm = NORM_FORWARD * residual(setup)
    return Work(2 * setup.tokens * _vocabulary(setup) * setup.shape.hidden, 0, norm)


def _head_backward(setup: Setup) -> Work:
    """With the loss in both directions."""
    loss = LOGIT_PASSES * setup.tokens * _vocabulary(setup) * setup.compute_bytes
    norm = NORM_BACKWARD * residual(setup)
    return Work(_head_forward(setup).matrices * BACKWARD_PRODUCTS, 0, loss + norm)


def _vocabulary(setup: Setup) -> int:
    """Rows of the output projection on this rank."""
    return vocab_rows(setup.shape.vocab, setup.tensor)


def _gradients(setup: Setup) -> Work:
    """Gradients handed on, and casts of weights that are not kept in the type of the compute."""
    parameters = sum(parameter_sizes(setup.shape, setup.tensor).values())
    bytes_each = setup.parameter_bytes + GRADIENT_TRAFFIC
    if setup.compute_bytes != setup.parameter_bytes:
        bytes_each += CAST_TRAFFIC
    return Work(0, 0, parameters * bytes_each)
