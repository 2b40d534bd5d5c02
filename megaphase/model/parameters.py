"""The model's parameters by name: their shapes, and how tensor parallelism cuts them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

from megaphase.distributed.sharding import ParameterLayout, padded_vocab
from megaphase.model.shape import GPTShape


def parameter_layouts(shape: GPTShape, tensor: int) -> dict[str, ParameterLayout]:
    """Of every parameter, in the order in which the model has them.

    tensor: the tensor-parallel size, to a multiple of which the vocabulary is padded.
    """
    layouts = {}
    if shape.position == "learned":
        layouts["positions"] = ParameterLayout((shape.seq_len, shape.hidden))
    layouts["embedding.weight"] = vocabulary = _vocabulary(shape, tensor)
    block = block_layouts(shape)
    for i in range(shape.layers):
        layouts |= {f"blocks.{i}.{name}": layout for name, layout in block.items()}
    layouts |= _norm("norm", shape)
    if not shape.tied_embeddings:
        layouts["head.weight"] = vocabulary
    return layouts


def block_layouts(shape: GPTShape) -> dict[str, ParameterLayout]:
    """Of the parameters of one block."""
    return {
        **_norm("attention_norm", shape),
        **_column("attention.qkv", shape.hidden, shape.qkv_segments, shape.bias),
        **_row("attention.out", shape.hidden, shape.hidden, shape.bias),
        **_norm("feed_forward_norm", shape),
        **_column("feed_forward.up", shape.hidden, shape.ffn_segments, shape.bias),
        **_row("feed_forward.down", shape.ffn, shape.hidden, shape.bias),
    }


@lru_cache(maxsize=16)
def parameter_sizes(shape: GPTShape, tensor: int) -> Mapping[str, int]:
    """Elements of each parameter on one tensor-parallel rank, not yet cut by ZeRO."""
    return MappingProxyType(_parameter_sizes(shape, tensor))


def _parameter_sizes(shape: GPTShape, tensor: int) -> dict[str, int]:
    return {
        name: layout.shard_numel(tensor)
        for name, layout in parameter_layouts(shape, tensor).items()
    }


@lru_cache(maxsize=16)
def block_sizes(shape: GPTShape, tensor: int) -> Mapping[str, int]:
    """Elements of each parameter of one block on one rank."""
    sizes = {name: layout.shard_numel(tensor) for name, layout in block_layouts(shape).items()}
    return MappingProxyType(sizes)


def largest_partition(shape: GPTShape, tensor: int, data: int) -> int:
    """Elements of the largest parameter on one rank, cut by ZeRO-3 among `data` ranks."""
    return -(-max(parameter_sizes(shape, tensor).values()) // data)


def is_matrix(name: str) -> bool:
    """Whether weight decay applies; the optimizer keeps such parameters in a group of their own."""
    return not name.endswith("bias") and "norm" not in name


def _vocabulary(shape: GPTShape, tensor: int) -> ParameterLayout:
    return ParameterLayout((shape.vocab, shape.hidden), 0, (padded_vocab(shape.vocab, tensor),))


def _column(
    name: str, inputs: int, segments: tuple[int, ...], bias: bool
) -> dict[str, ParameterLayout]:
    outputs = sum(segments)
    layouts = {f"{name}.weight": ParameterLayout((outputs, inputs), 0, segments)}
    return layouts | ({f"{name}.bias": ParameterLayout((outputs,), 0, segments)} if bias else {})


def _row(name: str, inputs: int, outputs: int, bias: bool) -> dict[str, ParameterLayout]:
    layouts = {f"{name}.weight": ParameterLayout((outputs, inputs), 1, (inputs,))}
    return layouts | ({f"{name}.bias": ParameterLayout((outputs,))} if bias else {})


def _norm(name: str, shape: GPTShape) -> dict[str, ParameterLayout]:
    layouts = {f"{name}.weight": ParameterLayout((shape.hidden,))}
    if shape.norm == "layernorm":
        layouts[f"{name}.bias"] = ParameterLayout((shape.hidden,))
    return layouts
