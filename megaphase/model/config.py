"""The `model` section of a run file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megaphase.config.fields import Count, Epsilon, FractionBelow1, Section, Word

# Of a model: beyond what has ever been built, and within what an estimate computes at once.
Layers = Annotated[Count, Field(le=2_000)]
Width = Annotated[Count, Field(le=1 << 24)]
Heads = Annotated[Count, Field(le=1 << 16)]


class ModelConfig(Section):
    """The GPT's shape: a preset, explicit sizes, or a preset with some sizes changed.

    dropout: of the embedding's output and of what every layer adds to it, in training alone.
    """

    seq_len: Annotated[Count, Field(le=1 << 27)]
    preset: Word | None = None
    layers: Layers | None = None
    hidden: Width | None = None
    heads: Heads | None = None
    kv_heads: Heads | None = None
    ffn: Width | None = None
    vocab: Width | None = None
    norm: Literal["rmsnorm", "layernorm"] | None = None
    position: Literal["rotary", "learned"] | None = None
    activation: Literal["swiglu", "gelu"] | None = None
    tied_embeddings: bool | None = None
    bias: bool | None = None
    rotary_base: Annotated[float, Field(ge=1, le=1e15)] | None = None
    norm_eps: Epsilon | None = None
    init_std: Annotated[float, Field(gt=0, le=100)] | None = None
    dropout: FractionBelow1 = 0.0
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
