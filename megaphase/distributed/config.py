"""The `parallel` section of a run file."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megaphase.config.fields import Count, FilePath, FractionOf1, Section


class ParallelConfig(Section):
    """How a model replica and its optimizer state are spread over processes, and in which memory
    they are stored. The data-parallel size is the number of processes divided by `tensor`. Nothing
    here changes a run's numbers but by their rounding, so it may differ from one start of a run to
    the next.

    `nvme` is DeepSpeed's: it needs libaio with its headers (Debian: `libaio-dev`) and a compiler,
    for an operator that is built at the first use, and leaves tensors below 1 MiB in memory.

    With ZeRO 3 every micro-batch gathers the weights from the data-parallel processes block by
    block for its forward pass, each while the one before is computed. For the backward pass it
    gathers them again, but for those of the embedding, of the output projection and of the last
    blocks, up to about a billion elements before the loss, which stay. The weights that
    `keep_gathered` selects (whole blocks in the model's order, from the embedding on, up to that
    fraction of all weights) are gathered once per step instead, after the optimizer has changed
    them, and stay on every GPU in between; gradients are still scattered, and optimizer state stays
    sharded. It pays with several micro-batches per step and memory left: `1.0` sends A · 2 P + 2 P
    bytes where `0.0` sends up to A · 6 P for A micro-batches and P weights in bf16
    ([scaling.md](scaling.md)). `megaphase plan` says in a line when that fits and what it saves.
    Parameters of up to 100,000 elements are always kept. `keep_gathered` changes nothing of a run's
    numbers.

    With `secondary_partition: 8` the weights are partitioned a second time, among every 8
    consecutive processes, which should be those of one node (ZeRO++'s hpZ; Wang et al. 2023,
    arXiv 2306.10209). A weight is gathered from all processes once per optimizer step, at its first
    use; all later gathers of the step, of the first backward pass and of all further micro-batches,
    stay within the 8. It costs each GPU an eighth of the weights in bf16, and on a GPU the host
    waits once a step for every parameter, when that is first given back
    ([performance.md](performance.md#where-the-host-waits-for-a-gpu)). It pays where the network
    between the nodes bounds the step; `megaphase plan` says in a line when it fits and what it
    saves. It changes nothing of a run's numbers. It must divide the data-parallel size, and may be
    combined with `keep_gathered` and with `offload`.
    """

    tensor: Annotated[Count, Field(le=1 << 16)] = 1
    """Tensor-parallel size: processes that share every layer; divides `heads`, `kv_heads` and
    `ffn`."""
    sequence: bool = False
    """Whether the tensor-parallel processes also share the activations between the layers, along
    the sequence; needs `tensor` above 1, which must divide `seq_len`."""
    overlap: bool = True
    """With `tensor` and `micro` above 1: compute one half of a micro-batch while the results of the
    other half are summed over the `tensor` processes, instead of waiting."""
    zero: Literal[0, 1, 2, 3] = 3
    """Stage of DeepSpeed's ZeRO."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Memory for fp32 weights and optimizer state: `none` (beside the model), `cpu` (with `zero` 1
    to 3) or `nvme` (with `zero` 3). torch rounds pinned buffers of the node's memory up to powers
    of two, which `megaphase plan` counts; from torch 2.13 on, the environment variable
    `PYTORCH_ALLOC_CONF=pinned_max_cached_size_mb:256` makes it allocate larger ones as they are."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """Memory for the weights that the model computes with, between their uses; needs `zero` 3 and
    `offload`."""
    offload_folder: FilePath | None = None
    """A folder on every node's own NVMe disk, needed by `nvme` and by nothing else; every run
    directory gets a folder in it."""
    keep_gathered: FractionOf1 = 0.0
    """Fraction of the weights that ZeRO 3 keeps gathered from one micro-batch to the next, see
    below; `zero` 3 only, and not with `offload_parameters`."""
    secondary_partition: Annotated[Count, Field(ge=2, le=1 << 16)] | None = None
    """Consecutive processes, such as those of a node, among which ZeRO 3 partitions a second copy
    of the weights, see below; `zero` 3 and `tensor` 1 only, and not with `offload_parameters`."""

    @property
    def fewest_processes(self) -> int:
        """Of a run with this layout."""
        return self.tensor * (self.secondary_partition or 1)

    @model_validator(mode="after")
    def _sequence_needs_tensor(self) -> Self:
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence: true needs tensor greater than 1")
        return self

    @model_validator(mode="after")
    def _offload_fits_the_stage(self) -> Self:
        if self.offload == "cpu" and self.zero == 0:
            raise ValueError("offload: cpu needs zero 1, 2 or 3")
        if self.offload == "nvme" and self.zero != 3:
            raise ValueError("offload: nvme needs zero 3")
        if self.offload_parameters != "none" and (self.zero != 3 or self.offload == "none"):
            raise ValueError(
                f"offload_parameters: {self.offload_parameters} needs zero 3, and offload, too"
            )
        if self.keep_gathered > 0 and (self.zero != 3 or self.offload_parameters != "none"):
            raise ValueError("keep_gathered needs zero 3 and offload_parameters: none")
        if self.secondary_partition is not None and (
            self.zero != 3 or self.tensor > 1 or self.offload_parameters != "none"
        ):
            raise ValueError(
                "secondary_partition needs zero 3, tensor 1 and offload_parameters: none"
            )
        to_disk = "nvme" in (self.offload, self.offload_parameters)
        if to_disk != (self.offload_folder is not None):
            raise ValueError("offload_folder is needed by nvme and by nothing else")
        return self
