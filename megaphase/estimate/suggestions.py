"""Layouts that fit a card, and changes that would make a run fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations, islice
from math import isqrt
from typing import Literal

from megaphase.estimate.memory import estimate
from megaphase.estimate.setup import Setup

# As cards are sold: 2^30 bytes.
GB = 1 << 30
# Of a card, for the CUDA context, NCCL's buffers and the gaps between the allocator's blocks.
RESERVE = 0.06
TENSOR_SIZES = (1, 2, 4, 8)
ZERO_STAGES = (0, 1, 2, 3)
# Recomputation in the backward pass: more and more.
CHECKPOINTING: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
# Changes of a run file that are looked at together to make a layout fit, and how many are named.
CHANGES_AT_ONCE = 3
REMEDIES = 3


def fits(setup: Setup, card_gb: float) -> bool:
    """Return whether a layout's memory leaves the reserve of the card."""
    return estimate(setup).total <= card_gb * GB * (1 - RESERVE)


def layouts(setup: Setup) -> list[Setup]:
    """The run's own layout first, then all others of as many processes that the run can have."""
    processes = setup.tensor * setup.data
    found = [setup]
    for tensor in sorted({*TENSOR_SIZES, setup.tensor}):
        if not _shares_out(setup, tensor, processes):
            continue
        for zero in ZERO_STAGES:
            other = replace(_on_grid(setup, tensor, processes), zero=zero)
            if other not in found and _offloads(other):
                found.append(other)
    return found


def _on_grid(setup: Setup, tensor: int, processes: int) -> Setup:
    return setup.with_processes(tensor, processes // tensor)


def _shares_out(setup: Setup, tensor: int, processes: int) -> bool:
    """Return whether tensor ranks share the model, and data-parallel ranks the batch, evenly."""
    shape = setup.shape
    sizes = [processes, shape.heads, shape.kv_heads, shape.ffn]
    if setup.sequence:
        sizes.append(shape.seq_len)
    if any(size % tensor for size in sizes):
        return False
    return setup.samples % (processes // tensor * setup.micro) == 0


def _offloads(setup: Setup) -> bool:
    """Return whether the stage supports the offload that the run file requests."""
    least = {"none": 0, "cpu": 1, "nvme": 3}[setup.offload]
    return setup.zero >= (3 if setup.offload_parameters != "none" else least)


def all_kept(setup: Setup) -> Setup | None:
    """The same layout with all weights kept gathered; None where they are, or cannot be."""
    if setup.zero < 3 or setup.data == 1 or setup.offload_parameters != "none":
        return None
    return replace(setup, keep_gathered=1.0) if setup.keep_gathered < 1 else None


def partitioned_in_nodes(setup: Setup, gpus_per_node: int) -> Setup | None:
    """The same layout with a second partition of the weights in every node; None where it has one,
    or cannot have it, or is of one node."""
    possible = setup.zero == 3 and setup.tensor == 1 and setup.offload_parameters == "none"
    if not possible or setup.secondary is not None or gpus_per_node == 1:
        return None
    if setup.data == gpus_per_node or setup.data % gpus_per_node:
        return None
    return replace(setup, secondary=gpus_per_node)


@lru_cache(maxsize=64)
def _divisors(number: int) -> list[int]:
    """From the largest to 1."""
    small = [each for each in range(1, isqrt(number) + 1) if number % each == 0]
    return sorted({*small, *(number // each for each in small)}, reverse=True)


@dataclass(frozen=True)
class _Change:
    words: str
    key: str
    setup: Setup


def suggestions(setup: Setup, card_gb: float) -> list[str]:
    """The fewest changes of the run file that would make the layout fit.

    Empty if it fits already, or if nothing that is looked at is enough.
    """
    if fits(setup, card_gb):
        return []
    for count in range(1, CHANGES_AT_ONCE + 1):
        keys = combinations(dict.fromkeys(change.key for change in _changes(setup)), count)
        mildest = (_mildest(setup, chosen, card_gb) for chosen in keys)
        enough = list(islice((words for words in mildest if words), REMEDIES))
        if enough:
            return enough
    return []


def _mildest(setup: Setup, keys: tuple[str, ...], card_gb: float) -> str | None:
    """The first way to change these settings that is enough."""
    ways = _apply(setup, keys, [])
    return next((words for words, changed in ways if fits(changed, card_gb)), None)


def _apply(setup: Setup, keys: tuple[str, ...], words: list[str]) -> Iterator[tuple[str, Setup]]:
    if not keys:
        yield " and ".join(words), setup
        return
    for change in _changes(setup):
        if change.key == keys[0]:
            yield from _apply(change.setup, keys[1:], [*words, change.words])


def _changes(setup: Setup) -> Iterator[_Change]:
    """Single changes that save memory."""
    processes = setup.tensor * setup.data
    if setup.keep_gathered > 0:
        yield _Change("keep_gathered: 0.0", "keep_gathered", replace(setup, keep_gathered=0.0))
    if setup.secondary is not None:
        unset = replace(setup, secondary=None)
        yield _Change("no secondary_partition", "secondary_partition", unset)
    for zero in range(setup.zero + 1, max(ZERO_STAGES) + 1):
        yield _Change(f"zero {zero}", "zero", replace(setup, zero=zero))
    now = CHECKPOINTING.index(setup.shape.activation_checkpointing)
    for stage in CHECKPOINTING[now + 1 :]:
        shape = replace(setup.shape, activation_checkpointing=stage)
        changed = replace(setup, shape=shape)
        yield _Change(f"activation_checkpointing: {stage}", "checkpointing", changed)
    for micro in _divisors(setup.micro * setup.accumulation):
        if micro < setup.micro:
            yield _Change(f"micro {micro}", "micro", setup.with_micro(micro))
    if setup.tensor > 1 and not setup.sequence and setup.shape.seq_len % setup.tensor == 0:
        yield _Change("sequence: true", "sequence", replace(setup, sequence=True))
    larger = TENSOR_SIZES if setup.secondary is None else ()
    for tensor in larger:
        if tensor > setup.tensor and _shares_out(setup, tensor, processes):
            yield _Change(f"tensor {tensor}", "tensor", _on_grid(setup, tensor, processes))
    if setup.accumulation % 2 == 0:
        changed = setup.with_processes(setup.tensor, 2 * setup.data)
        yield _Change(f"{2 * processes} GPUs", "processes", changed)
    if setup.offload == "none" and setup.zero > 0:
        yield _Change("offload: cpu", "offload", replace(setup, offload="cpu"))
    unkept = setup.zero == 3 and setup.keep_gathered == 0 and setup.secondary is None
    if setup.offload == "cpu" and setup.offload_parameters == "none" and unkept:
        changed = replace(setup, offload_parameters="cpu")
        yield _Change("offload_parameters: cpu", "offload_parameters", changed)
