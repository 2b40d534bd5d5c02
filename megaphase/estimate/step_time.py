"""The time of an optimizer step, by activity."""

from __future__ import annotations

from dataclasses import dataclass

from megaphase.distributed.costs import FP32_BYTES, Work
from megaphase.estimate.communication import data_traffic, tensor_backward, tensor_forward
from megaphase.estimate.flops import backward_work, forward_work
from megaphase.estimate.hardware import Hardware
from megaphase.estimate.setup import Setup
from megaphase.model.parameters import parameter_sizes, parameter_specs, train_flops_per_token
from megaphase.optim.config import MuonConfig
from megaphase.optim.muon import matrix_flops

# matrices, attention, elementwise: computing, with recomputation. tensor, data: waiting for
# tensor-parallel and data-parallel communication. optimizer: its pass over the weights.
PARTS = ("matrices", "attention", "elementwise", "tensor", "data", "optimizer")
# Passes of the optimizer over a weight; before them the gradient is read for the norm, and read and
# written to be clipped. AdamW, fused, reads gradient, weight and two moments, and writes the last
# three; Lion's operations are five. Muon's are four, and pieces are sent and received twice.
# Adafactor's are ten: two norms, squares and their two sums, five that change what they read.
OPTIMIZER_PASSES = {
    "adamw": 7,
    "adafactor": 2 + 4 + 4 * 2 + 3,
    "lion": 3 + 2 + 2 + 3 + 3,
    "muon": 3 + 3 + 2 + 3 + 4,
}
CLIPPING_PASSES = 3


@dataclass(frozen=True)
class StepTime:
    """An optimizer step of all ranks together.

    seconds_by: PARTS
    sent_by: bytes that each rank sends, by `tensor` and `data`; those of a second partition of
    the weights by `secondary`
    tokens: of the global batch
    model_flops, peak_flops: of all ranks together; the first as `train_flops_per_token` counts them
    """

    seconds_by: dict[str, float]
    sent_by: dict[str, float]
    tokens: int
    model_flops: float
    peak_flops: float

    @property
    def seconds(self) -> float:
        return sum(self.seconds_by.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation (Chowdhery et al. 2022, appendix B)."""
        return self.model_flops / (self.seconds * self.peak_flops)


def step_time(setup: Setup, hardware: Hardware) -> StepTime:
    """The time of a step, without the time that offload adds."""
    forward, backward = forward_work(setup), backward_work(setup)
    tensor_forth, tensor_back = tensor_forward(setup, hardware), tensor_backward(setup, hardware)
    data = data_traffic(setup, hardware)
    # Data-parallel communication overlaps with everything else in a pass.
    in_forward = _seconds(forward, hardware) + tensor_forth.seconds
    in_backward = _seconds(backward, hardware) + tensor_back.seconds
    count = setup.accumulation
    tensor_all = (tensor_forth + tensor_back) * count
    data_all = data.step(count, in_forward, in_backward)
    seconds = _seconds_by_kind((forward + backward) * count, hardware) | {
        "tensor": tensor_all.seconds,
        "data": data_all.seconds,
        "optimizer": _optimizer_seconds(setup, hardware),
    }
    tokens = setup.samples * setup.shape.seq_len
    sent_by = {"tensor": tensor_all.sent, "data": data_all.sent - data_all.secondary}
    if setup.secondary is not None:
        sent_by["secondary"] = data_all.secondary
    return StepTime(
        seconds,
        sent_by,
        tokens,
        tokens * train_flops_per_token(setup.shape),
        setup.tensor * setup.data * hardware.peak_flops,
    )


def _seconds_by_kind(work: Work, hardware: Hardware) -> dict[str, float]:
    return {
        "matrices": hardware.matrix_seconds(work.matrices),
        "attention": hardware.attention_seconds(work.attention),
        "elementwise": hardware.memory_seconds(work.elementwise),
    }


def _seconds(work: Work, hardware: Hardware) -> float:
    return sum(_seconds_by_kind(work, hardware).values())


def _optimizer_seconds(setup: Setup, hardware: Hardware) -> float:
    """Of the optimizer's pass over the weights; Muon's products, without the time that its pieces
    are on their way."""
    seconds = hardware.memory_seconds(_optimizer_bytes(setup))
    if isinstance(setup.optimizer, MuonConfig):
        specs, iterations = parameter_specs(setup.shape), setup.optimizer.iterations
        flops = sum(matrix_flops(spec, iterations) for spec in specs.values() if spec.matrix)
        seconds += hardware.matrix_seconds(flops / (setup.tensor * setup.data))
    return seconds


def _optimizer_bytes(setup: Setup) -> float:
    """Of the weights that this rank updates; those of bf16 are written once more."""
    parameters = sum(parameter_sizes(setup.shape, setup.tensor).values())
    own = parameters if setup.zero == 0 else parameters / setup.data
    rounded = setup.parameter_bytes if setup.bf16 and setup.zero > 0 else 0
    passes = OPTIMIZER_PASSES[setup.optimizer.name] + CLIPPING_PASSES
    return own * (passes * FP32_BYTES + rounded)
