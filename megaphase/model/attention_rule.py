"""What the attention of a block is beside its projections: which tokens, and how scores count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from megaphase.model.shape import GPTShape


@dataclass(frozen=True)
class AttentionRule:
    """Of blocks whose attention differs in nothing but weights and positions.

    Attributes:
        window: the most tokens that a token attends to, itself included; None: all before it.
        scale: by which scores are multiplied; None: 1 / √head_dim.
        softcap: scores s become softcap · tanh(s / softcap); None: they stay as they are.
    """

    window: int | None = None
    scale: float | None = None
    softcap: float | None = None

    @classmethod
    def of(cls, shape: GPTShape) -> Self:
        """That of the blocks of a shape, which are alike (`GPTShape.of_block`)."""
        return cls(shape.window, shape.attention_scale, shape.attention_softcap)


PLAIN = AttentionRule()
