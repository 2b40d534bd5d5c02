"""The specifications of GPUs from their makers' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class GPUSpec:
    """One GPU, and its links in the nodes that it is sold in.

    words: those of `torch.cuda.get_device_name()` that tell it from all others
    peak_tflops: dense bf16 (data sheets often state twice as much, with sparsity)
    memory_gb_per_s: of its own memory
    node_link_gb_per_s: to the other GPUs of its node together, one direction (data sheets often
        state the sum of both)
    network_gbit_per_s: to other nodes, one direction, in its maker's own nodes; of cards that are
        sold singly, what is common
    """

    title: str
    words: frozenset[str]
    peak_tflops: float
    memory_gb: float
    memory_gb_per_s: float
    node_link_gb_per_s: float
    network_gbit_per_s: float


def _card(title: str, words: str, *figures: float) -> GPUSpec:
    return GPUSpec(title, frozenset(words.split()), *figures)


# A bridge joins two PCIe cards only: among more, PCIe 4.0 x16 (32 GB/s) or 5.0 x16 (64 GB/s) is the
# link. Cards without bf16 tensor cores, such as V100, are not here.
CARDS = {
    # nvidia-a100-datasheet: 312 TFLOP/s, NVLink 600 GB/s, 8 x 200 Gbit/s in a DGX A100.
    "a100-40gb": _card("A100 SXM 40 GB", "A100", 312, 40, 1555, 300, 200),
    "a100-80gb": _card("A100 SXM 80 GB", "A100 80GB", 312, 80, 2039, 300, 200),
    "a100-pcie-40gb": _card("A100 PCIe 40 GB", "A100 PCIE", 312, 40, 1555, 32, 200),
    "a100-pcie-80gb": _card("A100 PCIe 80 GB", "A100 PCIE 80GB", 312, 80, 1935, 32, 200),
    # nvidia-h100-datasheet: 1,979 (SXM), 1,513 (PCIe) and 1,671 (NVL) TFLOP/s with sparsity, NVLink
    # 900 GB/s (SXM), 8 x 400 Gbit/s in a DGX H100.
    "h100-sxm": _card("H100 SXM", "H100", 989.5, 80, 3350, 450, 400),
    "h100-pcie": _card("H100 PCIe", "H100 PCIE", 756.5, 80, 2000, 64, 400),
    "h100-nvl": _card("H100 NVL", "H100 NVL", 835.5, 94, 3900, 64, 400),
    # hpc-datasheet-h200: 1,979 (SXM) and 1,671 (NVL) TFLOP/s with sparsity; bridges join four NVL.
    "h200-sxm": _card("H200 SXM", "H200", 989.5, 141, 4800, 450, 400),
    "h200-nvl": _card("H200 NVL", "H200 NVL", 835.5, 141, 4800, 450, 400),
    # dgx-b200-datasheet, of eight: 36 PFLOP/s with sparsity, 1,440 GB, 64 TB/s, NVLink 14.4 TB/s,
    # 8 x 400 Gbit/s.
    "b200": _card("B200", "B200", 2250, 180, 8000, 900, 400),
    # l40s-datasheet, l40-datasheet, l4-datasheet, a10-datasheet.
    "l40s": _card("L40S", "L40S", 362, 48, 864, 32, 100),
    "l40": _card("L40", "L40", 181, 48, 864, 32, 100),
    "l4": _card("L4", "L4", 121, 24, 300, 32, 100),
    "a10": _card("A10", "A10", 125, 24, 600, 32, 100),
    # amd-instinct-mi300x-data-sheet: 1,307.4 TFLOP/s, seven links of 64 GB/s each way.
    "mi300x": _card("MI300X", "MI300X", 1307.4, 192, 5300, 448, 400),
}
# A part of a GPU, which has none of the figures of the whole.
_PARTITION = "MIG"


def card_of_device(name: str) -> GPUSpec | None:
    """The card that `torch.cuda.get_device_name()` names, None where it is not in the table.

    Of several that fit, such as H100 and H100 PCIe, the one with most words in the name.
    """
    words = set(re.split(r"[\s_-]+", name.upper()))
    if _PARTITION in words:
        return None
    fitting = [card for card in CARDS.values() if card.words <= words]
    return max(fitting, key=lambda card: len(card.words), default=None)
