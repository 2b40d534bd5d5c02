"""Muon (Jordan et al. 2024) for the matrices of the layers, and AdamW for everything else."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megaphase.distributed.parameter_spec import ParameterSpec
from megaphase.optim.addresses import AddressedOptimizer, MasterGroup
from megaphase.optim.config import MuonConfig
from megaphase.optim.newton_schulz import flops, orthogonalized
from megaphase.optim.untraced import AdamW
from megaphase.optim.whole_matrices import WholeMatrices

# Of AdamW's updates, as far as they were measured (Liu et al. 2025, arXiv 2502.16982).
_RMS_OF_ADAMW = 0.2


class Muon(AddressedOptimizer):
    """Steps by the orthogonalized Nesterov momentum of each whole matrix.

    A matrix is orthogonalized on one rank, from pieces of all of them, so that the update does not
    depend on the layout. Overwrites the gradients.
    """

    def __init__(
        self, groups: list[dict[str, Any]], config: MuonConfig, dtype: torch.dtype, *, lr: float
    ) -> None:
        """
        groups: with the formula `update`, `muon` or `adamw`. dtype: in which matrices are sent and
        orthogonalized.
        """
        settings, adamw = config, config.adamw
        self._adamw = AdamW([torch.zeros(1)], betas=adamw.betas, eps=adamw.eps, fused=True)
        defaults = {**self._adamw.defaults, "lr": lr, "weight_decay": 0.0}
        super().__init__(groups, defaults)
        self._settings, self._dtype = settings, dtype
        self._exchanges: dict[tuple[int, ...], WholeMatrices] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # none is ever given
        for group, masters in self.groups_with_gradients():
            if group["update"] == "muon":
                self._step(group, masters)
            else:
                self._adamw.state = self.state
                self._adamw.param_groups = [group]
                self._adamw.step()

    def _step(self, group: dict[str, Any], masters: list[MasterGroup]) -> None:
        flats: list[Tensor] = [master.flat for master in masters]
        updates = [flat.grad.contiguous() for flat in flats if flat.grad is not None]
        momentum = self._settings.momentum
        momenta = []
        for flat, state in zip(flats, self.counted(flats, on_host=False), strict=True):
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(flat)
            momenta.append(state["exp_avg"])
        torch._foreach_lerp_(momenta, updates, 1.0 - momentum)
        torch._foreach_lerp_(updates, momenta, momentum)
        self._exchange(masters).apply(self._orthogonalized, updates, self._dtype)
        torch._foreach_mul_(flats, 1.0 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(flats, updates, alpha=-group["lr"])

    def _exchange(self, masters: list[MasterGroup]) -> WholeMatrices:
        """Those of the same flat tensors are the same in every step."""
        assert self.addresses is not None
        specs = self.addresses.specs
        key = tuple(id(master.flat) for master in masters)
        if key not in self._exchanges:
            work = {
                name: matrix_flops(specs[name], self._settings.iterations)
                for master in masters
                for name in master.names
            }
            self._exchanges[key] = WholeMatrices(masters, self.addresses, work)
        return self._exchanges[key]

    def _orthogonalized(self, name: str, whole: Tensor) -> Tensor:
        assert self.addresses is not None
        spec = self.addresses.specs[name]
        parts = whole.split(list(spec.segments), spec.dim or 0) if spec.segments else (whole,)
        return torch.cat(
            [
                orthogonalized(each, self._settings.iterations)
                * update_scale(each.shape[0], each.shape[1], self._settings.scale)
                for each in parts
            ],
            spec.dim or 0,
        )


def update_scale(rows: int, columns: int, scale: str) -> float:
    """Return the factor of an orthogonalized matrix: `match_adamw` gives its elements the root mean
    square of AdamW's updates (Liu et al. 2025), `original` is Jordan's."""
    if scale == "match_adamw":
        return _RMS_OF_ADAMW * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def matrix_flops(spec: ParameterSpec, iterations: int) -> int:
    """Return the floating-point operations to orthogonalize a parameter's matrices."""
    dim = spec.dim or 0
    other = spec.numel // spec.shape[dim]
    return sum(flops(each, other, iterations) for each in spec.segments or (spec.shape[dim],))
