"""The `optimizer` section of a run file."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from megaphase.config.fields import Epsilon, FractionBelow1, PositiveOrZero, Section
from megaphase.utils.names import shown


class OptimizerConfig(Section):
    """The optimizer is AdamW (Loshchilov and Hutter 2019)."""

    betas: Annotated[tuple[FractionBelow1, FractionBelow1], Field(strict=False)] = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    eps: Epsilon = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.1
    """Decoupled weight decay of the matrices; norms and biases have none."""
    clip: PositiveOrZero = 1.0
    """Largest global gradient norm, to which larger gradients are scaled down; 0 does not clip."""

    @model_validator(mode="before")
    @classmethod
    def _accept_name(cls, data: Any) -> Any:
        """Earlier versions had the key `name`, whose only value was adamw."""
        if isinstance(data, dict) and "name" in data:
            if data["name"] != "adamw":
                name = shown(data["name"])
                raise ValueError(
                    f"name is {name}, but the optimizer is always adamw; leave out name"
                )
            data = {key: value for key, value in data.items() if key != "name"}
        return data
