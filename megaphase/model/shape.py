"""The GPT's shape: every size and choice that determines its parameters and its arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

from megaphase.model.config import (
    Activation,
    AttentionKind,
    RotaryConfig,
    RotaryScalingConfig,
)

GATED = {"swiglu", "geglu"}
NOT_ARCHITECTURE = {"init_std", "dropout", "activation_checkpointing", "z_loss"}


@dataclass(frozen=True)
class GPTShape:
    """Sizes and choices of a decoder-only transformer (Llama- or GPT-2-like, or between).

    Options that are None are not there, or follow from others; a value that says no more than that
    becomes None, so that equal models have equal shapes.

    learned_positions: how many there are, where a phase's `seq_len` is below that.
    """

    vocab: int
    seq_len: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    position: Literal["rotary", "learned"] = "rotary"
    activation: Activation = "swiglu"
    tied_embeddings: bool = False
    bias: bool = False
    rotary_base: float = 10_000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02
    dropout: float = 0.0
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    head_dim: int | None = None
    qkv_bias: bool | None = None
    rotary_scaling: RotaryScalingConfig | None = None
    qk_norm: Literal["head", "projection"] | None = None
    norm_position: Literal["after", "both"] | None = None
    no_rotary_interval: int | None = None
    zero_centered_norms: bool | None = None
    embedding_multiplier: float | None = None
    logit_softcap: float | None = None
    z_loss: float | None = None
    sliding_window: int | None = None
    attention_pattern: tuple[AttentionKind, ...] | None = None
    sliding_rotary: RotaryConfig | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    ffn_bias: bool | None = None
    rotary_dim: int | None = None
    parallel_residual: bool | None = None
    learned_positions: int | None = None

    def __post_init__(self) -> None:
        if self.head_dim is not None and self.head_dim * self.heads == self.hidden:
            object.__setattr__(self, "head_dim", None)
        for key in ("qkv_bias", "ffn_bias"):
            if getattr(self, key) == self.bias:
                object.__setattr__(self, key, None)
        if self.no_rotary_interval is not None and self.no_rotary_interval > self.layers:
            object.__setattr__(self, "no_rotary_interval", None)
        for key in ("zero_centered_norms", "parallel_residual"):
            if not getattr(self, key):
                object.__setattr__(self, key, None)
        if self.position != "learned" or self.learned_positions == self.seq_len:
            object.__setattr__(self, "learned_positions", None)
        if self.rotary_dim == self.head_size:
            object.__setattr__(self, "rotary_dim", None)
        if self.embedding_multiplier == 1:
            object.__setattr__(self, "embedding_multiplier", None)
        if self.attention_scale and self.attention_scale == max(self.head_size, 1) ** -0.5:
            object.__setattr__(self, "attention_scale", None)
        self._simplify_pattern()

    def _simplify_pattern(self) -> None:
        """Make the pattern the shortest one, None where all blocks have the window; and forget what
        no block has."""
        pattern = None
        if self.sliding_window is not None and self.attention_pattern is not None:
            pattern = shortest_pattern(self.attention_pattern, self.layers)
            if "sliding" not in pattern:
                object.__setattr__(self, "sliding_window", None)
            if len(pattern) == 1:
                pattern = None
        object.__setattr__(self, "attention_pattern", pattern)
        if self.sliding_window is None or self.sliding_rotary == self.rotary:
            object.__setattr__(self, "sliding_rotary", None)

    def architecture(self) -> dict[str, Any]:
        """All fields that determine the weights' shapes and the function that they compute: without
        those of initialization and training, and without options that are None."""
        known = {field.name: getattr(self, field.name) for field in fields(self)}
        for key in ("rotary_scaling", "sliding_rotary"):
            if known[key] is not None:
                known[key] = known[key].model_dump(exclude_none=True)
        if self.attention_pattern is not None:
            known["attention_pattern"] = list(self.attention_pattern)
        return {
            key: value
            for key, value in known.items()
            if key not in NOT_ARCHITECTURE and value is not None
        }

    @classmethod
    def from_architecture(cls, architecture: Mapping[str, Any]) -> Self:
        """The shape that `architecture` describes.

        Raises:
            TypeError: a field is missing or unknown.
            ValueError: the scaling of rotary positions is none.
        """
        wanted = {f.name: f.default for f in fields(cls) if f.name not in NOT_ARCHITECTURE}
        needed = {name for name, default in wanted.items() if default is not None}
        if not needed <= set(architecture) <= set(wanted):
            raise TypeError(f"other fields than {sorted(wanted)}")
        options = dict(architecture)
        for key, section in (
            ("rotary_scaling", RotaryScalingConfig),
            ("sliding_rotary", RotaryConfig),
        ):
            if options.get(key) is not None:
                options[key] = section.model_validate(options[key])
        return cls(**options)

    @property
    def position_rows(self) -> int:
        """How many positions are learned, where they are."""
        return self.seq_len if self.learned_positions is None else self.learned_positions

    def with_all_positions(self) -> Self:
        """The same model with a `seq_len` for which all of its learned positions are used."""
        return replace(self, seq_len=self.position_rows, learned_positions=None)

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads if self.head_dim is None else self.head_dim

    @property
    def attention_width(self) -> int:
        """Width of the queries of all heads together."""
        return self.heads * self.head_size

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the projection to queries, keys and values has a bias."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def has_ffn_bias(self) -> bool:
        """Whether the feed-forward layers have biases."""
        return self.bias if self.ffn_bias is None else self.ffn_bias

    @property
    def rotary_size(self) -> int:
        """Width of the part of a head that is rotated."""
        return self.head_size if self.rotary_dim is None else self.rotary_dim

    @property
    def residual_init_std(self) -> float:
        """Layers that write to the residual stream start smaller (Radford et al. 2019, section
        2.3)."""
        return self.init_std / math.sqrt(2 * self.layers)

    def has_rotary(self, block: int) -> bool:
        """Whether a block, counted from 0, has rotary positions."""
        interval = self.no_rotary_interval
        return self.position == "rotary" and (interval is None or (block + 1) % interval != 0)

    def slides(self, block: int) -> bool:
        """Whether a block, counted from 0, has the sliding window."""
        pattern = self.attention_pattern or ("sliding",)
        return self.sliding_window is not None and pattern[block % len(pattern)] == "sliding"

    def of_block(self, block: int) -> Self:
        """The shape of a model whose blocks are all like this one in their attention."""
        if self.attention_pattern is None and self.sliding_rotary is None:
            return self
        slides = self.slides(block)
        rotary = self.sliding_rotary if slides else None
        return replace(
            self,
            sliding_window=self.sliding_window if slides else None,
            attention_pattern=None,
            sliding_rotary=None,
            rotary_base=self.rotary_base if rotary is None else rotary.base,
            rotary_scaling=self.rotary_scaling if rotary is None else rotary.scaling,
        )

    @property
    def rotary(self) -> RotaryConfig:
        """Rotary positions of the blocks without sliding window, and of all if `sliding_rotary` is
        None."""
        return RotaryConfig(base=self.rotary_base, scaling=self.rotary_scaling)

    @property
    def window(self) -> int | None:
        """How many tokens a token attends to in a block with the sliding window; None: to all
        before it, since there are no more."""
        window = self.sliding_window
        return None if window is None or window >= self.seq_len else window

    @property
    def norm_before(self) -> bool:
        """Whether an attention or feed-forward layer has a norm before it."""
        return self.norm_position != "after"

    @property
    def norm_after(self) -> bool:
        """Whether it has one after it."""
        return self.norm_position is not None

    @property
    def qkv_segments(self) -> tuple[int, int, int]:
        """Rows of the query, key and value parts of the fused projection."""
        kv = self.kv_heads * self.head_size
        return self.attention_width, kv, kv

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layers have a gate."""
        return self.activation in GATED

    @property
    def ffn_segments(self) -> tuple[int, ...]:
        """Rows of the first feed-forward projection: gate and up, or without a gate up alone."""
        return (self.ffn, self.ffn) if self.gated else (self.ffn,)


def shortest_pattern(kinds: Sequence[AttentionKind], layers: int) -> tuple[AttentionKind, ...]:
    """The shortest period that gives the same kinds to `layers` blocks as `kinds`, repeated."""
    every = tuple(kinds[block % len(kinds)] for block in range(layers))
    period = next(n for n in range(1, layers + 1) if every[n:] == every[: layers - n])
    return every[:period]
