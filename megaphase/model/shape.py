"""The GPT's shape: every size and choice that determines its parameters and its arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

NOT_ARCHITECTURE = {"init_std", "dropout", "activation_checkpointing"}


@dataclass(frozen=True)
class GPTShape:
    """Sizes and choices of a decoder-only transformer (Llama- or GPT-2-like, or between)."""

    vocab: int
    seq_len: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    position: Literal["rotary", "learned"] = "rotary"
    activation: Literal["swiglu", "gelu"] = "swiglu"
    tied_embeddings: bool = False
    bias: bool = False
    rotary_base: float = 10_000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02
    dropout: float = 0.0
    activation_checkpointing: Literal["none", "selective", "full"] = "none"

    def architecture(self) -> dict[str, Any]:
        """All fields that determine the weights' shapes and the function that they compute: without
        those of initialization and training."""
        return {key: value for key, value in asdict(self).items() if key not in NOT_ARCHITECTURE}

    @classmethod
    def from_architecture(cls, architecture: Mapping[str, Any]) -> Self:
        """The shape that `architecture` describes.

        Raises:
            TypeError: a field is missing or unknown.
        """
        wanted = {field.name for field in fields(cls)} - NOT_ARCHITECTURE
        if wanted != set(architecture):
            raise TypeError(f"other fields than {sorted(wanted)}")
        return cls(**architecture)

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def residual_init_std(self) -> float:
        """Layers that write to the residual stream start smaller (Radford et al. 2019, section
        2.3)."""
        return self.init_std / math.sqrt(2 * self.layers)

    @property
    def qkv_segments(self) -> tuple[int, int, int]:
        """Rows of the query, key and value parts of the fused projection."""
        kv = self.kv_heads * self.head_dim
        return self.hidden, kv, kv

    @property
    def ffn_segments(self) -> tuple[int, ...]:
        """Rows of the first feed-forward projection: gate and up for SwiGLU."""
        return (self.ffn, self.ffn) if self.activation == "swiglu" else (self.ffn,)
