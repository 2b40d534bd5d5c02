"""Which weights ZeRO-3 keeps gathered between micro-batches, and which it gathers how often.

Read off DeepSpeed 0.19.8: `partitioned_param_coordinator.py` gives weights back after use, and
`_post_step` in `stage3.py` gathers those that are kept at the end of every optimizer step.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import lru_cache

from megaphase.estimate.gather_trace import (
    BLOCKS,
    Gathered,
    GatherLimits,
    gathered_in_a_micro_batch,
)
from megaphase.utils.decimals import as_written

# Elements. Smaller parameters stay gathered in any case.
PERSISTENT_PARAMETER = 100_000
# Weights of a block stay from the forward to the backward pass if fewer than so many are used
# between them and the loss. DeepSpeed's default.
REUSE_DISTANCE = 1_000_000_000
# A message that a network sends at its full speed.
MESSAGE = 1 << 24


def kept_gathered(sizes: Mapping[str, int], share: float) -> set[str]:
    """The parameters that stay gathered from one optimizer step to the next, by name.

    Small ones, and beyond them in the model's order whole blocks (or embedding, or head) that
    still fit into a share of all elements. Of a block that is gathered at once, a part would save
    no collective; what the forward pass begins with is what nothing hides and what has the longest
    way to its next use.

    sizes: elements of each parameter, in the model's order.
    """
    kept = {name for name, size in sizes.items() if size <= PERSISTENT_PARAMETER}
    room = as_written(share) * sum(sizes.values()) - sum(sizes[name] for name in kept)
    for piece in _pieces(sizes):
        size = sum(sizes[name] for name in piece if name not in kept)
        if size <= room:
            kept.update(piece)
            room -= size
    return kept


def _pieces(sizes: Mapping[str, int]) -> list[list[str]]:
    """Parameters that are gathered together: those of a block; each of the others by itself."""
    pieces: dict[str, list[str]] = {}
    for name in sizes:
        pieces.setdefault(".".join(name.split(".")[:2]), []).append(name)
    return list(pieces.values())


def gather_limits(sizes: Mapping[str, int], share: float) -> GatherLimits:
    """DeepSpeed's limits for a model whose parameters have these sizes on a tensor-parallel rank.

    With every block the next one is asked for, so that it arrives while that one is computed; of
    small blocks, as many as make a message. The limit on all gathered weights leaves room for it
    beside those that stay from the forward to the backward pass.
    """
    kept = frozenset(kept_gathered(sizes, share))
    bucket = block_bucket(sizes, kept)
    unlimited = sum(sizes.values())
    stay = _traced(tuple(sizes.items()), kept, GatherLimits(0, REUSE_DISTANCE, unlimited)).at_loss
    return GatherLimits(prefetch=bucket, reuse=REUSE_DISTANCE, live=stay + bucket)


def block_bucket(sizes: Mapping[str, int], kept: Set[str] = frozenset()) -> int:
    """Elements of a block, or of as many small blocks as make a message.

    kept: parameters that do not count, unless they are all.
    """
    blocks = [piece for piece in _pieces(sizes) if piece[0].startswith(BLOCKS)]
    without = max(sum(sizes[name] for name in piece if name not in kept) for piece in blocks)
    block = without or max(sum(sizes[name] for name in piece) for piece in blocks)
    return block * max(1, MESSAGE // block)


def reduce_bucket(sizes: Mapping[str, int]) -> int:
    """Elements of gradients that stages 2 and 3, and stage 1 in fp32, reduce together: a block's,
    or the largest parameter's."""
    return max(block_bucket(sizes), *sizes.values())


@dataclass(frozen=True)
class Gathering:
    """Elements by when they are gathered.

    kept: once an optimizer step, at its end
    passes: in every micro-batch
    """

    kept: int
    passes: Gathered


def gathering(sizes: Mapping[str, int], share: float) -> Gathering:
    """How often the parameters are gathered if a share of them is kept, see `kept_gathered`."""
    kept = frozenset(kept_gathered(sizes, share))
    limits = gather_limits(sizes, share)
    return Gathering(sum(sizes[name] for name in kept), _traced(tuple(sizes.items()), kept, limits))


@lru_cache(maxsize=256)
def _traced(
    sizes: tuple[tuple[str, int], ...], kept: frozenset[str], limits: GatherLimits
) -> Gathered:
    return gathered_in_a_micro_batch(dict(sizes), kept, limits)
