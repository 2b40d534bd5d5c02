"""Leaves out the steps whose loss or gradient norm is far above its running mean."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaphase.distributed.device_copies import to_device
from megaphase.fault_tolerance.config import SkipSpikesConfig

# In a checkpoint's state.
STATE = "skip_spikes"


class LossSpikeFilter:
    """The running statistics of a phase's applied steps, and the decision on each new step.

    All of it is on the device, so the host waits for nothing more than without it; the decision is
    the same on all ranks.
    """

    def __init__(self, config: SkipSpikesConfig | None) -> None:
        """config: None leaves out no step."""
        self._config = config
        self.begin_phase()

    @property
    def is_on(self) -> bool:
        """Whether steps may be left out."""
        return self._config is not None

    def begin_phase(self) -> None:
        """Forget all steps: another mixture has other losses."""
        self._begin_step(None, None)
        if self._config is None:
            return
        # Of loss and gradient norm; then the applied steps, and the steps left out since the last.
        self._means = to_device(torch.zeros(2, dtype=torch.float64))
        self._variances = torch.zeros_like(self._means)
        self._applied = to_device(torch.zeros((), dtype=torch.float64))
        self._in_a_row = torch.zeros_like(self._applied)

    def _begin_step(self, loss: Tensor | None, trains: Tensor | None) -> None:
        self._loss, self._trains = loss, trains
        self._norm: Tensor | None = None
        self.left_out: Tensor | None = None
        # [3, 2] float64, of loss and gradient norm: whether it is above its limit, then mean and
        # standard deviation before the step.
        self.judgement: Tensor | None = None

    def take_loss(self, loss: Tensor, trains: Tensor) -> None:
        """Take in the loss of a step whose gradient is about to be judged; the same on all ranks.

        loss: [], float64. trains: [], bool, whether any token of the step has a target and a loss
        weight above 0; otherwise its gradient is zero whatever the loss.
        """
        self._begin_step(loss, trains)

    @property
    def norm(self) -> Tensor | None:
        """The norm that was judged in this step; None if none was."""
        return self._norm

    @torch.no_grad()
    def judge(self, norm: Tensor | float) -> Tensor:
        """Return the norm of the step's gradient, or infinity if the step is to be left out.

        A step that is not finite is left out in any case, and is no part of the statistics. A step
        that trains nothing is none of them either, and is never left out.
        """
        config, loss, trains = self._config, self._loss, self._trains
        assert config is not None
        assert loss is not None
        assert trains is not None
        norm = norm if isinstance(norm, Tensor) else torch.tensor(norm)
        self._norm = norm = norm.to(loss.device, non_blocking=True)
        values = torch.stack([loss, norm.double().view(())])
        counts = values.isfinite().all() & (values[1] >= 0) & trains
        deviations = self._variances.sqrt()
        above = values > self._means + config.deviations * deviations
        acts = (self._applied >= config.after_steps) & (self._in_a_row < config.most_in_a_row)
        left_out = (counts & acts & above.any()).int()
        if dist.is_initialized():
            # Equal on all ranks in any case, unless their sums differ in a last bit.
            dist.all_reduce(left_out, dist.ReduceOp.MAX)
        self.left_out = out = left_out.bool()
        self.judgement = torch.stack([above.double(), self._means, deviations])
        self._update(values, counts & ~out)
        self._in_a_row = torch.where(out, self._in_a_row + 1, self._in_a_row)
        return torch.where(out, torch.full_like(norm, torch.inf), norm)

    def _update(self, values: Tensor, applied: Tensor) -> None:
        """Take a step into the statistics if it is applied.

        Every step weighs as much as any other until there are 1 / (1 - decay) of them; from there
        on the weights decay exponentially (West 1979, Finch 2009).
        """
        assert self._config is not None
        weight = (1 / (self._applied + 1)).clamp(min=1 - self._config.decay)
        delta = values - self._means
        means = self._means + weight * delta
        variances = (1 - weight) * (self._variances + weight * delta**2)
        self._means = torch.where(applied, means, self._means)
        self._variances = torch.where(applied, variances, self._variances)
        self._applied = torch.where(applied, self._applied + 1, self._applied)
        self._in_a_row = torch.where(applied, 0.0, self._in_a_row)

    @contextmanager
    def judging(self, zero: Any) -> Iterator[None]:
        """Within, DeepSpeed's ZeRO optimizer takes a step that is to be left out for one whose
        gradient is not finite: the function is replaced with which it looks at the norm.

        zero: DeepSpeed's optimizer.
        """
        if self._config is None:
            yield
            return
        module = sys.modules[type(zero).__module__]
        is_invalid = module.is_invalid_grad_norm
        judged = False

        def judge_once(norm: Tensor | float) -> bool:
            nonlocal judged
            if not judged:
                judged, norm = True, self.judge(norm)
            return bool(is_invalid(norm))

        module.is_invalid_grad_norm = judge_once  # type: ignore[attr-defined]
        try:
            yield
        finally:
            module.is_invalid_grad_norm = is_invalid  # type: ignore[attr-defined]

    def record(self) -> dict[str, Any]:
        """The statistics for a checkpoint's state."""
        if self._config is None:
            return {}
        return {
            STATE: {
                "means": self._means.tolist(),
                "variances": self._variances.tolist(),
                "applied": self._applied.item(),
                "in_a_row": self._in_a_row.item(),
            }
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Resume with the statistics of a checkpoint's state, if it has any."""
        found = state.get(STATE)
        if found is None or self._config is None:
            return

        def figures(key: str) -> Tensor:
            return to_device(torch.tensor(found[key], dtype=torch.float64))

        self._means, self._variances = figures("means"), figures("variances")
        self._applied, self._in_a_row = figures("applied"), figures("in_a_row")
