"""Lion (Chen et al. 2023, arXiv 2302.06675)."""

from __future__ import annotations

from typing import Any

import torch

from megaphase.optim.untraced import UntracedOptimizer


class Lion(UntracedOptimizer):
    """Elementwise, so it does not matter how parameters are cut into the tensors that it gets.

    Overwrites the gradients.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # none is ever given
        for group in self.param_groups:
            found = [weight for weight in group["params"] if weight.grad is not None]
            if not found:
                continue
            states = [self._state(weight) for weight in found]
            (in_update, in_next), rate = group["betas"], group["lr"]
            momenta, gradients = [each["exp_avg"] for each in states], [w.grad for w in found]
            updates = torch._foreach_lerp(gradients, momenta, in_update)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(found, 1.0 - rate * group["weight_decay"])
            torch._foreach_add_(found, updates, alpha=-rate)
            torch._foreach_lerp_(momenta, gradients, 1.0 - in_next)

    def _state(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[weight]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(weight)
        state["step"] += 1
        return state
