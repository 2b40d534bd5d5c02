"""The order in which ZeRO-3 gathers weights, which is that of training steps.

DeepSpeed 0.19.8 records the modules of a forward and backward pass, and then asks for weights ahead
and decides which ones stay. The order is recorded again when another pass shows it to be wrong, but
its decisions are cached: after an evaluation before any training step, weights that the backward
pass needs next would be given back in every forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def order_of_training_kept(zero: Any) -> Iterator[None]:
    """Evaluate a micro-batch in the block without recording its order for training steps.

    zero: DeepSpeed's optimizer of stage 3.
    """
    coordinator = zero.parameter_offload.get_param_coordinator()
    known = coordinator.is_complete_trace()
    yield
    if not known and not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
