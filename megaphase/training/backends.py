"""Chooses the kernels and the optimizer of a run from those it asks for and those installed."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
from dataclasses import dataclass
from typing import Literal

from megaphase.config.run import RunConfig
from megaphase.distributed.process_grid import device
from megaphase.ops.kernels import Kernels
from megaphase.ops.matmul import widens_bf16
from megaphase.utils.errors import InputError

# Modules that NVIDIA apex has only where it was built with its CUDA extensions. There is another
# package of that name on PyPI.
APEX_NORM = ("apex.normalization", "fused_layer_norm_cuda")
APEX_OPTIMIZER = ("apex.optimizers", "amp_C")
_FROM_DISK = ("adamw",)  # optimizers that are tested with nvme
_APEX_REMEDY = (
    "build NVIDIA apex with --cpp_ext --cuda_ext (github.com/NVIDIA/apex), or take torch or auto"
)


@dataclass(frozen=True)
class Backends:
    """The implementations that a run computes with."""

    kernels: Kernels
    optimizer: Literal["torch", "apex"]

    def describe(self) -> list[str]:
        """For the line that a run prints at its start; empty where torch's own functions compute
        everything on a CPU, which is what everybody expects."""
        words = []
        if self.kernels.compiled:
            words.append("kernels compiled during the first step, which takes longer")
        elif device().type == "cuda":
            words.append("kernels not compiled (parts.kernels), which is slower")
        apex = {"norms": self.kernels.apex_norm, "optimizer": self.optimizer == "apex"}
        if any(apex.values()):
            words.append(f"{' and '.join(part for part in apex if apex[part])} by NVIDIA apex")
        return words


def choose_backends(config: RunConfig) -> Backends:
    """The implementations for this process.

    Raises:
        InputError: one that the run file asks for is not installed, or has no such offload.
    """
    name = config.optimizer.name
    if config.parallel.offload == "nvme" and name not in _FROM_DISK:
        raise InputError(
            config.where("optimizer.name"),
            f"{name} does not step weights that parallel.offload: nvme stores on a disk",
            "write offload: cpu, or name adamw",
        )
    _check_capped_attention(config)
    missing = _missing_for_apex(APEX_OPTIMIZER)
    if config.parallel.offload != "none":
        missing = "the optimizer state on the GPU, and parallel.offload moves it"
    if name != "adamw":
        missing = f"optimizer.name adamw, and it is {name}"
    compiled = _compiles(config)
    # Compiled norms compute the residual sum in the same pass, which apex's do not.
    without_norm = _missing_for_apex(APEX_NORM)
    if config.model.zero_centered_norms:
        without_norm = "norms that are not zero-centered (model.zero_centered_norms)"
    norm = _takes_apex(config, "norm", without_norm, preferred=not compiled)
    optimizer = _takes_apex(config, "optimizer", missing)
    kernels = Kernels(compiled=compiled, apex_norm=norm)
    return Backends(kernels, "apex" if optimizer else "torch")


def _check_capped_attention(config: RunConfig) -> None:
    if config.model.attention_softcap is None or device().type != "cuda":
        return
    if missing := _missing_to_compile():
        raise InputError(
            config.where("model.attention_softcap"),
            f"is computed on a GPU by FlexAttention, which needs {missing}",
            "install it",
        )


def _compiles(config: RunConfig) -> bool:
    asked, missing = config.parts.kernels, _missing_to_compile()
    if asked == "compile" and missing:
        raise InputError(
            config.where("parts.kernels"), f"compile needs {missing}", "install it, or take eager"
        )
    # On a CPU compiling is worth its time in longer runs only, and those are trained on GPUs.
    return asked == "compile" or (asked == "auto" and device().type == "cuda" and not missing)


def _missing_to_compile() -> str | None:
    """The program or package that torch.compile needs and does not find; None if it finds all."""
    if device().type == "cuda" and importlib.util.find_spec("triton") is None:
        return "Triton"
    variable, usual = ("CC", ["gcc", "clang"]) if device().type == "cuda" else ("CXX", ["g++"])
    given = shlex.split(os.environ.get(variable, ""))  # such as "ccache gcc"
    compilers = given[:1] or usual
    if any(shutil.which(name) for name in compilers):
        return None
    return f"a compiler ({', '.join(compilers)}; the variable {variable} can name another)"


def _takes_apex(
    config: RunConfig,
    part: Literal["norm", "optimizer"],
    missing: str | None,
    *,
    preferred: bool = True,
) -> bool:
    """missing: a requirement of apex for that part that is not met; None if all are. preferred:
    whether `auto` takes it then."""
    asked = getattr(config.parts, part)
    if asked == "apex" and missing:
        raise InputError(config.where(f"parts.{part}"), f"apex needs {missing}", _APEX_REMEDY)
    return asked == "apex" or (asked == "auto" and preferred and not missing)


def _missing_for_apex(modules: tuple[str, str]) -> str | None:
    if device().type != "cuda":
        return "a GPU"
    return next((f"the module {module}" for module in modules if lacks_module(module)), None)


def lacks_module(module: str) -> bool:
    """Return whether a module cannot be found; it is not imported."""
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:  # the package that the module would be in
        return True


def precision_warning(precision: str) -> str | None:
    """Return a sentence where the device has no instructions for the precision."""
    if precision != "bf16" or not widens_bf16(device()):
        return None
    return (
        "Warning: this CPU has no instructions for bf16, whose products are computed in fp32 and "
        "rounded; precision: fp32 saves the rounding"
    )
