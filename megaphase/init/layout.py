"""The quickest layout that fits, by the project's own estimates of memory and time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from megaphase.estimate.gpu_specs import CARDS
from megaphase.estimate.hardware import (
    BITS,
    EXPECTED,
    GIGA,
    MATRIX_EFFICIENCY,
    TERA,
    Hardware,
)
from megaphase.estimate.memory import estimate
from megaphase.estimate.setup import Setup
from megaphase.estimate.step_time import step_time
from megaphase.estimate.suggestions import CHECKPOINTING, GB, RESERVE, TENSOR_SIZES, fits
from megaphase.model.parameters import train_flops_per_token
from megaphase.model.shape import GPTShape
from megaphase.utils.cores import available_cores
from megaphase.utils.errors import InputError

CPU = "cpu"  # in place of a card's name
# Matrix products in fp32 that a core of a CPU is assumed to do; micro-batches to try there.
GFLOPS_A_CORE, CPU_MICRO = 40.0, (8, 4, 2, 1)
STAGES = (1, 3)
MOST_MICRO = 16
# Tensor-parallel sizes that fit of which the time is compared, beginning with the smallest.
SIZES_COMPARED = 2
# How much quicker a layout must be to be taken in place of a simpler one.
WORTH = 0.03


@dataclass(frozen=True)
class GPUs:
    """The GPUs of the run, or this machine's CPU, which is one process.

    Attributes:
        card: its name in the table of cards, or CPU.
    """

    card: str
    count: int
    per_node: int

    @property
    def is_cpu(self) -> bool:
        return self.card == CPU

    @property
    def hardware(self) -> Hardware:
        """The hardware as `megaphase plan` sees it with this card in the run file."""
        card = CARDS[self.card]
        return Hardware(
            title=card.title,
            assumed=False,
            peak_flops=card.peak_tflops * TERA,
            efficiency=MATRIX_EFFICIENCY,
            memory_bandwidth=card.memory_gb_per_s * GIGA,
            gpus_per_node=self.per_node,
            node_link=card.node_link_gb_per_s * GIGA,
            network=card.network_gbit_per_s * GIGA / BITS,
        )

    @property
    def memory_gb(self) -> float:
        """Nominal memory of one of them, or this machine's memory."""
        if self.is_cpu:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
        return CARDS[self.card].memory_gb

    def describe(self) -> str:
        """Return number and name."""
        if self.is_cpu:
            return f"a CPU of {available_cores()} cores"
        return f"{self.count} × {CARDS[self.card].title}"


@dataclass(frozen=True)
class Layout:
    """A layout that fits.

    Attributes:
        step_seconds: as estimated; without what offload adds.
        memory: bytes on each GPU.
    """

    setup: Setup
    step_seconds: float
    memory: int

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs, as they are to be expected."""
        return EXPECTED * self.setup.samples * self.setup.seq_len / self.step_seconds


def find_layout(shape: GPTShape, gpus: GPUs, samples: int, *, masked: bool) -> Layout | None:
    """Return the quickest layout that fits, or None if nothing does, not even with offload.

    samples: of the global batch, a multiple of the number of GPUs. masked: whether samples hold
    documents that do not see each other.
    """
    if gpus.is_cpu:
        return _cpu_layout(shape, gpus, samples, masked)
    for offload in ("none", "cpu"):
        found = list(_fitting(shape, gpus, samples, masked, offload))
        if found:
            return min(found, key=lambda each: each.step_seconds * _simplicity(each.setup))
    return None


def _cpu_layout(shape: GPTShape, gpus: GPUs, samples: int, masked: bool) -> Layout | None:
    """Return one process in fp32 with the largest micro-batch that fits, at the assumed speed."""
    flops = samples * shape.seq_len * train_flops_per_token(shape)
    seconds = flops / (GFLOPS_A_CORE * GIGA * available_cores())
    for micro in CPU_MICRO:
        if samples % micro:
            continue
        setup = Setup(
            shape=shape,
            tensor=1,
            data=1,
            zero=0,
            sequence=False,
            bf16=False,
            micro=micro,
            accumulation=samples // micro,
            masked=masked,
            device="cpu",
            compiled=False,
        )
        if fits(setup, gpus.memory_gb):
            return Layout(setup, seconds, estimate(setup).total)
    return None


def _simplicity(setup: Setup) -> float:
    """Return a factor on the time of a layout by which simpler ones are preferred."""
    recomputing = CHECKPOINTING.index(setup.shape.activation_checkpointing)
    complications = (setup.tensor > 1) + (setup.zero == 3) + 0.5 * (recomputing > 0)
    return 1 + WORTH * complications


def _fitting(
    shape: GPTShape, gpus: GPUs, samples: int, masked: bool, offload: str
) -> Iterator[Layout]:
    sizes = 0
    for tensor in TENSOR_SIZES:
        if not _divides(tensor, shape, gpus) or sizes == SIZES_COMPARED:
            continue
        found = False
        for zero in STAGES:
            for recomputing in CHECKPOINTING:
                of_shape = replace(shape, activation_checkpointing=recomputing)
                setup = _largest_micro(of_shape, gpus, samples, masked, offload, tensor, zero)
                if setup is None:
                    continue
                found = True
                seconds = step_time(setup, gpus.hardware).seconds
                yield Layout(setup, seconds, estimate(setup).total)
                if setup.micro == min(MOST_MICRO, samples * tensor // gpus.count):
                    break  # more recomputation only takes longer
        sizes += found


def _divides(tensor: int, shape: GPTShape, gpus: GPUs) -> bool:
    """Return whether tensor-parallel ranks of one node can share the model."""
    sizes = [gpus.count, gpus.per_node, shape.heads, shape.kv_heads, shape.ffn, shape.seq_len]
    return not any(size % tensor for size in sizes)


def _largest_micro(
    shape: GPTShape,
    gpus: GPUs,
    samples: int,
    masked: bool,
    offload: Literal["none", "cpu"] | str,
    tensor: int,
    zero: int,
) -> Setup | None:
    """Return the layout with the largest micro-batch that fits; None if none does."""
    data = gpus.count // tensor
    of_rank = samples // data
    micro = 1
    best = None
    while micro <= min(MOST_MICRO, of_rank) and of_rank % micro == 0:
        setup = Setup(
            shape=shape,
            tensor=tensor,
            data=data,
            zero=zero,
            sequence=tensor > 1,
            bf16=True,
            micro=micro,
            accumulation=of_rank // micro,
            masked=masked,
            offload=offload,
        )
        if not fits(setup, gpus.memory_gb):
            break
        best, micro = setup, micro * 2
    return best


def need_more(shape: GPTShape, gpus: GPUs, what: str) -> InputError:
    """Return the error that a model does not fit, with what is needed."""
    if gpus.is_cpu:
        problem = f"{what} does not fit the {gpus.memory_gb:.0f} GB of memory of this machine"
        return InputError(f"--card {CPU}", problem, "take a smaller model, or GPUs")
    least = min(
        estimate(
            Setup(
                shape=replace(shape, activation_checkpointing="full"),
                tensor=tensor,
                data=gpus.count // tensor,
                zero=3,
                sequence=tensor > 1,
                bf16=True,
                micro=1,
                accumulation=1,
            )
        ).total
        for tensor in TENSOR_SIZES
        if _divides(tensor, shape, gpus)
    )
    return InputError(
        f"--gpus {gpus.count}",
        f"{what} does not fit {gpus.describe()}: without offload it needs at least "
        f"{least / GB / (1 - RESERVE):,.0f} GB on each, which has {gpus.memory_gb:g}",
        "take more GPUs, larger ones, or a smaller model",
    )
