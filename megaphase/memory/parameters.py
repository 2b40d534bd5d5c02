"""The parameters that one tensor-parallel rank holds, by the names they have in the model."""

from __future__ import annotations

from megaphase.model.shape import GPTShape


def parameter_sizes(shape: GPTShape, tensor: int) -> dict[str, int]:
    """Elements of each parameter on one tensor-parallel rank, not yet cut by ZeRO."""
    rows = -(-shape.vocab // tensor)  # rounded up: rows that only pad
    sizes = {"embedding.weight": rows * shape.hidden}
    if shape.position == "learned":
        sizes["positions"] = shape.seq_len * shape.hidden
    block = block_sizes(shape, tensor)
    for i in range(shape.layers):
        sizes |= {f"blocks.{i}.{name}": size for name, size in block.items()}
    sizes |= _norm_sizes("norm", shape)
    if not shape.tied_embeddings:
        sizes["head.weight"] = rows * shape.hidden
    return sizes


def largest_partition(shape: GPTShape, tensor: int, data: int) -> int:
    """Elements of the largest parameter on one rank, cut by ZeRO-3 among `data` ranks."""
    return -(-max(parameter_sizes(shape, tensor).values()) // data)


def block_sizes(shape: GPTShape, tensor: int) -> dict[str, int]:
    """Elements of each parameter of one block on one rank."""
    linear = {
        "attention.qkv": (sum(shape.qkv_segments) // tensor, shape.hidden),
        "attention.out": (shape.hidden, shape.hidden // tensor),
        "feed_forward.up": (sum(shape.ffn_segments) // tensor, shape.hidden),
        "feed_forward.down": (shape.hidden, shape.ffn // tensor),
    }
    sizes = _norm_sizes("attention_norm", shape) | _norm_sizes("feed_forward_norm", shape)
    for name, (outputs, inputs) in linear.items():
        sizes[f"{name}.weight"] = outputs * inputs
        if shape.bias:
            sizes[f"{name}.bias"] = outputs
    return sizes


def is_matrix(name: str) -> bool:
    """Whether weight decay applies; the optimizer keeps such parameters in a group of their own."""
    return not name.endswith("bias") and "norm" not in name


def _norm_sizes(name: str, shape: GPTShape) -> dict[str, int]:
    sizes = {f"{name}.weight": shape.hidden}
    if shape.norm == "layernorm":
        sizes[f"{name}.bias"] = shape.hidden
    return sizes
