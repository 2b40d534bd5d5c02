"""The `optimizer` section of a run file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megaphase.config.fields import Epsilon, FractionBelow1, PositiveOrZero, Section


class OptimizerConfig(Section):
    """AdamW (Loshchilov and Hutter 2019); clip is the largest global gradient norm, 0 is none."""

    name: Literal["adamw"] = "adamw"
    betas: Annotated[tuple[FractionBelow1, FractionBelow1], Field(strict=False)] = (0.9, 0.95)
    eps: Epsilon = 1e-8
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.1
    clip: PositiveOrZero = 1.0
