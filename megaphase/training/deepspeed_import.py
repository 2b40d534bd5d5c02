"""DeepSpeed, without packages that training has no use for, among them torch's compiler.

Of a model that is not compiled as a whole, none of its functions has to be exempted from that.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from megaphase.distributed.dist_env import local_world_size
from megaphase.distributed.triton_cache import use_local_triton_cache


def import_deepspeed() -> Any:  # its classes are not typed
    """Import DeepSpeed on the accelerator that is really there, without its chatter."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Otherwise it asks `numactl` how many CPUs there are, in every backward pass.
        os.environ.setdefault("LOCAL_SIZE", str(local_world_size()))
    use_local_triton_cache()
    os.environ.setdefault("LOCAL_RANK", "0")  # it asks for it even in a single process
    # DeepSpeed calls collectives by deprecated names, of which torch warns at each step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    # It tries to import mlflow, for its autotuner, and triton, for kernels of mixtures of experts.
    absent = ["mlflow"] if torch.cuda.is_available() else ["mlflow", "triton"]
    with _missing(*absent), _replaced(torch, "_disable_dynamo"):
        import deepspeed

        with contextlib.suppress(ImportError):
            importlib.import_module("deepspeed.ops.triton_ops")
    _import_its_muon(deepspeed.runtime.compiler)
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # Its collectives over shared memory are compiled at the first use, behind a lock file on which
    # every later run hangs forever if that one is killed. gloo serves the CPU. Otherwise it finds
    # out which of all its operators can be built, for which it compiles and links a program.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    return deepspeed


@contextlib.contextmanager
def _missing(*packages: str) -> Iterator[None]:
    """Let imports in the block fail as if these packages were not installed, except where they have
    been imported before; they take seconds."""
    absent = [package for package in packages if package not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for package in absent:
            del sys.modules[package]


def _import_its_muon(compiler: Any) -> None:
    """Import DeepSpeed's Muon optimizer, which its ZeRO engines import but Megaphase does not use,
    without compiling it."""
    with _replaced(compiler, "compile"), contextlib.suppress(ImportError):
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Let functions that are defined in the block do without being exempted from compilation, for
    which torch imports its whole compiler; ZeRO 3 defines hundreds."""
    with _replaced(torch.compiler, "disable"):
        yield


@contextlib.contextmanager
def _replaced(module: Any, decorator: str) -> Iterator[None]:
    """Let a decorator, which takes a function or else only options, change no function."""

    def unchanged(function: Any = None, **_: Any) -> Any:
        return (lambda given: given) if function is None else function

    really = getattr(module, decorator)
    setattr(module, decorator, unchanged)
    try:
        yield
    finally:
        setattr(module, decorator, really)
