"""AdamW over the model's parameters, in the implementation chosen by the run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megaphase.distributed.parameter_spec import spec_of
from megaphase.optim.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig, name: str) -> torch.optim.Optimizer:
    """Return a fused AdamW (Loshchilov and Hutter 2019).

    name: the implementation, torch or apex.
    """
    build: Any = _apex_adamw if name == "apex" else torch.optim.AdamW
    optimizer: torch.optim.Optimizer = build(
        _parameter_groups(model, config.weight_decay),
        lr=0.0,  # DeepSpeed takes a step on zero gradients at the start, which must do nothing
        betas=config.betas,
        eps=config.eps,
        **({} if name == "apex" else {"fused": True}),
    )
    return optimizer


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups, with weight decay and without, according to the parameters' specifications."""
    parameters = list(model.parameters())
    return [
        {
            "params": [each for each in parameters if spec_of(each).weight_decay == decays],
            "weight_decay": weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]


def _apex_adamw(groups: list[dict[str, object]], **options: Any) -> torch.optim.Optimizer:
    from apex.optimizers import FusedAdam

    class ApexAdamW(FusedAdam):  # type: ignore[misc]  # apex has no types
        """Stores the step count in every parameter's state, as torch does.

        apex stores it in the group, where neither a reset nor a checkpoint finds it.
        """

        def step(self, *arguments: Any, **settings: Any) -> Any:
            for group in self.param_groups:
                states = [self.state[p] for p in group["params"] if self.state.get(p)]
                group["step"] = max((int(state["step"]) for state in states), default=0)
            result = super().step(*arguments, **settings)
            for group in self.param_groups:
                steps = torch.tensor(float(group.pop("step")))
                for state in (self.state.get(p) for p in group["params"]):
                    if state:
                        state["step"] = steps.clone()
            return result

    return ApexAdamW(groups, adam_w_mode=True, **options)
