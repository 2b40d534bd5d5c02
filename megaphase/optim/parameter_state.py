"""What an optimizer stores for each parameter, and which parameters it updates together.

torch is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megaphase.checkpoint.state import COLUMNS, ROWS
from megaphase.distributed.parameter_spec import ParameterSpec
from megaphase.optim.config import (
    AdafactorConfig,
    AdamWConfig,
    LionConfig,
    MuonConfig,
    OptimizerConfig,
)

FIRST, SECOND = "exp_avg", "exp_avg_sq"
_ADAFACTOR_WITH_MOMENTUM = "adafactor with beta1"


@dataclass(frozen=True)
class ParameterState:
    """The state of one parameter.

    Attributes:
        update: the formula that updates it.
        moments: tensors with an element for each of its elements.
        factored: whether the means of its rows and columns are stored, on every rank.
    """

    update: str
    moments: tuple[str, ...]
    factored: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """All tensors that are stored."""
        return (*self.moments, *((ROWS, COLUMNS) if self.factored else ()))


def state_of(config: OptimizerConfig, spec: ParameterSpec) -> ParameterState:
    """Return what the optimizer stores for a parameter."""
    if config.name == "lion":
        return ParameterState("lion", (FIRST,))
    if config.name == "adafactor":
        momentum = () if config.beta1 is None else (FIRST,)
        factored = len(spec.shape) == 2
        second = () if factored else (SECOND,)
        return ParameterState("adafactor", (*momentum, *second), factored)
    if config.name == "muon" and spec.matrix:
        return ParameterState("muon", (FIRST,))
    return ParameterState("adamw", (FIRST, SECOND))


@dataclass(frozen=True)
class Group:
    """Parameters that are updated by one formula, with weight decay or without."""

    state: ParameterState
    weight_decay: bool
    names: tuple[str, ...]


def groups_of(config: OptimizerConfig, specs: Mapping[str, ParameterSpec]) -> list[Group]:
    """Return the optimizer's groups in their order, each with its parameters in the model's.

    ZeRO 1 and 2 join the parameters of a group, so checkpoints and the memory estimate need them,
    too.
    """
    names: dict[tuple[ParameterState, bool], list[str]] = {}
    for name, spec in specs.items():
        names.setdefault((state_of(config, spec), spec.weight_decay), []).append(name)
    groups = [Group(*key, tuple(found)) for key, found in names.items()]
    return sorted(groups, key=lambda group: (not group.weight_decay, group.state.update))


def stored_by(config: OptimizerConfig) -> str:
    """Return the optimizer whose state in a checkpoint this one can keep; AdamW's is `adamw`."""
    if config.name == "adafactor" and config.beta1 is not None:
        return _ADAFACTOR_WITH_MOMENTUM
    return config.name


def config_stored_by(optimizer: str) -> OptimizerConfig:
    """Return settings with which an optimizer stores the state that `stored_by` names so; AdamW's
    for one that is not known."""
    if optimizer == "lion":
        return LionConfig(name="lion")
    if optimizer == "adafactor":
        return AdafactorConfig(name="adafactor")
    if optimizer == _ADAFACTOR_WITH_MOMENTUM:
        return AdafactorConfig(name="adafactor", beta1=0.9)
    if optimizer == "muon":
        return MuonConfig(name="muon")
    return AdamWConfig()
