"""What the forward pass keeps for the backward pass, and what the backward pass adds.

Bytes of one micro-batch on one rank, read off the model's layers and the autograd functions that
they call. A block's own tensors are listed by name, so that each can be found in the code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megaphase.distributed.cross_entropy import tokens_at_a_time
from megaphase.distributed.sharding import vocab_rows
from megaphase.estimate.setup import BF16_BYTES, FP32_BYTES, Setup
from megaphase.model.parameters import block_sizes

INDEX_BYTES = 8


@dataclass(frozen=True)
class Widths:
    """Elements a token that this rank's part of a block is wide."""

    hidden: int
    queries: int
    keys_and_values: int
    heads: int
    ffn: int
    up: int

    @property
    def qkv(self) -> int:
        return self.queries + self.keys_and_values


def widths_of(setup: Setup) -> Widths:
    shape, tensor = setup.shape, setup.tensor
    return Widths(
        hidden=shape.hidden,
        queries=shape.hidden // tensor,
        keys_and_values=sum(shape.qkv_segments[1:]) // tensor,
        heads=shape.heads // tensor,
        ffn=shape.ffn // tensor,
        up=sum(shape.ffn_segments) // tensor,
    )


def norm_saved(setup: Setup) -> int:
    """What one norm keeps beside its output, which the next layer keeps anyway."""
    tokens, hidden = setup.outer_tokens, setup.shape.hidden
    figures = 2 if setup.shape.norm == "layernorm" else 1  # mean and deviation, or scale
    return tokens * (hidden * setup.compute_bytes + figures * FP32_BYTES)


def attention_saved(setup: Setup) -> dict[str, int]:
    """What the attention layer keeps, from its entered input to the output projection's input."""
    widths, each = widths_of(setup), setup.tokens * setup.compute_bytes
    saved = {"qkv": each * widths.qkv, "output": each * widths.queries}
    if setup.widened:
        wide = setup.tokens * FP32_BYTES
        saved = {"qkv": wide * widths.qkv, "output": saved["output"] + wide * widths.queries}
    if not _selective(setup):
        saved["input"] = residual(setup)
    saved["logsumexp"] = setup.tokens * widths.heads * FP32_BYTES
    if setup.masked and not setup.variable_length:
        saved["mask"] = each * setup.shape.seq_len  # what is added to the scores of all heads
    if setup.masked and setup.shape.kv_heads < setup.shape.heads:
        saved["repeated"] = 2 * each * widths.queries
    return saved


def feed_forward_saved(setup: Setup) -> dict[str, int]:
    """What the feed-forward layer keeps, from its input to the down projection's input."""
    widths, each = widths_of(setup), setup.tokens * setup.compute_bytes
    saved = {"up": each * widths.up}
    if not _selective(setup):
        saved |= {"input": residual(setup), "down_input": each * widths.ffn}
    return saved


def _selective(setup: Setup) -> bool:
    """Whether norms and activations are computed again, rather than kept."""
    return setup.shape.activation_checkpointing == "selective"


def cast_weights(setup: Setup) -> int:
    """bf16 copies of a block's fp32 weights, which the backward pass multiplies by."""
    if setup.compute_bytes == setup.parameter_bytes:
        return 0
    return sum(block_sizes(setup.shape, setup.tensor).values()) * setup.compute_bytes


def block_saved(setup: Setup) -> int:
    """All that one block keeps."""
    parts = (*attention_saved(setup).values(), *feed_forward_saved(setup).values())
    each_half = norm_saved(setup) + dropout_saved(setup)
    return sum(parts) + 2 * each_half + cast_weights(setup)


def dropout_saved(setup: Setup) -> int:
    """The mask of one place where elements are dropped, one byte for each."""
    return setup.outer_tokens * setup.shape.hidden if setup.shape.dropout else 0


def residual(setup: Setup) -> int:
    """One tensor of the residual stream."""
    return setup.outer_tokens * setup.shape.hidden * setup.compute_bytes


def block_kept(setup: Setup) -> int:
    """What stays of a block until the backward pass: all, or its input to compute it again."""
    if setup.shape.activation_checkpointing == "full":
        return residual(setup)
    return block_saved(setup)


def block_forward(setup: Setup) -> int:
    """What a block's forward pass needs at its end, beyond what all blocks keep."""
    kept = block_kept(setup)
    output = 2 * setup.tokens * setup.shape.hidden * setup.compute_bytes
    return max(block_saved(setup) - kept, 0) + output + residual(setup)


