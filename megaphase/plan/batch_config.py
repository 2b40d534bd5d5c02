"""The `batch` sections of a run file: how many samples an optimizer step takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from megaphase.config.fields import Count, Section
from megaphase.plan.batch_schedule import MOST_STAGES, BatchSchedule

GlobalBatch = Annotated[Count, Field(le=1 << 24)]
BatchTokens = Annotated[Count, Field(le=1 << 40)]
MicroBatch = Annotated[Count, Field(le=1 << 16)]


class RampConfig(Section):
    """A batch that grows in equal steps while the first tokens are trained, as Megatron-LM's
    `rampup-batch-size` does; [plan.md](plan.md#batch-and-ramp) says how it is rounded."""

    from_: BatchTokens = Field(alias="from")
    """The first global batch, below the full one; in samples, or in tokens where the full batch is
    given in `tokens`."""
    step: BatchTokens
    """By how much the batch grows at a time, likewise; must divide the difference between `from`
    and the full batch."""
    tokens: Count
    """Tokens of the whole ramp: every batch below the full one is trained on equally many of
    them."""


class BatchConfig(Section):
    """How many samples an optimizer step takes, in all and at a time. Give the global batch by
    exactly one of `samples` and `tokens`.

    The data-parallel size is the number of processes divided by `parallel.tensor`; it times `micro`
    must divide the global batch of every step that is left to train.
    """

    tokens: BatchTokens | None = None
    """Global batch in tokens, a multiple of `seq_len`: it stays the same in a phase with another
    `seq_len`."""
    samples: GlobalBatch | None = Field(default=None, validate_default=True)
    """Global batch: samples of one optimizer step, over all processes."""
    micro: MicroBatch = 1
    """Micro-batch: samples of one forward and backward pass on one data-parallel rank; must divide
    `samples`."""
    ramp: RampConfig | None = None
    """Smaller batches at the run's start. Its tokens are those planned from the first step of the
    run, in a branch of its own first step, over all phases; a phase with a batch or a ramp of its
    own does not take part."""

    @field_validator("samples")
    @classmethod
    def _one_size(cls, samples: int | None, info: ValidationInfo) -> int | None:
        tokens = info.data.get("tokens", 0)  # 0: given, and reported as wrong
        if samples is None and tokens is None:
            raise PydanticCustomError("missing", "Field required")
        if samples is not None and tokens is not None:
            raise ValueError("tokens is given, too; leave one of them out")
        return samples

    @model_validator(mode="after")
    def _micro_divides(self) -> Self:
        if self.samples is not None and self.samples % self.micro:
            raise ValueError(f"micro ({self.micro}) does not divide samples ({self.samples})")
        return self


class PhaseBatchConfig(Section):
    """Keys of the `batch` section that hold for one phase. A phase that gives `samples` or `tokens`
    has no ramp but its own."""

    samples: GlobalBatch | None = None
    """Global batch of the phase in samples."""
    tokens: BatchTokens | None = None
    """Global batch of the phase in tokens; not with `samples`."""
    micro: MicroBatch | None = None
    """Micro-batch of the phase."""
    ramp: RampConfig | None = None
    """Smaller batches at the phase's start; counts the tokens of the phase."""

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.samples is not None and self.tokens is not None:
            raise ValueError("give one of samples and tokens; found both of them")
        return self


class BatchError(ValueError):
    """A batch that cannot be; key: in a batch section; remedy: what to write there; tokens: those
    that are no whole number of samples, if that is the problem."""

    def __init__(self, key: str, problem: str, remedy: str, tokens: int | None = None) -> None:
        super().__init__(problem)
        self.key, self.problem, self.remedy, self.tokens = key, problem, remedy, tokens


@dataclass(frozen=True)
class Ramp:
    """A ramp in samples.

    Attributes:
        first: the first batch. step: by how much it grows at a time. tokens: of the whole ramp.
        since_run: whether its tokens count from the run's start, not from the phase's.
    """

    first: int
    step: int
    tokens: int
    since_run: bool


@dataclass(frozen=True)
class PhaseBatch:
    """The batch of a phase in samples: the full one, the micro-batch, and the ramp to the full one.

    seq_len: tokens of a sample. keys: of `samples`, `micro` and `ramp` in the run file, by name.
    """

    samples: int
    micro: int
    ramp: Ramp | None
    seq_len: int
    keys: dict[str, str]

    def schedule(self, tokens_before: int) -> BatchSchedule:
        """The batch of every step of the phase.

        tokens_before: planned in the phases of the run before this one.
        """
        if self.ramp is None:
            return BatchSchedule.constant(self.samples)
        return BatchSchedule.ramp(
            self.ramp.first,
            self.ramp.step,
            self.samples,
            self.ramp.tokens,
            seq_len=self.seq_len,
            tokens_before=tokens_before if self.ramp.since_run else 0,
        )


def phase_batch(
    section: BatchConfig, own: PhaseBatchConfig | None, seq_len: int, where: str
) -> PhaseBatch:
    """The batch of a phase of samples of `seq_len` tokens.

    Args:
        section: the run file's `batch`. own: the phase's; where: its key.

    Raises:
        BatchError: a size is no whole number of samples, or the micro-batch or the ramp do not fit.
    """
    own = own or PhaseBatchConfig()
    sized: BatchConfig | PhaseBatchConfig = section
    if own.samples is not None or own.tokens is not None:
        sized = own
    at = where if sized is own else "batch"
    unit = "samples" if sized.tokens is None else "tokens"
    size = sized.samples if sized.tokens is None else sized.tokens
    assert size is not None
    samples = size if unit == "samples" else _samples(size, seq_len, f"{at}.tokens")
    keys = {"samples": f"{at}.{unit}"}
    micro, keys["micro"] = section.micro, "batch.micro"
    if own.micro is not None:
        micro, keys["micro"] = own.micro, f"{where}.micro"
    if samples % micro:
        raise BatchError(
            keys["micro"],
            f"{micro} does not divide the {samples:,} samples of a step",
            "change one of them",
        )
    ramp, keys["ramp"] = own.ramp, f"{where}.ramp"
    since_run = ramp is None and sized is section
    if since_run:
        ramp, keys["ramp"] = section.ramp, "batch.ramp"
    found = None
    if ramp is not None:
        first, step = ramp.from_, ramp.step
        if unit == "tokens":
            first = _samples(first, seq_len, f"{keys['ramp']}.from")
            step = _samples(step, seq_len, f"{keys['ramp']}.step")
        _check_ramp(first, step, samples, keys["ramp"])
        found = Ramp(first, step, ramp.tokens, since_run)
    return PhaseBatch(samples, micro, found, seq_len, keys)


def _samples(tokens: int, seq_len: int, key: str) -> int:
    """So many tokens in samples.

    Raises:
        BatchError: they are no whole number of them.
    """
    samples, rest = divmod(tokens, seq_len)
    if rest:
        raise BatchError(
            key,
            f"{tokens:,} is not a multiple of seq_len {seq_len:,}",
            f"write {near_multiples(tokens, seq_len)}",
            tokens,
        )
    return samples


def near_multiples(tokens: int, of: int) -> str:
    """The multiples of a number above 0 that are next to so many tokens, for messages."""
    number = tokens // of
    return " or ".join(f"{each * of:,}" for each in (number, number + 1) if each > 0)


def _check_ramp(first: int, step: int, samples: int, key: str) -> None:
    """Reject a ramp that does not lead to the full batch."""
    if first >= samples:
        raise BatchError(
            f"{key}.from",
            f"{first:,} samples are not fewer than the full batch of {samples:,}",
            "lower it, or leave the ramp out",
        )
    steps, rest = divmod(samples - first, step)
    if rest:
        raise BatchError(
            f"{key}.step",
            f"{step:,} does not divide the {samples - first:,} samples from the first batch "
            f"({first:,}) to the full one ({samples:,})",
            "write a divisor of that, or change from",
        )
    if steps > MOST_STAGES:
        raise BatchError(
            f"{key}.step",
            f"{step:,} makes {steps:,} stages, more than {MOST_STAGES:,}",
            "raise it",
        )
