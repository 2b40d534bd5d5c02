"""The hardware that a run is on, or is planned for."""

from __future__ import annotations

from dataclasses import dataclass

from megaphase.config.run import RunConfig
from megaphase.estimate.config import HardwareConfig
from megaphase.estimate.gpu_specs import CARDS, GPUSpec, card_of_device
from megaphase.utils.errors import InputError
from megaphase.utils.validation_errors import hint

TERA, GIGA = 1e12, 1e9
BITS = 8  # of a byte
# What is planned for where nothing is named.
USUAL_CARD = "h100-sxm"
# GPUs of a node of DGX and HGX systems and their like.
USUAL_NODE = 8
# Of the peak, reached by a training step's matrix products. The best shape reaches 0.80 on H100,
# 0.86 on A100, 0.78 on B200 (github.com/stas00/ml-engineering, maximum achievable matmul FLOPS); a
# model's shapes are not the best, and hours of them keep the clock lower. Not measured by us yet.
MATRIX_EFFICIENCY = 0.65
# Of the peak, reached by FlashAttention-2, the kernel of torch's attention, on H100 (Shah et al.
# 2024, abstract); on A100 it is 0.5 to 0.73 (Dao 2023).
ATTENTION_EFFICIENCY = 0.35
# Of the memory's bandwidth, reached by kernels that stream.
MEMORY_EFFICIENCY = 0.9
# Of the estimated speed, what runs of others reached at least (docs/scaling.md); what is to be
# expected where the efficiency of the matrix products has not been measured.
EXPECTED = 2 / 3


@dataclass(frozen=True)
class Hardware:
    """GPUs as the estimate sees them; FLOP/s and bytes/s of one GPU, links in one direction.

    title: what it is called where it is shown; assumed: whether nobody has named it
    efficiency: of the peak, what matrix products reach
    expected: of the estimated speed, what is to be expected; 1 if the efficiency was measured
    """

    title: str
    assumed: bool
    peak_flops: float
    efficiency: float
    memory_bandwidth: float
    gpus_per_node: int
    node_link: float
    network: float
    expected: float = EXPECTED

    def matrix_seconds(self, flops: float) -> float:
        return flops / (self.peak_flops * self.efficiency)

    def attention_seconds(self, flops: float) -> float:
        return flops / (self.peak_flops * ATTENTION_EFFICIENCY)

    def memory_seconds(self, size: float) -> float:
        """Of bytes that are read or written by kernels that do little else."""
        return size / (self.memory_bandwidth * MEMORY_EFFICIENCY)


def hardware_of(config: RunConfig, card_name: str | None = None) -> Hardware | None:
    """The hardware that the run file describes; None where it does not say how fast fp32 is.

    card_name: one from the table, in place of the run file's.

    Raises:
        InputError: the table has no such card.
    """
    given, card = config.hardware, planned_card(config, card_name)
    peak = given.peak_tflops
    if peak is None:
        if config.precision != "bf16":
            return None
        peak = card.peak_tflops
    return Hardware(
        title=card.title,
        assumed=card_name is None and given == HardwareConfig(),
        peak_flops=peak * TERA,
        efficiency=given.efficiency or MATRIX_EFFICIENCY,
        memory_bandwidth=(given.memory_gb_per_s or card.memory_gb_per_s) * GIGA,
        gpus_per_node=given.gpus_per_node or USUAL_NODE,
        node_link=(given.node_link_gb_per_s or card.node_link_gb_per_s) * GIGA,
        network=(given.network_gbit_per_s or card.network_gbit_per_s) * GIGA / BITS,
        expected=EXPECTED if given.efficiency is None else 1.0,
    )


def planned_card(config: RunConfig, card_name: str | None = None) -> GPUSpec:
    """The card of the table that is named, on the command line or else in the run file.

    Raises:
        InputError: the table has no such card.
    """
    name = card_name or config.hardware.card or USUAL_CARD
    if name not in CARDS:
        raise InputError(
            "--card" if card_name else config.where("hardware.card"),
            f"no card {name!r} in the table",
            f"{hint(name, CARDS, 'the cards are')} (for another give hardware.peak_tflops)",
        )
    return CARDS[name]


def peak_flops(config: RunConfig, device_name: str | None) -> float | None:
    """FLOP/s of one process's device in the run's precision, which MFU is measured against.

    That of the run file, or else that of the card that is really there; where the table does not
    know it, that of the card that the run file names. None where nothing says it.

    device_name: from `torch.cuda.get_device_name()`, None for a CPU.

    Raises:
        InputError: the run file names a card that is not in the table.
    """
    if config.hardware.peak_tflops is not None:
        return config.hardware.peak_tflops * TERA
    if device_name is None or config.precision != "bf16":
        return None
    card = card_of_device(device_name)
    if card is None and config.hardware.card is not None:
        card = planned_card(config)
    return None if card is None else card.peak_tflops * TERA