def block_backward(setup: Setup) -> int:
    """The most that one block's backward pass needs beyond what all blocks keep.

    The stages follow the feed-forward layer and then the attention layer from their end; what a
    stage has used is gone in the next. Without sequence parallelism the gradient of a layer's
    output is the residual stream's own.
    """
    widths, each = widths_of(setup), setup.tokens * setup.compute_bytes
    whole = each * widths.hidden
    attention, feed_forward = attention_saved(setup), feed_forward_saved(setup)
    grad = residual(setup) + (whole if setup.sequence else 0)
    sizes = block_sizes(setup.shape, setup.tensor)
    product = {name: _products(setup, name, sizes[f"{name}.weight"]) for name in _LINEAR}
    gate, normed = each * widths.ffn, residual(setup)
    after_down = block_saved(setup) - feed_forward.get("down_input", 0)
    after_up = after_down - feed_forward["up"] - feed_forward.get("input", 0)
    after_norm = after_up - norm_saved(setup)
    after_out = after_norm - attention["output"]
    heads = each * widths.qkv
    again = gate if _selective(setup) else 0
    normed_again = normed if _selective(setup) else 0
    # Operation by operation, SwiGLU has two more tensors, and a norm four in fp32.
    apart = 0 if setup.compiled else 1
    activation = 2 * gate * apart if setup.shape.activation == "swiglu" else 0
    norm = 4 * setup.outer_tokens * widths.hidden * FP32_BYTES * apart
    norm = norm if setup.shape.norm == "rmsnorm" else 0
    stages = [
        block_saved(setup) + again + grad + gate + product["feed_forward.down"],
        after_down + grad + gate + each * widths.up + activation,
        after_down + grad + each * widths.up + whole + normed_again + product["feed_forward.up"],
        after_up + 3 * residual(setup) + norm,
        after_norm + grad + each * widths.queries + product["attention.out"],
        after_norm + grad + each * widths.queries + heads,
        after_out + grad + 2 * heads,
        after_out + grad + heads + whole + normed_again + product["attention.qkv"],
    ]
    if setup.sequence:
        stages.append(block_saved(setup) + residual(setup) + 2 * whole)
    checkpointed = setup.shape.activation_checkpointing == "full"
    return max(stages) - (0 if checkpointed else block_saved(setup))


_LINEAR = ("attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down")


def _products(setup: Setup, name: str, size: int) -> int:
    """What the two products of a linear layer's backward pass take beside their results' place.

    size: elements of its weight, whose gradient is there before it has been added to what is kept
    of all gradients.
    """
    widened = 0
    if setup.widened:  # the two factors and the result in fp32
        outputs = _outputs(setup, name)
        widened = FP32_BYTES * (setup.tokens * (outputs + size // outputs) + size)
    return _weight_gradient(setup, size) + widened


def _outputs(setup: Setup, name: str) -> int:
    widths = widths_of(setup)
    outputs = {"attention.qkv": widths.qkv, "feed_forward.up": widths.up}
    return outputs.get(name, widths.hidden)


def _weight_gradient(setup: Setup, size: int) -> int:
    cast = size * setup.compute_bytes if setup.compute_bytes != setup.parameter_bytes else 0
    return size * setup.parameter_bytes + cast


@dataclass(frozen=True)
class HeadMemory:
    """The final norm, the output projection and the loss.

    kept: until the backward pass; loss: at the loss; backward: handing its gradients on.
    """

    kept: int
    loss: int
    backward: int


def head_memory(setup: Setup) -> HeadMemory:
    """The gradients of the projection come about with the losses, for some tokens at a time."""
    shape, tokens = setup.shape, setup.tokens
    rows = vocab_rows(shape.vocab, setup.tensor)
    weight = rows * shape.hidden
    part = min(tokens, tokens_at_a_time(rows, torch.device(setup.device)))
    logits = part * rows
    whole = tokens * shape.hidden * setup.compute_bytes
    cast = weight * BF16_BYTES if setup.compute_bytes != setup.parameter_bytes else 0
    gradients = whole + weight * FP32_BYTES
    # The logits and their gradient, and exponentials in fp32, with another cast in bf16.
    loss = logits * (2 * setup.compute_bytes + FP32_BYTES * (2 if setup.bf16 else 1))
    products = 0 if setup.parameter_bytes == FP32_BYTES else weight * setup.compute_bytes
    if setup.widened:
        products = FP32_BYTES * (logits + weight + part * shape.hidden)
    per_token = tokens * (INDEX_BYTES + 8 * FP32_BYTES)
    backward = gradients + weight * (BF16_BYTES if setup.parameter_bytes == BF16_BYTES else 0)
    return HeadMemory(
        kept=norm_saved(setup),
        loss=gradients
        + cast
        + max(loss, logits * setup.compute_bytes + products)
        + whole
        + per_token
        + residual(setup),
        backward=backward + per_token + residual(setup),
    )


def mask_memory(setup: Setup) -> int:
    """The mask of documents that do not see each other, one byte for each pair of tokens."""
    mask = setup.masked and not setup.variable_length
    return setup.tokens * setup.shape.seq_len if mask else 0
