"""The figures of optimizer steps and evaluations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megaphase.distributed.device_copies import Readout
from megaphase.utils.spike_words import Exceeded


@dataclass(frozen=True)
class TaskLosses:
    """Sums over the tokens of each task, over all data-parallel ranks; float64 [tasks]."""

    loss_sums: Tensor
    tokens: Tensor

    @property
    def mean(self) -> float:
        """Loss a token in nats over all tasks; 0 where no token has a target."""
        return float(self.loss_sums.sum() / self.tokens.sum().clamp(min=1))

    def by_task(self, names: list[str]) -> dict[str, float]:
        """Mean loss a token in nats for each task that had any."""
        return {
            name: float(self.loss_sums[i] / self.tokens[i])
            for i, name in enumerate(names)
            if self.tokens[i] > 0
        }


class StepResult:
    """The figures of one optimizer step.

    They are copied to the CPU while the device computes what follows; the first access waits until
    they are there.

    Attributes:
        applied_on_device: the same as `applied`, bool [], on the device, for what the device does
            without the host.
    """

    def __init__(
        self,
        loss_sums: Tensor,
        tokens: Tensor,
        grad_norm: Tensor | float,
        left_out: Tensor | None = None,
        judgement: Tensor | None = None,
    ) -> None:
        """
        Args:
            loss_sums, tokens: see TaskLosses; on the device.
            grad_norm: of the whole gradient before clipping, [] on any device.
            left_out: whether the step was left out as a loss spike, [], bool, on the device; None
                if none is.
            judgement: of LossSpikeFilter, [3, 2] float64 on the device; None if nothing is judged.
        """
        if isinstance(grad_norm, float) or not grad_norm.is_cuda:
            norm = torch.full_like(loss_sums[:1], float(grad_norm))
        else:
            norm = grad_norm.to(loss_sums).view(1)
        self.applied_on_device = norm.isfinite().view(())
        kept = torch.ones_like(norm)
        if left_out is not None:
            self.applied_on_device &= ~left_out
            kept = (~left_out).to(loss_sums).view(1)
        self._judged = 0 if judgement is None else judgement.numel()
        before = [] if judgement is None else [judgement.to(loss_sums).view(-1)]
        self._figures = Readout(torch.cat([*before, loss_sums, tokens, norm, kept]))

    def wait(self) -> None:
        """Wait until the figures are there."""
        self._figures.read()

    @cached_property
    def losses(self) -> TaskLosses:
        """Before the step."""
        return TaskLosses(*self._figures.read()[self._judged : -2].chunk(2))

    @cached_property
    def grad_norm(self) -> float:
        """Before clipping."""
        return float(self._figures.read()[-2])

    @property
    def is_spike(self) -> bool:
        """Whether the step was left out as a loss spike."""
        return float(self._figures.read()[-1]) == 0

    @property
    def exceeded(self) -> Exceeded:
        """What was too large in a step that was left out; empty for any other step."""
        if not self._judged or not self.is_spike:
            return {}
        above, means, deviations = self._figures.read()[: self._judged].view(3, 2).tolist()
        values = (self.losses.mean, self.grad_norm)
        return {
            name: {"value": value, "mean": mean, "standard_deviation": deviation}
            for name, is_above, value, mean, deviation in zip(
                ("loss", "grad_norm"), above, values, means, deviations, strict=True
            )
            if is_above
        }

    @property
    def applied(self) -> bool:
        """False where the gradient was not finite, or the step was left out; nothing has changed
        then."""
        return math.isfinite(self.grad_norm) and not self.is_spike
