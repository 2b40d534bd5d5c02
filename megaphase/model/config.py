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
    """The shape of the GPT. Give a preset, or `layers`, `hidden` and `heads`; sizes given beside a
    preset replace the preset's. The presets are `gpt-1m`, `gpt-3m`, `gpt-6m`, `gpt-14m`, `gpt-30m`,
    `gpt-125m`, `gpt-350m`, `gpt-760m`, `gpt-1.3b`, `gpt-2.7b`, `gpt-6.7b` and `gpt-13b`. Their
    names give the parameters, roughly: up to `gpt-30m` without embeddings, from `gpt-125m` on with
    one. `megaphase train` refuses a model whose weights and optimizer state do not fit the memory
    of the GPU, or of the machine.

    The dropout masks depend only on `seed`, the step, the sample and the layer, and the rate is
    rounded to a multiple of 1/65,536. Validation, generation and converted models have no dropout,
    and a branch may have another rate than its first phase.

    `activation_checkpointing: selective` recomputes norms, SwiGLU and GELU, which takes next to no
    time and saves about a third of the activations; `full` recomputes whole blocks, which takes a
    fourth of the step's matrix products and saves nearly all.
    """

    seq_len: Annotated[Count, Field(le=1 << 27)]
    """Sequence length: the tokens of a sample that the model sees."""
    preset: Word | None = None
    """A named shape, see above."""
    layers: Layers | None = None
    """Transformer blocks."""
    hidden: Width | None = None
    """Width of the residual stream."""
    heads: Heads | None = None
    """Attention heads; must divide `hidden`."""
    kv_heads: Heads | None = None
    """Key-value heads of grouped-query attention; must divide `heads`, and equals it if left
    out."""
    ffn: Width | None = None
    """Inner width of the feed-forward layers; if left out, 8/3 of `hidden`, rounded up to a
    multiple of 128, for `swiglu`, and 4 times `hidden` for `gelu`."""
    vocab: Width | None = None
    """Rows of the embedding; the size of the tokenizer's vocabulary if left out, and never below
    it."""
    norm: Literal["rmsnorm", "layernorm"] | None = None
    """Normalization; `rmsnorm` if left out."""
    position: Literal["rotary", "learned"] | None = None
    """Position embedding; `rotary` if left out."""
    activation: Literal["swiglu", "gelu"] | None = None
    """Activation of the feed-forward layers; `swiglu` if left out."""
    tied_embeddings: bool | None = None
    """Whether embedding and output projection share one matrix; `false` if left out."""
    bias: bool | None = None
    """Whether the linear layers have biases; `false` if left out."""
    rotary_base: Annotated[float, Field(ge=1, le=1e15)] | None = None
    """Base of the rotary frequencies; 10000 if left out."""
    norm_eps: Epsilon | None = None
    """Added to the variance in the norms; 1e-5 if left out."""
    init_std: Annotated[float, Field(gt=0, le=100)] | None = None
    """Standard deviation of the initial weights; 0.02 if left out."""
    dropout: FractionBelow1 = 0.0
    """Fraction of the elements that training drops, of the embedding's output and of the output
    that every attention and feed-forward layer adds to the residual stream; attention probabilities
    are never dropped."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass recomputes instead of keeping them, see below."""
