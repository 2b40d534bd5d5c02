"""The optimizer over the model's parameters, in the implementation chosen by the run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megaphase.distributed.parameter_spec import spec_of
from megaphase.optim.adafactor import Adafactor
from megaphase.optim.config import (
    AdafactorConfig,
    AdamWConfig,
    LionConfig,
    MuonConfig,
    OptimizerConfig,
)
from megaphase.optim.lion import Lion
from megaphase.optim.muon import Muon
from megaphase.optim.parameter_state import groups_of
from megaphase.optim.untraced import AdamW

# DeepSpeed takes a step on zero gradients at the start, which must do nothing.
_AT_FIRST = 0.0
LR_FACTOR = "lr_factor"


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, name: str, dtype: torch.dtype
) -> torch.optim.Optimizer:
    """Return the optimizer that the run file names.

    name: the implementation, torch or apex; apex has AdamW alone. dtype: that of the activations.
    """
    groups = _parameter_groups(model, config)
    if isinstance(config, AdafactorConfig):
        return Adafactor(groups, config, lr=_AT_FIRST)
    if isinstance(config, LionConfig):
        return Lion(groups, lr=_AT_FIRST, betas=config.betas)
    if isinstance(config, MuonConfig):
        return Muon(groups, config, dtype, lr=_AT_FIRST)
    return _adamw(groups, config, name)


def skips_by_itself(config: OptimizerConfig, name: str) -> bool:
    """Whether the optimizer itself skips a step if its attribute `found_inf` says so, without the
    host; arguments as above."""
    return config.name == "adamw" and name == "torch"


def _adamw(groups: list[dict[str, Any]], config: AdamWConfig, name: str) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), fused."""
    build: Any = _apex_adamw if name == "apex" else AdamW
    optimizer: torch.optim.Optimizer = build(
        groups,
        lr=_AT_FIRST,
        betas=config.betas,
        eps=config.eps,
        **({} if name == "apex" else {"fused": True}),
    )
    return optimizer


def _parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The groups of `parameter_state.groups_of`, as torch's optimizers take them."""
    parameters = dict(model.named_parameters())
    specs = {name: spec_of(parameter) for name, parameter in parameters.items()}
    groups = []
    for group in groups_of(config, specs):
        factor = 1.0
        if isinstance(config, MuonConfig) and group.state.update == "adamw":
            factor = config.adamw.learning_rate_factor
        groups.append(
            {
                "params": [parameters[name] for name in group.names],
                "weight_decay": config.weight_decay if group.weight_decay else 0.0,
                "update": group.state.update,
                "factored": group.state.factored,
                LR_FACTOR: factor,
            }
        )
    return groups


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group, as a multiple of the phase's."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[LR_FACTOR]


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
