"""How much of what ZeRO-3 gathers is asked for ahead of its use."""

from __future__ import annotations

import sys
from typing import Any

# Of DeepSpeed 0.19's PartitionedParameterCoordinator: it fetches a module's parameters, those that
# are needed at once and, behind them, those of the next modules.
_GATHER = "_PartitionedParameterCoordinator__all_gather_params"
_FETCH = "_fetch_sub_module_impl"
_AHEAD = "params_to_prefetch"


class Gathers:
    """Counts the elements that DeepSpeed gathers, from when it is created.

    Attributes:
        ahead, when_needed: elements that are gathered before a module needs them, and when it does
    """

    def __init__(self) -> None:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
        from deepspeed.runtime.zero.partitioned_param_coordinator import (
            PartitionedParameterCoordinator,
        )

        self.clear()
        gather = getattr(PartitionedParameterCoordinator, _GATHER)

        def counted(coordinator: Any, parameters: Any, forward: bool) -> Any:
            elements = sum(
                each.ds_numel
                for each in parameters
                if each.ds_status == ZeroParamStatus.NOT_AVAILABLE
            )
            frame = sys._getframe(1)
            while frame.f_code.co_name != _FETCH and frame.f_back is not None:
                frame = frame.f_back
            if parameters is frame.f_locals.get(_AHEAD):
                self.ahead += elements
            else:
                self.when_needed += elements
            return gather(coordinator, parameters, forward)

        setattr(PartitionedParameterCoordinator, _GATHER, counted)

    def clear(self) -> None:
        self.ahead = self.when_needed = 0
