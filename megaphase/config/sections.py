"""The sections of a run file beside its phases."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megaphase.config.fields import (
    Count,
    Few,
    FewOrZero,
    Figure,
    FilePath,
    FractionAbove0,
    FractionBelow1,
    FractionOf1,
    NatsOrZero,
    Positive,
    PositiveOrZero,
    ProperFraction,
    RoleOrTaskNames,
    Section,
    Steps,
    Word,
)

# Of a model: beyond what has ever been built, and within what an estimate computes at once.
Layers = Annotated[Count, Field(le=2_000)]
Width = Annotated[Count, Field(le=1 << 24)]
Heads = Annotated[Count, Field(le=1 << 16)]
# Added to what is divided by, in fp32.
Epsilon = Annotated[float, Field(ge=1e-30, le=1)]
Seconds = Annotated[float, Field(ge=0.1, le=1e8)]


class TaskConfig(Section):
    """One training distribution: what it teaches and where its corpus lies (PREFIX of .bin/.idx).

    kind: texts of a language, or pairs for translation.
    attend_across_documents: whether the documents of a sample see each other; by default those of
    an lm task do, translation pairs do not.
    held_out: fraction of its documents that is held out; by default `validation.fraction`.
    subsample: fraction of the others that is trained on; by default all.
    role is any word, such as `high` or `low`, by which a mixture's `over` can name several tasks.
    """

    corpus: FilePath
    kind: Literal["lm", "translation"] = "lm"
    attend_across_documents: bool | None = None
    held_out: ProperFraction | None = None
    subsample: FractionAbove0 | None = None
    role: Word | None = None

    @property
    def attends_across_documents(self) -> bool:
        """`attend_across_documents`, or what the kind of task has where it is left out."""
        if self.attend_across_documents is None:
            return self.kind == "lm"
        return self.attend_across_documents

    @property
    def trained_on(self) -> float:
        """The fraction of the documents that are not held out which is trained on."""
        return 1.0 if self.subsample is None else self.subsample


class ModelConfig(Section):
    """The GPT's shape: a preset, explicit sizes, or a preset with some sizes changed.

    dropout: of the embedding's output and of what every layer adds to it, in training alone.
    """

    seq_len: Annotated[Count, Field(le=1 << 27)]
    preset: Word | None = None
    layers: Layers | None = None
    hidden: Width | None = None
    heads: Heads | None = None
    kv_heads: Heads | None = None
    ffn: Width | None = None
    vocab: Width | None = None
    norm: Literal["rmsnorm", "layernorm"] | None = None
    position: Literal["rotary", "learned"] | None = None
    activation: Literal["swiglu", "gelu"] | None = None
    tied_embeddings: bool | None = None
    bias: bool | None = None
    rotary_base: Annotated[float, Field(ge=1, le=1e15)] | None = None
    norm_eps: Epsilon | None = None
    init_std: Annotated[float, Field(gt=0, le=100)] | None = None
    dropout: FractionBelow1 = 0.0
    activation_checkpointing: Literal["none", "selective", "full"] = "none"


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


class BatchConfig(Section):
    """samples: global batch of an optimizer step; micro: samples of one forward pass per rank."""

    samples: Annotated[Count, Field(le=1 << 24)]
    micro: Annotated[Count, Field(le=1 << 16)] = 1

    @model_validator(mode="after")
    def _micro_divides(self) -> Self:
        if self.samples % self.micro:
            raise ValueError(f"micro ({self.micro}) does not divide samples ({self.samples})")
        return self


class OptimizerConfig(Section):
    """AdamW (Loshchilov and Hutter 2019); clip is the largest global gradient norm, 0 is none."""

    name: Literal["adamw"] = "adamw"
    betas: Annotated[tuple[FractionBelow1, FractionBelow1], Field(strict=False)] = (0.9, 0.95)
    eps: Epsilon = 1e-8
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.1
    clip: PositiveOrZero = 1.0


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


# What the monitor calls the weighted mean of its tasks' losses, beside the tasks' own names.
MONITORED_MEAN = "mean"


class MonitorConfig(Section):
    """Tasks whose best weights are kept, each task's and those of the best weighted mean loss.

    weights: of the tasks in that mean; equal ones if left out.
    """

    tasks: RoleOrTaskNames | None = None
    weights: dict[str, Positive] | None = Field(default=None, min_length=1)
    min_gain: NatsOrZero = 0.0


class CheckpointConfig(Section):
    """The newest `keep` checkpoints stay, and the one at the end of every phase for ever.

    asynchronous: training goes on while a copy of the state is written.
    """

    every_steps: Steps = 1000
    keep: Few = 3
    asynchronous: bool = True


class FaultsConfig(Section):
    """What a run does about faults.

    skip_batches: steps in a row whose loss or gradient is not finite that are left out.
    spike_deviations: how far above the running mean loss a step is reported; 0 never.
    stop_on_divergence: whether a run ends whose loss has risen far and stays there, or is stuck.
    silent_seconds: after so long without a sign of life a rank counts as dead.
    stalled_seconds: after so long without progress on any rank the run counts as hanging.
    """

    skip_batches: FewOrZero = 3
    spike_deviations: PositiveOrZero = 6.0
    stop_on_divergence: bool = True
    silent_seconds: Seconds = 30.0
    stalled_seconds: Seconds = 900.0


class LoggingConfig(Section):
    """every_steps: how often a plain progress line is printed when no terminal is there."""

    every_steps: Steps = 10
    tensorboard: bool = True


class HardwareConfig(Section):
    """What runs are planned for, and what MFU is measured against; changes nothing of a run.

    card: a name from `speed.cards`, which gives what is left out here.
    peak_tflops: dense, in the run's precision; efficiency: what matrix products reach of it.
    *_gb_per_s, *_gbit_per_s: of one GPU, in one direction.
    """

    card: Word | None = None
    peak_tflops: Figure | None = None
    efficiency: Annotated[float, Field(ge=1e-6, le=1)] | None = None
    memory_gb_per_s: Figure | None = None
    gpus_per_node: Few | None = None
    node_link_gb_per_s: Figure | None = None
    network_gbit_per_s: Figure | None = None
