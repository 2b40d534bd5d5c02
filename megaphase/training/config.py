"""The `parts` and `validation` sections of a run file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megaphase.config.fields import Count, FilePath, Name, ProperFraction, Section, Steps


class BackendsConfig(Section):
    """The implementations that compute. The first line of a run's output names those that differ
    from torch's own, which compute one operation after the other. Another choice changes a run's
    numbers by their rounding alone, so a run may be resumed with it, but not bit for bit."""

    kernels: Literal["auto", "compile", "eager"] = "auto"
    """The operations between the matrix products (norms with the residual stream, rotary embedding,
    SwiGLU, cross entropy): `compile` compiles each with torch.compile, most to a single kernel, in
    the first step (on a GPU it needs Triton and a C compiler, on a CPU g++); `eager` computes
    operation by operation; `auto` compiles on GPUs where it can."""
    norm: Literal["auto", "torch", "apex"] = "auto"
    """`torch`, or the fused norms of NVIDIA `apex`; `auto` takes apex where there is a GPU, apex
    was built with its CUDA extensions, and `kernels` are not compiled: compiled norms compute the
    sum with the residual stream in the same pass, which apex's do not."""
    optimizer: Literal["auto", "torch", "apex"] = "auto"
    """`torch` (fused AdamW) or `apex` (FusedAdam); `auto` takes apex where there is a GPU and
    apex was built with its CUDA extensions. With `parallel.offload` only `torch`."""


class HarnessConfig(Section):
    """Benchmarks of [lm-evaluation-harness](benchmarks.md) in training, on the current weights;
    they need `pip install "megaphase[lm-eval]"`."""

    tasks: list[str] = Field(min_length=1)
    """Names of tasks, groups or tags of lm-evaluation-harness, or patterns such as
    `belebele_*_Latn`. Their data sets are read at the start of the run."""
    every_steps: Steps
    """Optimizer steps between measurements, counted over the run; besides, they are measured before
    the first step and at the end of every phase."""
    tasks_path: FilePath | None = None
    """A folder with more files of such tasks."""
    limit: Count | None = None
    """Most documents of each task, always the same ones; all if left out."""
    fewshot: Annotated[int, Field(ge=0, le=1000)] | None = None
    """Examples in the context; as each task says if left out."""
    groups: dict[Name, list[str]] = Field(default={})
    """Names or patterns of tasks by group, such as a language; the mean figures of each group are
    reported, too."""


class ValidationConfig(Section):
    """The loss of every task on documents that training never sees."""

    every_steps: Steps = 500
    """Optimizer steps between validations, counted over the run; besides, both ends of every phase
    are validated."""
    samples: Annotated[Count, Field(le=10**9)] = 256
    """Held-out samples of each task that are scored, always the same ones, whatever the seed."""
    fraction: ProperFraction = 0.01
    """Fraction of each task's documents that is held out of training, chosen by a hash of the text;
    `tasks.NAME.held_out` replaces it for one task."""
    harness: HarnessConfig | None = None
    """Benchmarks in training; none if left out. A run that is resumed may have others."""


class TestSplitConfig(Section):
    """A split of documents that are neither trained on nor validated on, for results that no choice
    was made by. `megaphase evaluate --split test` measures it, training never does."""

    __test__ = False  # for pytest

    fraction: ProperFraction | None = None
    """Fraction of each task's documents in the test split, chosen by a hash of the text;
    `tasks.NAME.test` replaces it for one task. If left out, only tasks with a fraction of their own
    have a test split."""
    samples: Annotated[Count, Field(le=10**9)] = 1000
    """Samples of each task that are scored, always the same ones, whatever the seed."""
