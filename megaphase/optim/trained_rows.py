"""Train some rows of the embedding and the output projection, and nothing else.

DeepSpeed's optimizers step all parameters. So that a step changes the chosen rows alone, the
gradient of everything else is set to zero before it is accumulated, and weight decay, which would
change every element, is applied here to the chosen rows. AdamW without weight decay leaves an
element whose gradients since the last reset were all zero as it is, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megaphase.distributed.parameter_spec import spec_of
from megaphase.optim.optimizer_state import OptimizerState


class TrainedRows:
    """Confines the training to rows of the vocabulary's matrices, under any ZeRO stage."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: OptimizerState,
        *,
        tensor_rank: int,
        tensor_size: int,
    ) -> None:
        """
        Args:
            optimizer: torch's, wrapped by DeepSpeed's.
            state: of this optimizer.
        """
        self._parameters = dict(model.named_parameters())
        self._optimizer, self._state = optimizer, state
        self._tensor_rank, self._tensor_size = tensor_rank, tensor_size
        self._decays = [float(group["weight_decay"]) for group in optimizer.param_groups]
        self._hooks: list[Any] = []  # torch's handles

    def choose(self, tokens: range | None) -> None:
        """Train only the rows of these tokens, or everything again.

        The optimizer state must be reset before the next step. The gradient's norm and its clipping
        are those of the chosen rows.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for group, decay in zip(self._optimizer.param_groups, self._decays, strict=True):
            group["weight_decay"] = decay if tokens is None else 0.0
        if tokens is None:
            return
        rows = {
            name: self._own_rows(parameter, tokens)
            for name, parameter in self._parameters.items()
            if spec_of(parameter).padded
        }
        for name, parameter in self._parameters.items():
            hook = _zeros if name not in rows else _only(rows[name])
            self._hooks.append(parameter.register_hook(hook))
        self._hooks.append(self._optimizer.register_step_pre_hook(self._decay(rows)))

    def _own_rows(self, parameter: Tensor, tokens: range) -> range:
        """Return the numbers of these tokens' rows among those of this tensor-parallel rank."""
        layout = spec_of(parameter).layout(self._tensor_size)
        run = next(iter(layout.runs(self._tensor_rank, self._tensor_size)), None)
        if run is None:  # all of this rank's rows pad the vocabulary
            return range(0)
        first, stop = (
            min(max(token - run.in_whole, 0), run.length) for token in (tokens.start, tokens.stop)
        )
        return range(first, stop)

    def _decay(self, rows: dict[str, range]) -> Any:
        """Return a hook that applies weight decay to the rows before a step of the optimizer."""
        decays = {
            name: max(self._decays) if spec_of(self._parameters[name]).weight_decay else 0.0
            for name in rows
        }
        widths = {name: spec_of(self._parameters[name]).shape[1] for name in rows}
        parts = self._state.elements(
            {name: (r.start * widths[name], r.stop * widths[name]) for name, r in rows.items()}
        )

        @torch.no_grad()
        def decay(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                for flat in group["params"]:
                    for name, first, stop in parts.get(id(flat), ()):
                        if flat.grad is None or decays[name] == 0:
                            continue
                        factor = 1.0 - group["lr"] * decays[name]
                        # Without ZeRO, a step whose gradient is not finite changes nothing.
                        skipped = getattr(optimizer, "found_inf", None)
                        if skipped is not None:
                            factor = torch.where(skipped > 0, 1.0, factor)
                        flat.data.view(-1)[first:stop].mul_(factor)

        return decay


def _zeros(gradient: Tensor) -> Tensor:
    return torch.zeros_like(gradient)


def _only(rows: range) -> Any:
    def keep(gradient: Tensor) -> Tensor:
        # In place: nothing else reads it, and a copy of a vocabulary's gradient is large.
        gradient[: rows.start].zero_()
        gradient[rows.stop :].zero_()
        return gradient

    return keep
