"""Which kernels and which optimizer a run computes with: what it asks for, and what is there."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from typing import Literal

from megaphase.config import RunConfig
from megaphase.errors import InputError
from megaphase.kernels.kernels import Kernels
from megaphase.parallel.topology import device

# Modules that NVIDIA apex has only where it was built with its CUDA extensions. There is another
# package of that name on PyPI.
APEX_NORM = ("apex.normalization", "fused_layer_norm_cuda")
APEX_OPTIMIZER = ("apex.optimizers", "amp_C")
_APEX_REMEDY = (
    "build NVIDIA apex with --cpp_ext --cuda_ext (github.com/NVIDIA/apex), or take torch or auto"
)


@dataclass(frozen=True)
class Parts:
    """What was chosen."""

    kernels: Kernels
    optimizer: Literal["torch", "apex"]

    def describe(self) -> str:
        """For the line that a run says once."""
        kernels = "compiled in the first step" if self.kernels.compiled else "eager"
        norm = "apex" if self.kernels.apex_norm else "torch"
        return f"kernels {kernels}, norm {norm}, optimizer {self.optimizer}"


def choose_parts(config: RunConfig) -> Parts:
    """What this process computes with.

    Raises:
        InputError: something that is asked for is not there.
    """
    kernels = Kernels(compiled=_compiles(config), apex_norm=_apex_norm(config))
    return Parts(kernels, "apex" if _apex_optimizer(config) else "torch")


def _compiles(config: RunConfig) -> bool:
    asked, missing = config.parts.kernels, _missing_to_compile()
    if asked == "compile" and missing:
        raise InputError(
            config.where("parts.kernels"), f"compile needs {missing}", "install it, or take eager"
        )
    # On a CPU compiling is worth its time in longer runs only, and those are trained on GPUs.
    return asked == "compile" or (asked == "auto" and device().type == "cuda" and not missing)


def _missing_to_compile() -> str | None:
    """What torch.compile needs here and does not find."""
    if device().type == "cuda" and importlib.util.find_spec("triton") is None:
        return "Triton"
    variable, usual = ("CC", ["gcc", "clang"]) if device().type == "cuda" else ("CXX", ["g++"])
    compilers = [os.environ[variable]] if variable in os.environ else usual
    if any(shutil.which(name) for name in compilers):
        return None
    return f"a compiler ({', '.join(compilers)}; the variable {variable} can name another)"


def _apex_norm(config: RunConfig) -> bool:
    asked = config.parts.norm
    missing = _missing_for_apex(APEX_NORM)
    if asked == "apex" and missing:
        raise InputError(config.where("parts.norm"), f"apex needs {missing}", _APEX_REMEDY)
    return asked == "apex" or (asked == "auto" and not missing)


def _apex_optimizer(config: RunConfig) -> bool:
    asked = config.parts.optimizer
    missing = _missing_for_apex(APEX_OPTIMIZER)
    if config.parallel.offload != "none":
        missing = "the optimizer state on the GPU, and parallel.offload moves it"
    if asked == "apex" and missing:
        raise InputError(config.where("parts.optimizer"), f"apex needs {missing}", _APEX_REMEDY)
    return asked == "apex" or (asked == "auto" and not missing)


def _missing_for_apex(modules: tuple[str, str]) -> str | None:
    if device().type != "cuda":
        return "a GPU"
    for module in modules:
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # the package that the module would be in
            found = None
        if found is None:
            return f"the module {module}"
    return None
