"""Which weights ZeRO-3 keeps gathered between micro-batches, and which it gathers how often.

Read off DeepSpeed 0.19.8: `partitioned_param_coordinator.py` gives weights back after use, and
`_post_step` in `stage3.py` gathers those that are kept at the end of every optimizer step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megaphase.utils.decimals import as_written

# Elements. Smaller parameters stay gathered in any case.
PERSISTENT_PARAMETER = 100_000
# A weight that is used again before so many others have been used is not given back.
REUSE_DISTANCE = 1_000_000_000


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


@dataclass(frozen=True)
class Gathering:
    """Elements by how often they are gathered.

    kept:   once an optimizer step, at its end
    reused: in every forward pass, and still there for its backward pass
    twice:  in both passes of every micro-batch
    """

    kept: int
    reused: int
    twice: int


def gathering(sizes: Mapping[str, int], share: float) -> Gathering:
    """How often the parameters are gathered if a share of them is kept, see `kept_gathered`."""
    kept = sum(sizes[name] for name in kept_gathered(sizes, share))
    others = sum(sizes.values()) - kept
    # The way from a weight's use in the forward pass to the loss, and back again.
    reused = min(others, REUSE_DISTANCE // 2)
    return Gathering(kept, reused, others - reused)
