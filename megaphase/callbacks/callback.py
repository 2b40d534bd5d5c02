"""The protocol of callbacks, the records they get, and the list that calls them in order.

Callbacks observe, the trainer acts: a callback changes neither the weights nor where the run is.
Where the trainer has to act on a finding (early stopping, divergence, too many skipped steps), it
asks the callback for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, ClassVar, Self

from megaphase.utils.metrics_rows import Row
from megaphase.utils.spike_words import Exceeded


@dataclass(frozen=True)
class HeldOutLoss:
    """loss: nats a token. bits_per_byte: of the scored text, which compares across tokenizers."""

    loss: float
    bits_per_byte: float


@dataclass(frozen=True)
class StepSeconds:
    """How long a step took: waiting for its batch, training, and before it for a save's copy."""

    data_wait: float
    train: float
    save: float

    @property
    def total(self) -> float:
        return self.data_wait + self.train + self.save


@dataclass(frozen=True)
class StepRecord:
    """A training step that has ended; sums are over the tokens of the global batch.

    Attributes:
        step: its number over the whole run. phase_step: within the phase.
        starts: the StreamPosition of each task before the phase.
        tokens: of the run so far.
        samples, batch_tokens: of the step's global batch.
        loss: mean in nats a token, before the step; loss_by_task: of the tasks in the batch.
        loss_sums, scored_tokens: by task; nats, and tokens that have a target.
        grad_norm: before clipping.
        applied: False where the step was skipped, since the gradient was not finite or the step was
            a loss spike that is left out; is_spike: the latter; exceeded: what was too large then.
        mfu: model FLOPs of the step against the peak of all devices; None where that is not known.
    """

    step: int
    phase: str
    phase_number: int
    phase_step: int
    starts: tuple[Any, ...]
    tokens: int
    samples: int
    batch_tokens: int
    loss: float
    loss_by_task: Mapping[str, float]
    loss_sums: Mapping[str, float]
    scored_tokens: Mapping[str, int]
    learning_rate: float
    grad_norm: float
    applied: bool
    seconds: StepSeconds
    tokens_per_second: float
    mfu: float | None
    is_spike: bool = False
    exceeded: Exceeded = field(default_factory=dict)

    def row(self) -> Row:
        """As in metrics.jsonl."""
        row: Row = {
            "step": self.step,
            "phase": self.phase,
            "phase_step": self.phase_step,
            "tokens": self.tokens,
            "samples": self.samples,
            "loss": self.loss,
            "loss_by_task": dict(self.loss_by_task),
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm,
            "step_seconds": self.seconds.total,
            "data_wait_seconds": self.seconds.data_wait,
            "save_seconds": self.seconds.save,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
        }
        return row if self.applied else row | {"skipped": True}


@dataclass(frozen=True)
class ValidationRecord:
    """Held-out losses by task after `step` steps of the run.

    Attributes:
        gaps: by how much each loss is above the training loss since the validation before, in nats
            a token; None for a task that was not trained on since.
        begins_phase: whether this is the phase's first validation, before its first step.
        average: the losses of the average of the phase's weights; None where there is none.
        repeated: whether these are the losses of the validation at the end of the phase before.
    """

    step: int
    phase: str
    losses: Mapping[str, HeldOutLoss]
    gaps: Mapping[str, float | None]
    begins_phase: bool
    average: Mapping[str, HeldOutLoss] | None = None
    repeated: bool = False

    def row(self) -> Row:
        """As in metrics.jsonl."""
        figures = {
            task: asdict(loss) | ({} if self.gaps[task] is None else {"gap": self.gaps[task]})
            for task, loss in self.losses.items()
        }
        row: Row = {"step": self.step, "phase": self.phase, "validation": figures}
        if self.average is not None:
            row["validation_average"] = {
                task: asdict(found) for task, found in self.average.items()
            }
        return row


@dataclass(frozen=True)
class BenchmarkRecord:
    """Figures of benchmarks after `step` steps of the run, by metric.

    Attributes:
        tasks: of each task of lm-evaluation-harness.
        groups: of each group of tasks, the means.
    """

    step: int
    phase: str
    tasks: Mapping[str, Mapping[str, float]]
    groups: Mapping[str, Mapping[str, float]]

    def row(self) -> Row:
        """As in metrics.jsonl."""
        row: Row = {
            "step": self.step,
            "phase": self.phase,
            "benchmarks": {task: dict(figures) for task, figures in self.tasks.items()},
        }
        if self.groups:
            row["benchmark_groups"] = {name: dict(each) for name, each in self.groups.items()}
        return row


