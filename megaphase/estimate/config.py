"""The `hardware` section of a run file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megaphase.config.fields import Few, Figure, Section, Word


class HardwareConfig(Section):
    """The hardware for which `megaphase plan` estimates the time of a step, and against whose peak
    the metrics measure MFU. It changes nothing of a run. A figure that is left out is the card's;
    all of it is explained in [scaling.md](scaling.md).

    The cards are `a100-40gb`, `a100-80gb`, `a100-pcie-40gb`, `a100-pcie-80gb`, `h100-sxm`,
    `h100-pcie`, `h100-nvl`, `h200-sxm`, `h200-nvl`, `b200`, `l40s`, `l40`, `l4`, `a10` and
    `mi300x`.
    """

    card: Word | None = None
    """The GPU that `megaphase plan` estimates for, see below; `h100-sxm` if left out. A run knows
    its GPU by itself."""
    peak_tflops: Figure | None = None
    """TFLOP/s of one GPU in the run's precision, without sparsity; also used for MFU. On a CPU it
    is the peak of one process."""
    efficiency: Annotated[float, Field(ge=1e-6, le=1)] | None = None
    """Fraction of the peak that matrix products reach; 0.65 if left out."""
    memory_gb_per_s: Figure | None = None
    """GB/s of the GPU's own memory."""
    gpus_per_node: Few | None = None
    """GPUs of one node; 8 if left out."""
    node_link_gb_per_s: Figure | None = None
    """GB/s of one GPU to the others of its node, in one direction (450 for NVLink's "900 GB/s")."""
    network_gbit_per_s: Figure | None = None
    """Gbit/s of one GPU to other nodes, in one direction (400 for eight 400 Gbit/s adapters in a
    node of eight)."""
