"""Everything beside the activations that the layers of a block need to know about their rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megaphase.model.document_mask import AttentionFn
from megaphase.model.rotary import Rotary
from megaphase.ops.attention import attention as causal_attention


@dataclass(frozen=True)
class ForwardContext:
    """Some rows of a micro-batch, beside their activations.

    Attributes:
        attention: of their queries to their keys and values.
        rotary: rotates queries and keys; None without rotary positions.
        dropout_seeds: int64 [rows], see `dropout.row_seeds`; nothing is dropped without them.
    """

    attention: AttentionFn = causal_attention
    rotary: Rotary | None = None
    dropout_seeds: Tensor | None = None
