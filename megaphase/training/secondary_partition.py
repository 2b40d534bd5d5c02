"""The processes among which ZeRO-3 partitions a second copy of the weights.

DeepSpeed 0.19 keeps one such group in a global variable, makes it of consecutive ranks of all
processes, and does not look at its size again.
"""

from __future__ import annotations

import torch.distributed as dist


def secondary_group() -> dist.ProcessGroup | None:
    """The group of this process under the engine that was built last; None without one."""
    from deepspeed.utils import groups

    group: dist.ProcessGroup | None = groups._get_zero_param_intra_parallel_group()
    return group


def forget_secondary_group() -> None:
    """Let the next engine make its own; the one of an earlier engine keeps working with its own."""
    from deepspeed.utils import groups

    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
