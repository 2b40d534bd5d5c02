"""An average of the fp32 weights, which this rank holds for its part of them.

Whether a step was applied is known on the device before the host knows it, so the device counts
the weights that were taken, and the host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megaphase.checkpoint.parameters import StoredParameters
from megaphase.checkpoint.state import AVERAGE
from megaphase.optim.average_config import AverageConfig
from megaphase.optim.optimizer_state import OptimizerState

# Elements that are copied at a time between the memory of the weights and that of the average.
_CHUNK = 1 << 24


class WeightAverage:
    """The average that has begun, if one has.

    It changes neither the weights nor the optimizer state, except in `exchanged` and `take_over`.
    """

    def __init__(self, state: OptimizerState) -> None:
        self._state = state
        state.beside = self._kinds
        self._config: AverageConfig | None = None
        self._flats: list[Tensor] = []
        self._masters: list[Tensor] = []
        self._taken: Tensor | None = None  # int64 [], where the average is

    @property
    def taken(self) -> int:
        """How many weights are in the average; 0 if there is none. Waits for the device."""
        return 0 if self._taken is None else int(self._taken)

    def record(self) -> dict[str, Any]:
        """Return its record for the state of a checkpoint; empty if nothing is in it."""
        config, taken = self._config, self.taken
        if config is None or not taken:
            return {}
        facts = config.model_dump(mode="json", exclude_none=True, exclude={"device"})
        return {AVERAGE: facts | {"taken": taken}}

    def begin(self, config: AverageConfig) -> None:
        """Begin an average with nothing in it; one that there is ends."""
        self.end()
        self._masters = self._state.masters()
        self._flats = [
            torch.zeros_like(each, device=_place(config, each)) for each in self._masters
        ]
        self._taken = torch.zeros((), dtype=torch.int64, device=self._flats[0].device)
        self._config = config

    def end(self) -> None:
        """Free the average."""
        self._config, self._taken, self._flats, self._masters = None, None, [], []

    @torch.no_grad()
    def take(self, applied: Tensor) -> None:
        """Take the weights into the average, unless the step before was skipped.

        applied: bool [], on any device; False leaves everything as it is.
        """
        config, taken = self._config, self._taken
        assert config is not None
        assert taken is not None
        applied = applied.to(taken.device)
        count = taken.double()
        if config.decay is None:
            share = 1 / (count + 1)
        else:
            share = torch.where(taken == 0, 1.0, 1 - torch.full_like(count, config.decay))
        share = torch.where(applied, share, 0.0).float()
        for average, weights in zip(self._flats, self._masters, strict=True):
            for averaged, current in _chunks(average, weights):
                averaged.lerp_(current.to(averaged.device), share)
        taken += applied

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """Let the model have the average as its weights during the block; called by all ranks."""
        self._state.change_weights(self._exchange)
        yield
        self._state.change_weights(self._exchange)

    def take_over(self) -> None:
        """Set the weights to the average, which ends; called by all ranks."""
        self._state.change_weights(lambda index, weights: weights.copy_(self._flats[index]))
        self.end()

    def load(self, stored: StoredParameters, config: AverageConfig, taken: int) -> None:
        """Set the average from a checkpoint of any layout.

        taken: how many weights are in it.
        """
        self.begin(config)
        assert self._taken is not None
        self._state.read(stored, AVERAGE, self._flats)
        self._taken.fill_(taken)

    def _kinds(self) -> dict[str, list[Tensor]]:
        """What a checkpoint holds of it."""
        return {AVERAGE: self._flats} if self.taken else {}

    def _exchange(self, index: int, weights: Tensor) -> None:
        for averaged, current in _chunks(self._flats[index], weights):
            copy = averaged.clone()
            averaged.copy_(current)
            current.copy_(copy)


def _place(config: AverageConfig, weights: Tensor) -> torch.device:
    return torch.device("cpu") if config.device == "cpu" else weights.device


def _chunks(one: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield views of the same elements of two tensors [elements]."""
    return zip(one.split(_CHUNK), other.split(_CHUNK), strict=True)
