"""What the forward pass keeps for the backward pass, and what the backward pass adds.

Bytes of one micro-batch on one rank, read off the model's layers and the autograd functions that
they call. A block's own tensors are listed by name, so that each can be found in the code.
"""

from __future__ import annotations

from dataclasses import dataclass

from megaphase.memory.setup import BF16_BYTES, FP32_BYTES, Setup
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

    @property
    def turned(self) -> int:
        """Queries and keys, which a rotary embedding turns."""
        return self.queries + self.keys_and_values // 2


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
    if setup.shape.norm == "layernorm":
        return tokens * (hidden * setup.compute_bytes + 2 * FP32_BYTES)  # input, mean, deviation
    scale = tokens * FP32_BYTES
    if setup.device == "cuda":
        return tokens * hidden * setup.compute_bytes + scale  # torch's fused kernel: the input
    if setup.bf16:
        # torch has no fused kernel: the input in fp32, and that normed.
        return 2 * tokens * hidden * FP32_BYTES + scale
    return tokens * hidden * FP32_BYTES + scale  # rms_norm._RMSNorm: the normed input


def attention_saved(setup: Setup) -> dict[str, int]:
    """What the attention layer keeps, from its entered input to the output projection's input."""
    widths, each = widths_of(setup), setup.tokens * setup.compute_bytes
    saved = {
        "input": each * widths.hidden,
        "qkv": each * widths.qkv,
        "output": each * widths.queries,
    }
    if setup.shape.position == "rotary":
        saved["turned"] = each * widths.turned
    saved["logsumexp"] = setup.tokens * widths.heads * FP32_BYTES
    if setup.masked:
        saved["mask"] = each * setup.shape.seq_len  # what is added to the scores of all heads
    if setup.masked and setup.shape.kv_heads < setup.shape.heads:
        saved["repeated"] = 2 * each * widths.queries
    return saved


def feed_forward_saved(setup: Setup) -> dict[str, int]:
    """What the feed-forward layer keeps, from its entered input to the down projection's input."""
    widths, each = widths_of(setup), setup.tokens * setup.compute_bytes
    saved = {
        "input": each * widths.hidden,
        "up": each * widths.up,
        "down_input": each * widths.ffn,
    }
    if setup.shape.activation == "swiglu":
        saved["opened"] = each * widths.ffn
    return saved


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
    weight_grad = {name: _weight_gradient(setup, sizes[f"{name}.weight"]) for name in _LINEAR}
    gate = each * widths.ffn
    after_down = block_saved(setup) - feed_forward["down_input"]
    after_up = after_down - feed_forward["up"] - feed_forward.get("opened", 0)
    after_norm = after_up - feed_forward["input"] - norm_saved(setup)
    after_out = after_norm - attention["output"]
    activation = gate + each * widths.up + (gate if "opened" in feed_forward else 0)
    heads = each * widths.qkv
    stages = [
        block_saved(setup) + grad + gate + weight_grad["feed_forward.down"],
        after_down + grad + activation,
        after_down + grad + each * widths.up + whole + weight_grad["feed_forward.up"],
        after_up + residual(setup) + whole * (2 if setup.tensor > 1 else 1),
        after_norm + grad + each * widths.queries + weight_grad["attention.out"],
        after_norm + grad + each * widths.queries + heads,
        after_out + grad + 2 * heads,
        after_out + grad + heads + whole + weight_grad["attention.qkv"],
    ]
    if setup.sequence:
        stages.append(block_saved(setup) + residual(setup) + 2 * whole)
    checkpointed = setup.shape.activation_checkpointing == "full"
    return max(stages) - (0 if checkpointed else block_saved(setup))


_LINEAR = ("attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down")


def _weight_gradient(setup: Setup, size: int) -> int:
    """The gradient of one weight, before it has been added to what is kept of all gradients."""
    cast = size * setup.compute_bytes if setup.compute_bytes != setup.parameter_bytes else 0
    return size * setup.parameter_bytes + cast


@dataclass(frozen=True)
class HeadMemory:
    """The final norm, the logits and the loss.

    loss: at the loss and its gradient; backward: at the gradient of the output projection.
    """

    kept: int
    loss: int
    backward: int


def head_memory(setup: Setup) -> HeadMemory:
    shape, tokens = setup.shape, setup.tokens
    rows = -(-shape.vocab // setup.tensor)
    weight = rows * shape.hidden
    logits = tokens * rows
    whole = tokens * shape.hidden * setup.compute_bytes
    cast = weight * BF16_BYTES if setup.compute_bytes != setup.parameter_bytes else 0
    kept = norm_saved(setup) + whole + cast
    # The fp32 logits become exponentials and their own gradient in place; bf16 logits lie beside
    # them in the forward pass, and their bf16 gradient in the backward pass.
    loss = logits * FP32_BYTES + (logits * BF16_BYTES if setup.bf16 else 0)
    per_token = tokens * (INDEX_BYTES + 8 * FP32_BYTES)
    backward = logits * setup.compute_bytes + whole + _weight_gradient(setup, weight)
    return HeadMemory(
        kept, loss + per_token + residual(setup), backward + per_token + residual(setup)
    )


def mask_memory(setup: Setup) -> int:
    """The mask of documents that do not see each other, one byte for each pair of tokens."""
    return setup.tokens * setup.shape.seq_len if setup.masked else 0