class Callback:
    """Observes a run. Every method does nothing unless a subclass overrides it.

    A callback that exists on all ranks is called on each of them at the same points of the run, so
    that it may use collectives.

    Attributes:
        state_key: the key of the callback's state in a checkpoint's state; None if it has none.
        run: the list that the callback is in, by which it reports events and messages.
    """

    state_key: ClassVar[str | None] = None
    run: CallbackList

    def on_run_begin(self) -> None:
        """The run has loaded its weights, and is about to start or to resume."""

    def on_phase_begin(self, number: int, name: str) -> None:
        """A phase begins; not called where a run resumes within it."""

    def on_step_begin(self, step: int) -> None:
        """A training step begins; its batch is there."""

    def on_step_end(self, record: StepRecord) -> None:
        """A training step has ended, also one that was skipped."""

    def on_validation_end(self, record: ValidationRecord) -> None:
        """The held-out losses have been measured: at the ends of phases and in between."""

    def on_benchmarks_end(self, record: BenchmarkRecord) -> None:
        """Benchmarks have been measured; called on rank 0 alone."""

    def on_event(self, step: int, event: str, facts: Mapping[str, Any]) -> None:
        """Something else happened after `step` steps, such as `checkpoint`; facts: JSON values."""

    def on_save(self) -> Mapping[str, Any]:
        """A checkpoint is about to be saved: make durable what was written.

        Returns facts about it for the checkpoint's state.
        """
        return {}

    def on_run_end(self, error: BaseException | None) -> None:
        """The run is over: close everything. error: with which it ended, if with one."""

    def state_dict(self) -> dict[str, Any]:
        """The callback's whole state, as JSON values; only for one that has a `state_key`."""
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        raise NotImplementedError


class CallbackList:
    """Calls the callbacks of a run, in their order; a context manager around the run.

    Attributes:
        say: prints a sentence, on rank 0.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self._callbacks: list[Callback] = []

    def extend(self, callbacks: Iterable[Callback]) -> None:
        """Add callbacks, to be called after those that are there."""
        for callback in callbacks:
            callback.run = self
            self._callbacks.append(callback)

    def event(self, step: int, event: str, **facts: Any) -> None:
        """Tell all callbacks of something that happened after `step` steps of the run."""
        for callback in self._callbacks:
            callback.on_event(step, event, facts)

    def on_phase_begin(self, number: int, name: str) -> None:
        for callback in self._callbacks:
            callback.on_phase_begin(number, name)

    def on_step_begin(self, step: int) -> None:
        for callback in self._callbacks:
            callback.on_step_begin(step)

    def on_step_end(self, record: StepRecord) -> None:
        for callback in self._callbacks:
            callback.on_step_end(record)

    def on_validation_end(self, record: ValidationRecord) -> None:
        for callback in self._callbacks:
            callback.on_validation_end(record)

    def on_benchmarks_end(self, record: BenchmarkRecord) -> None:
        for callback in self._callbacks:
            callback.on_benchmarks_end(record)

    def on_save(self) -> dict[str, Any]:
        """The facts of all callbacks on this rank, for a checkpoint's state."""
        return {key: value for each in self._callbacks for key, value in each.on_save().items()}

    def state_dict(self) -> dict[str, Any]:
        """The states of the callbacks that have one, for a checkpoint's state."""
        return {key: callback.state_dict() for key, callback in self._with_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a checkpoint's state, which need not know all of the callbacks."""
        for key, callback in self._with_state():
            if key in state:
                callback.load_state_dict(state[key])

    def __enter__(self) -> Self:
        for callback in self._callbacks:
            callback.on_run_begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.ExitStack() as stack:  # which calls all of them, whatever one raises
            for callback in reversed(self._callbacks):
                stack.callback(callback.on_run_end, error)

    def _with_state(self) -> Iterator[tuple[str, Callback]]:
        for callback in self._callbacks:
            if callback.state_key is not None:
                yield callback.state_key, callback
