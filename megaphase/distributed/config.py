"""The `parallel` section of a run file."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megaphase.config.fields import Count, FilePath, FractionOf1, Section


class ParallelConfig(Section):
    """How one model replica and its optimizer are spread over processes and memories.

    overlap: compute half of a micro-batch while the tensor-parallel ranks sum the other half.
    offload: where fp32 weights and optimizer state lie; offload_parameters: where the weights
    that the model computes with lie. offload_folder: a folder on each node's NVMe disk.
    keep_gathered: the share of the weights that ZeRO-3 keeps gathered from one micro-batch to the
    next.
    """

    tensor: Annotated[Count, Field(le=1 << 16)] = 1
    sequence: bool = False
    overlap: bool = True
    zero: Literal[0, 1, 2, 3] = 3
    offload: Literal["none", "cpu", "nvme"] = "none"
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    offload_folder: FilePath | None = None
    keep_gathered: FractionOf1 = 0.0

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
        to_disk = "nvme" in (self.offload, self.offload_parameters)
        if to_disk != (self.offload_folder is not None):
            raise ValueError("offload_folder is needed by nvme and by nothing else")
        return self
