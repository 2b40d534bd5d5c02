"""The `parts` and `validation` sections of a run file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megaphase.config.fields import Count, ProperFraction, Section, Steps


class BackendsConfig(Section):
    """What computes: changes a run's numbers by their rounding alone.

    kernels: norms, rotary embedding, SwiGLU and cross entropy by torch.compile or operation by
    operation. auto compiles on a GPU where Triton is there, and takes NVIDIA apex where it is
    installed and there is a GPU.
    """

    kernels: Literal["auto", "compile", "eager"] = "auto"
    norm: Literal["auto", "torch", "apex"] = "auto"
    optimizer: Literal["auto", "torch", "apex"] = "auto"


class ValidationConfig(Section):
    """fraction of each task's documents is held out of training; samples of it are scored."""

    every_steps: Steps = 500
    samples: Annotated[Count, Field(le=10**9)] = 256
    fraction: ProperFraction = 0.01
