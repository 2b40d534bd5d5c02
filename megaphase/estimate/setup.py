"""All that the memory of one process depends on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from megaphase.config.run import RunConfig
from megaphase.distributed.costs import BF16_BYTES, FP32_BYTES
from megaphase.model.shape import GPTShape
from megaphase.ops.matmul import widens_bf16
from megaphase.optim.config import DEFAULT_OPTIMIZER, OptimizerConfig

Device = Literal["cuda", "cpu"]
AverageMemory = Literal["none", "weights", "cpu"]


@dataclass(frozen=True)
class Setup:
    """One rank's part of a run: `tensor` × `data` processes under a ZeRO stage.

    accumulation: micro-batches of an optimizer step; masked: whether samples hold documents that do
    not see each other. overlap: of tensor-parallel collectives, see `model.interleave`.
    keep_gathered: see `estimate.gathered_parameters`. secondary: consecutive ranks among which
    ZeRO-3 partitions a second copy of the weights, or None. compiled: the formulas between the
    matrix products, see `ops`. widened: whether the device computes products of bf16 in fp32, see
    `ops.matmul`. average: where an average of the weights is, see `optim.average_config`; `none`
    without one.
    """

    shape: GPTShape
    tensor: int
    data: int
    zero: int
    sequence: bool
    bf16: bool
    micro: int
    accumulation: int
    masked: bool = False
    offload: str = "none"
    offload_parameters: str = "none"
    overlap: bool = True
    keep_gathered: float = 0.0
    secondary: int | None = None
    device: Device = "cuda"
    compiled: bool = True
    widened: bool = False
    average: AverageMemory = "none"
    optimizer: OptimizerConfig = DEFAULT_OPTIMIZER

    @property
    def compute_bytes(self) -> int:
        """Of one element of the activations."""
        return BF16_BYTES if self.bf16 else FP32_BYTES

    @property
    def parameter_bytes(self) -> int:
        """Of one element of the model's parameters, which stay fp32 without ZeRO."""
        return BF16_BYTES if self.bf16 and self.zero > 0 else FP32_BYTES

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro * self.shape.seq_len

    @property
    def outer_tokens(self) -> int:
        """Tokens of a micro-batch that this rank holds outside the tensor-parallel regions."""
        return self.tokens // self.tensor if self.sequence else self.tokens

    @property
    def seq_len(self) -> int:
        """Tokens of a sample."""
        return self.shape.seq_len

    @property
    def halves(self) -> int:
        """Parts of a micro-batch that take turns, see `model.interleave`."""
        return 2 if self.overlap and self.tensor > 1 and self.micro > 1 else 1

    @property
    def samples(self) -> int:
        """Samples of the global batch."""
        return self.micro * self.accumulation * self.data

    def with_batch(self, samples: int) -> Setup:
        """Another global batch in the same micro-batches, rounded up to whole ones on each rank."""
        return replace(self, accumulation=-(-samples // (self.micro * self.data)))

    def with_micro(self, micro: int) -> Setup:
        """The same global batch in micro-batches of another size."""
        return replace(self, micro=micro, accumulation=self.samples // (micro * self.data))

    def with_processes(self, tensor: int, data: int) -> Setup:
        """The same global batch on another grid of processes; with a second partition of the
        weights only if it can have it."""
        secondary = self.secondary
        if secondary is not None and (tensor > 1 or data % secondary):
            secondary = None
        return replace(
            self,
            tensor=tensor,
            data=data,
            sequence=self.sequence and tensor > 1,
            accumulation=self.samples // (self.micro * data),
            secondary=secondary,
        )


class PhaseSetup(NamedTuple):
    """A phase's name and its setup, with its full batch."""

    name: str
    setup: Setup


def setup_of(
    config: RunConfig, shape: GPTShape, processes: int, device: Device, number: int = 0
) -> Setup:
    """The setup that a run file describes for a phase, on a number of processes.

    shape, number: of the phase; its batch is the full one.

    Raises:
        InputError: tensor parallelism does not divide.
    """
    kernels, average = config.parts.kernels, config.phases[number].average
    return Setup(
        shape=shape,
        tensor=config.parallel.tensor,
        data=processes // config.parallel.tensor,
        zero=config.parallel.zero,
        sequence=config.parallel.sequence,
        bf16=config.precision == "bf16",
        micro=config.phase_batch(number).micro,
        accumulation=config.micro_batches(processes, number),
        masked=any(not task.attends_across_documents for task in config.tasks.values()),
        offload=config.parallel.offload,
        offload_parameters=config.parallel.offload_parameters,
        overlap=config.parallel.overlap,
        keep_gathered=config.parallel.keep_gathered,
        secondary=config.parallel.secondary_partition,
        device=device,
        compiled=kernels == "compile" or (kernels == "auto" and device == "cuda"),
        widened=config.precision == "bf16" and widens_bf16(torch.device(device)),
        average="none" if average is None else average.device,
        optimizer=config.optimizer,
    )
