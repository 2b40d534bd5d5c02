"""The `model` section of a run file."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from megaphase.config.fields import Count, Epsilon, FractionBelow1, Positive, Section, Word

# Of a model: beyond what has ever been built, and within what an estimate computes at once.
Layers = Annotated[Count, Field(le=2_000)]
Width = Annotated[Count, Field(le=1 << 24)]
Heads = Annotated[Count, Field(le=1 << 16)]

Activation = Literal["swiglu", "geglu", "gelu", "gelu_erf", "xielu"]

SequenceLength = Annotated[Count, Field(le=1 << 27)]

# Of a block: to a sliding window of tokens, or to all.
AttentionKind = Literal["sliding", "full"]

# Keys of each type of scaling beside `type` and `factor`, and their defaults; None: required.
_SCALING_KEYS: dict[str, dict[str, Any]] = {
    "linear": {},
    "llama3": {"original_seq_len": None, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {
        "original_seq_len": None,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": None,
        "truncate": True,
    },
}


class RotaryScalingConfig(Section):
    """Rotary frequencies changed for longer sequences than the model was pre-trained on, as
    published models have them. `linear` divides all of them by `factor`; `llama3` (Llama 3.1)
    divides those whose wavelength is long against `original_seq_len`; `yarn` (Peng et al. 2023)
    interpolates between both by the number of rotations, and scales queries and keys.
    """

    type: Literal["linear", "llama3", "yarn"]
    """Formula of the frequencies."""
    factor: Annotated[float, Field(ge=1, le=1e6)]
    """How many times longer sequences become."""
    original_seq_len: SequenceLength | None = None
    """Sequence length of the pre-training; required by `llama3` and `yarn`."""
    low_freq_factor: Positive | None = None
    """`llama3`: frequencies with at most this many rotations in `original_seq_len` are divided; 1
    if left out."""
    high_freq_factor: Positive | None = None
    """`llama3`: frequencies with at least this many rotations are kept; 4 if left out."""
    beta_fast: Positive | None = None
    """`yarn`: frequencies with more rotations than this are kept; 32 if left out."""
    beta_slow: Positive | None = None
    """`yarn`: frequencies with fewer rotations than this are divided; 1 if left out."""
    attention_factor: Positive | None = None
    """`yarn`: queries and keys are multiplied by it; 0.1 ln(`factor`) + 1 if left out."""
    truncate: bool | None = None
    """`yarn`: whether the bounds between kept and divided frequencies are rounded to whole
    dimensions; `true` if left out."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """Write out the defaults, so that equal scalings are equal sections."""
        if not isinstance(data, dict):
            return data
        given = {key: value for key, value in data.items() if value is not None}
        filled = {
            k: v for k, v in _SCALING_KEYS.get(given.get("type", ""), {}).items() if v
        } | given
        factor = given.get("factor")
        if given.get("type") == "yarn" and isinstance(factor, int | float) and factor >= 1:
            filled.setdefault("attention_factor", 0.1 * math.log(factor) + 1.0)
        return filled

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        known = _SCALING_KEYS[self.type]
        for key in type(self).model_fields:
            if key in ("type", "factor"):
                continue
            if getattr(self, key) is None and key in known:
                raise ValueError(f"{self.type} needs {key}; give it")
            if getattr(self, key) is not None and key not in known:
                raise ValueError(f"{self.type} has no {key}; leave it out")
        if self.type == "llama3":
            assert self.low_freq_factor is not None
            assert self.high_freq_factor is not None
            if self.high_freq_factor <= self.low_freq_factor:
                raise ValueError("high_freq_factor is not above low_freq_factor; raise it")
        if self.type == "yarn":
            assert self.beta_fast is not None
            assert self.beta_slow is not None
            if self.beta_fast <= self.beta_slow:
                raise ValueError("beta_fast is not above beta_slow; raise it")
        return self


RotaryBase = Annotated[float, Field(gt=1, le=1e15)]


class RotaryConfig(Section):
    """Rotary positions of the blocks with the sliding window, where they have others than the
    other blocks (Gemma 3, OLMo 3)."""

    base: RotaryBase = 10_000.0
    """Base of the rotary frequencies."""
    scaling: RotaryScalingConfig | None = None
    """Rotary frequencies for longer sequences; unchanged if left out."""


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

    `z_loss` keeps the scale of the logits from drifting. Only gradients and their norm have it in
    them: the losses that are reported, by task and of the whole batch, and those of validation are
    the cross entropy alone, so that runs with and without it can be compared. A branch may have
    another one, or none.

    `activation_checkpointing: selective` recomputes norms and activation functions, which takes
    next to no time and saves about a third of the activations; `full` recomputes whole blocks,
    which takes a fourth of the step's matrix products and saves nearly all.
    """

    seq_len: SequenceLength
    """Sequence length: the tokens of a sample that the model sees."""
    preset: Word | None = None
    """A named shape, see above."""
    layers: Layers | None = None
    """Transformer blocks."""
    hidden: Width | None = None
    """Width of the residual stream."""
    heads: Heads | None = None
    """Attention heads; must divide `hidden` unless `head_dim` is given."""
    head_dim: Width | None = None
    """Width of a head's queries, keys and values; `hidden` / `heads` if left out."""
    kv_heads: Heads | None = None
    """Key-value heads of grouped-query attention; must divide `heads`, and equals it if left
    out."""
    ffn: Width | None = None
    """Inner width of the feed-forward layers; if left out, 8/3 of `hidden`, rounded up to a
    multiple of 128, with a gate (`swiglu`, `geglu`), and 4 times `hidden` without."""
    vocab: Width | None = None
    """Rows of the embedding; the size of the tokenizer's vocabulary if left out, and never below
    it."""
    norm: Literal["rmsnorm", "layernorm"] | None = None
    """Normalization; `rmsnorm` if left out."""
    norm_position: Literal["after", "both"] | None = None
    """Where an attention or feed-forward layer has its norm: `after` it, before its output is added
    to the residual stream (OLMo 2), or `both` before and after (Gemma 2); before it if left out."""
    parallel_residual: bool | None = None
    """Whether the attention and the feed-forward layer of a block both read the block's input, to
    which their outputs are added together (GPT-NeoX), rather than the second following the first;
    `false` if left out."""
    position: Literal["rotary", "learned"] | None = None
    """Position embedding; `rotary` if left out."""
    zero_centered_norms: bool | None = None
    """Whether RMS norms, those of queries and keys included, multiply by 1 + weight, with weights
    that start at 0 (Gemma); `false` if left out. NVIDIA apex does not compute them."""
    activation: Activation | None = None
    """Activation of the feed-forward layers: gates by SiLU (`swiglu`) or GELU (`geglu`, Gemma), or
    without a gate `gelu`, `gelu_erf` (GPT-NeoX) or `xielu` (Apertus), which learns two scalars a
    layer. GELU is computed by tanh except in `gelu_erf`. `swiglu` if left out."""
    tied_embeddings: bool | None = None
    """Whether embedding and output projection share one matrix; `false` if left out."""
    embedding_multiplier: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Token embeddings are multiplied by it, rounded to the type of the activations; in Gemma it is
    the square root of `hidden`; 1 if left out."""
    logit_softcap: Annotated[float, Field(ge=1e-3, le=1e6)] | None = None
    """Logits x become c tanh(x / c) with this c, in the loss and in generation (Gemma 2); unchanged
    if left out."""
    bias: bool | None = None
    """Whether the linear layers have biases; `false` if left out."""
    qkv_bias: bool | None = None
    """Whether the projection to queries, keys and values has a bias; as `bias` if left out."""
    ffn_bias: bool | None = None
    """Whether the feed-forward layers have biases; as `bias` if left out."""
    qk_norm: Literal["head", "projection"] | None = None
    """RMS norm of queries and keys before their rotation: of each head (`head`, as in Qwen 3), or
    of all heads together (`projection`, as in OLMo 2); none if left out."""
    rotary_base: RotaryBase | None = None
    """Base of the rotary frequencies; 10000 if left out."""
    rotary_dim: Width | None = None
    """Width of the part of each head that is rotated, its first dimensions (GPT-NeoX rotates a
    quarter); all of them if left out."""
    rotary_scaling: RotaryScalingConfig | None = None
    """Rotary frequencies for longer sequences; unchanged if left out."""
    no_rotary_interval: Layers | None = None
    """Every block whose number is a multiple of it, counted from 1, has no rotary positions, nor
    any others (SmolLM 3); all blocks have them if left out."""
    sliding_window: SequenceLength | None = None
    """In `sliding` blocks, a token attends to this many tokens: itself and those before it (Mistral
    0.1); to all before it if left out."""
    attention_pattern: Annotated[list[AttentionKind], Field(min_length=1)] | None = None
    """Which blocks have the sliding window, as a period that repeats over them: `[sliding, full]`
    for every second one from the first on (Gemma 2); all blocks if left out."""
    sliding_rotary: RotaryConfig | None = None
    """Rotary positions of the `sliding` blocks; as `rotary_base` and `rotary_scaling` say if left
    out."""
    attention_scale: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Queries times keys are multiplied by it; 1 / √`head_dim` if left out."""
    attention_softcap: Annotated[float, Field(ge=1e-3, le=1e9)] | None = None
    """Scores s of attention become c · tanh(s / c), with c this number (Gemma 2); unchanged if left
    out."""
    norm_eps: Epsilon | None = None
    """Added to the variance in the norms; 1e-5 if left out."""
    init_std: Annotated[float, Field(gt=0, le=100)] | None = None
    """Standard deviation of the initial weights; 0.02 if left out."""
    dropout: FractionBelow1 = 0.0
    """Fraction of the elements that training drops, of the embedding's output and of the output
    that every attention and feed-forward layer adds to the residual stream; attention probabilities
    are never dropped."""
    z_loss: Annotated[float, Field(gt=0, le=1)] | None = None
    """Training also minimizes it times log²Z of every token with a target, with Z the sum of the
    exponentials of its logits (PaLM: 1e-4); none if left out."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass recomputes instead of keeping them, see below."""

    @model_validator(mode="after")
    def _check_window(self) -> Self:
        for key in ("attention_pattern", "sliding_rotary"):
            if getattr(self, key) is not None and self.sliding_window is None:
                raise ValueError(f"{key} needs sliding_window; give it")
        return self


class PhaseModelConfig(Section):
    """Keys of the `model` section that hold for one phase, in place of their values there. What is
    left out is as in the `model` section, not as in the phase before."""

    seq_len: SequenceLength | None = None
    """Sequence length of the phase; with learned positions at most that of the `model` section."""
    rotary_base: RotaryBase | None = None
    """Base of the rotary frequencies."""
    rotary_scaling: RotaryScalingConfig | None = None
    """Rotary frequencies for longer sequences."""
    sliding_rotary: RotaryConfig | None = None
    """Rotary positions of the `sliding` blocks."""

    @property
    def given(self) -> dict[str, Any]:
        """The keys that are not left out, with their values."""
        return {key: value for key, value in self if value is not None}

    def over(self, model: ModelConfig) -> ModelConfig:
        """The model section with the keys that are given here."""
        return model.model_copy(update=self.given)

    def as_json(self) -> dict[str, Any]:
        """The keys that are given, as in the run file."""
        return self.model_dump(mode="json", exclude_none=True)

    def __str__(self) -> str:
        return ", ".join(f"{key}: {_in_yaml(value)}" for key, value in self.as_json().items())


def _in_yaml(value: Any) -> str:
    """A value as a run file has it on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_in_yaml(each)}" for key, each in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)
