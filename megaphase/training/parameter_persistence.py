"""Chooses the weights that ZeRO-3 keeps gathered from one micro-batch to the next.

DeepSpeed 0.19 gathers its persistent parameters once, at the end of an optimizer step, and gives
them back when the next one begins. Its settings choose them by size alone, and with a limit on
all of them omit small ones that happen to come last; so they are marked here one by one.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from megaphase.estimate.gathered_parameters import kept_gathered


def keep_gathered(zero: Any, module: nn.Module, share: float) -> None:
    """Keep a share of the weights gathered; before the first forward pass.

    zero: DeepSpeed's optimizer of stage 3. module: the model, partitioned.
    """
    parameters: dict[str, Any] = dict(module.named_parameters())
    sizes = {name: parameter.ds_numel for name, parameter in parameters.items()}
    kept = kept_gathered(sizes, share)
    for name, parameter in parameters.items():
        if name in kept and not parameter.ds_persist:
            parameter.ds_persist = True
            zero.persistent_parameters.append(parameter)
