"""torch's optimizers without its compiler, which these would import although nothing compiles them.

`torch._dynamo` takes one to two seconds of every process's start. torch's optimizers import it when
a parameter group is added and in every step, to exempt themselves from a compilation around them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

_adam_step = inspect.unwrap(torch.optim.Adam.step)


class UntracedOptimizer(torch.optim.Optimizer):
    """An optimizer whose methods cannot be called in a compiled function; otherwise torch's."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(UntracedOptimizer, torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter 2019) by torch's kernels."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; arguments and result as in torch.optim.AdamW."""
        return _adam_step(self, closure)
