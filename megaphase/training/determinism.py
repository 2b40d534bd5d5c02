"""`deterministic: true`: a step that is computed again gives the same bits, on a GPU too.

What would differ there without it: the gradient of attention, which flash attention and cuDNN sum
in the order in which thread blocks finish; sums of compiled kernels, whose tiling is timed anew
where the compiler's cache is lost; matrix products, where cuBLAS has one workspace for several
streams; and sums inside the NVLink switch. On the CPU nothing would.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from megaphase.config.run import RunConfig
from megaphase.utils.errors import InputError

CUBLAS_VARIABLE, CUBLAS_VALUES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
NVLS_VARIABLE, NVLS_OFF = "NCCL_NVLS_ENABLE", "0"


def set_environment(config: RunConfig) -> None:
    """Set what cuBLAS and NCCL read when they are first used; before any collective."""
    if config.deterministic and torch.cuda.is_available():
        os.environ.setdefault(CUBLAS_VARIABLE, CUBLAS_VALUES[0])
        os.environ.setdefault(NVLS_VARIABLE, NVLS_OFF)


def check_environment(config: RunConfig) -> None:
    """Reject variables under which a GPU is not deterministic.

    Raises:
        InputError: names the first of them.
    """
    if not config.deterministic or not torch.cuda.is_available():
        return
    for variable, allowed in ((CUBLAS_VARIABLE, CUBLAS_VALUES), (NVLS_VARIABLE, (NVLS_OFF,))):
        value = os.environ.get(variable, allowed[0])
        if value not in allowed:
            raise InputError(
                config.where("deterministic"),
                f"does not hold where {variable} is {value!r}",
                f"unset the variable, or set it to {' or '.join(allowed)}",
            )


def choose_algorithms(config: RunConfig) -> None:
    """Let torch compute in this process as the run file asks.

    With `deterministic: true`, torch's attention leaves out cuDNN and sums gradients in one order,
    its other operations that have several algorithms take a deterministic one (one that has none
    raises RuntimeError), and torch.compile chooses tilings without timing them.
    """
    set_environment(config)
    if config.deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(config.deterministic)
        # All memory is written before it is read; filling it first would only take time.
        filled: Any = torch.utils.deterministic
        filled.fill_uninitialized_memory = not config.deterministic
