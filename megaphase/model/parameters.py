"""The parameters and costs that a model declares, without memory for its parameters.

Everything is read from the layers themselves, each of which specifies its parameters where it
builds
them: the model is built on the meta device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import cast

import torch
from torch import nn

from megaphase.distributed.costs import BACKWARD_PRODUCTS, layers_of
from megaphase.distributed.initialization import OnMeta
from megaphase.distributed.parameter_spec import ParameterSpec, spec_of
from megaphase.distributed.process_grid import ProcessGrid
from megaphase.distributed.sharding import ParameterLayout
from megaphase.model.gpt import GPT, Block
from megaphase.model.shape import GPTShape

_ALONE = ProcessGrid(1, 0, 1, None, None)  # type: ignore[arg-type]  # nothing is sent


@lru_cache(maxsize=64)
def declared_model(shape: GPTShape) -> GPT:
    """The model without memory for its parameters."""
    return GPT(shape, OnMeta(0, torch.float32), _ALONE)


def declared_block(shape: GPTShape) -> Block:
    """One of the blocks of `declared_model`, which have the same parameters and collectives."""
    block = declared_model(shape).blocks[0]
    assert isinstance(block, Block)
    return block


def block_kinds(shape: GPTShape) -> list[tuple[Block, int]]:
    """A block of `declared_model` of each kind, whose costs differ, and how many there are."""
    kinds, blocks = kinds_of_blocks(shape), declared_model(shape).blocks
    return [(cast(Block, blocks[kinds.index(k)]), n) for k, n in sorted(Counter(kinds).items())]


@lru_cache(maxsize=64)
def kinds_of_blocks(shape: GPTShape) -> list[int]:
    """The number of every block's kind, counted from 0 in the order of the first blocks."""
    known: dict[GPTShape, int] = {}
    return [known.setdefault(shape.of_block(i), len(known)) for i in range(shape.layers)]


@lru_cache(maxsize=64)
def parameter_specs(shape: GPTShape) -> Mapping[str, ParameterSpec]:
    """Of every parameter by name, in the order in which the model has them."""
    named = declared_model(shape).named_parameters()
    return MappingProxyType({name: spec_of(parameter) for name, parameter in named})


def parameter_layouts(shape: GPTShape, tensor: int) -> dict[str, ParameterLayout]:
    """How every parameter is sharded over `tensor` tensor-parallel ranks, in the model's order."""
    return {name: spec.layout(tensor) for name, spec in parameter_specs(shape).items()}


@lru_cache(maxsize=64)
def parameter_sizes(shape: GPTShape, tensor: int) -> Mapping[str, int]:
    """Elements of each parameter on one tensor-parallel rank, before ZeRO partitions it."""
    layouts = parameter_layouts(shape, tensor)
    return MappingProxyType({n: layout.shard_numel(tensor) for n, layout in layouts.items()})


def parameter_count(shape: GPTShape) -> int:
    """All trainable parameters, without padding."""
    return sum(spec.numel for spec in parameter_specs(shape).values())


def embedding_name(shape: GPTShape) -> str:
    """The name of the token embedding's weight."""
    model = declared_model(shape)
    named = model.named_parameters()
    return next(name for name, parameter in named if parameter is model.embedding.weight)


def elements_of(module: nn.Module, tensor: int) -> int:
    """Elements of all parameters of a declared module on one tensor-parallel rank."""
    layouts = (spec_of(parameter).layout(tensor) for parameter in module.parameters())
    return sum(layout.shard_numel(tensor) for layout in layouts)


def train_flops_per_token(shape: GPTShape) -> int:
    """Floating-point operations of a forward and backward pass, per token.

    6 N + 12 L H Q T of PaLM (Chowdhery et al. 2022, appendix B): N the weights that multiply every
    token, the second term attention over the whole context. Recomputation of checkpointed
    activations is not counted.
    """
    forward = sum(
        layer.flops_per_token(shape.seq_len) for layer in layers_of(declared_model(shape))
    )
    return forward * (1 + BACKWARD_PRODUCTS)


def matmul_parameters(shape: GPTShape) -> int:
    """Weights that multiply every token: all linear layers and the output projection."""
    return sum(layer.flops_per_token(0) for layer in layers_of(declared_model(shape))) // 2


def largest_partition(shape: GPTShape, tensor: int, data: int) -> int:
    """Elements of the largest parameter on one rank, partitioned by ZeRO-3 over `data` ranks."""
    return -(-max(parameter_sizes(shape, tensor).values()) // data)
