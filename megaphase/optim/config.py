"""The `optimizer` section of a run file: one class for each optimizer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from megaphase.config.fields import Epsilon, FractionBelow1, PositiveOrZero, Section
from megaphase.utils.names import shown
from megaphase.utils.validation_errors import hint, union_tag

Betas = Annotated[tuple[FractionBelow1, FractionBelow1], Field(strict=False)]
Decay = Annotated[float, Field(ge=0, le=100)]


class AdamWConfig(Section):
    """The optimizer is AdamW (Loshchilov and Hutter 2019), or the one that `name` names:
    [`adafactor`](#optimizer-with-name-adafactor), [`lion`](#optimizer-with-name-lion) or
    [`muon`](#optimizer-with-name-muon). [optimizers.md](optimizers.md) compares them. Which keys
    there are depends on `name`."""

    # Not in run.json, so that run directories of versions that had AdamW alone are the same.
    name: Literal["adamw"] = Field(default="adamw", exclude=True)
    """The optimizer: `adamw`, `adafactor`, `lion` or `muon`."""
    betas: Betas = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    eps: Epsilon = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Decay = 0.1
    """Decoupled weight decay of the matrices; norms and biases have none."""
    clip: PositiveOrZero = 1.0
    """Largest global gradient norm, to which larger gradients are scaled down; 0 does not clip."""


class AdafactorConfig(Section):
    """Adafactor (Shazeer and Stern 2018, arXiv 1804.04235): of the second moment of a matrix it
    stores the means of rows and of columns alone. The defaults are those of T5 but for `clip`: no
    momentum, updates in proportion to the weights, no weight decay. PaLM had `beta1: 0.9` and did
    not factor its matrices, which this program always does."""

    name: Literal["adafactor"]
    """The optimizer."""
    beta1: FractionBelow1 | None = None
    """Decay rate of a momentum of the updates; without it none is stored."""
    decay_exponent: Annotated[float, Field(gt=0, le=10)] = 0.8
    """The decay rate of the second moment in step t is 1 − t to the power of minus this."""
    eps: Epsilon = 1e-30
    """Added to squared gradients."""
    update_clip: Annotated[float, Field(ge=1e-6, le=1e9)] = 1.0
    """Largest root mean square of a parameter's update before it is multiplied by the learning
    rate, to which larger ones are scaled down."""
    scale_by_weights: bool = True
    """Whether updates are multiplied by the root mean square of their parameter."""
    smallest_scale: Annotated[float, Field(ge=1e-30, le=1e9)] = 1e-3
    """Smallest factor of `scale_by_weights`."""
    weight_decay: Decay = 0.0
    """Decoupled weight decay of the matrices; norms and biases have none."""
    clip: PositiveOrZero = 1.0
    """Largest global gradient norm, to which larger gradients are scaled down; 0 does not clip."""


class LionConfig(Section):
    """Lion (Chen et al. 2023, arXiv 2302.06675): the sign of a momentum, of which one is stored
    for each weight. Its updates are larger than AdamW's, so its peak learning rates are 3 to 10
    times smaller, and its weight decay larger by the same factor."""

    name: Literal["lion"]
    """The optimizer."""
    betas: Betas = (0.9, 0.99)
    """Weights of the momentum in the update, and of the momentum in the next one."""
    weight_decay: Decay = 1.0
    """Decoupled weight decay of the matrices; norms and biases have none."""
    clip: PositiveOrZero = 1.0
    """Largest global gradient norm, to which larger gradients are scaled down; 0 does not clip."""


class MuonAdamWConfig(Section):
    """AdamW within Muon, for embeddings, output projection, norms and biases."""

    learning_rate_factor: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Their learning rate, as a multiple of the phase's."""
    betas: Betas = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    eps: Epsilon = 1e-8
    """Added to the root of the second moment."""


class MuonConfig(Section):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): the momentum of each matrix of
    the layers, made roughly orthogonal by Newton–Schulz iterations; queries, keys and values, and
    the two halves of a gated feed-forward layer, are matrices of their own. Each is computed whole
    on one process, whatever the layout, in the precision of the run. Everything else is trained by
    AdamW."""

    name: Literal["muon"]
    """The optimizer."""
    momentum: FractionBelow1 = 0.95
    """Decay rate of the momentum, which is Nesterov's."""
    iterations: Annotated[int, Field(ge=1, le=100)] = 5
    """Newton–Schulz iterations."""
    scale: Literal["match_adamw", "original"] = "match_adamw"
    """Factor of the updates of a matrix of m × n: `match_adamw`, 0.2 √max(m, n), so that learning
    rates and weight decay are those of AdamW (Liu et al. 2025, arXiv 2502.16982); `original`,
    √max(1, m/n), with learning rates near 0.02."""
    weight_decay: Decay = 0.1
    """Decoupled weight decay of all matrices; norms and biases have none."""
    clip: PositiveOrZero = 1.0
    """Largest global gradient norm, to which larger gradients are scaled down; 0 does not clip."""
    adamw: MuonAdamWConfig = MuonAdamWConfig()
    """AdamW for everything but the matrices of the layers."""


NAMES = ("adamw", "adafactor", "lion", "muon")


def _known_name(value: Any) -> Any:
    """Reject another name; earlier versions had AdamW alone, and later ones leave its name out."""
    name = value.get("name", "adamw") if isinstance(value, dict) else "adamw"
    if name not in NAMES:
        known = hint(name, NAMES, "the optimizers are") if isinstance(name, str) else None
        raise ValueError(f"name is {shown(name)}; {known or 'it is one of ' + ', '.join(NAMES)}")
    return value


def _tag(value: Any) -> str:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return union_tag(str(name or "adamw"))


OptimizerConfig = Annotated[
    Annotated[AdamWConfig, Tag(union_tag("adamw"))]
    | Annotated[AdafactorConfig, Tag(union_tag("adafactor"))]
    | Annotated[LionConfig, Tag(union_tag("lion"))]
    | Annotated[MuonConfig, Tag(union_tag("muon"))],
    Discriminator(_tag),
    BeforeValidator(_known_name),
]

DEFAULT_OPTIMIZER = AdamWConfig()
