"""Early stopping: when a phase ends before its length, and which weights are the best.

Bookkeeping over losses alone: it neither measures nor saves. Its whole state is plain JSON values,
so a run that resumes from a checkpoint decides as the run that was never stopped would have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from megaphase.callbacks.callback import Callback, StepRecord
from megaphase.config.fields import Few, Nats, NatsOrZero, Positive, RoleOrTaskNames, Section

# What the monitor calls the weighted mean of its tasks' losses, beside the tasks' own names.
MONITORED_MEAN = "mean"


class OverfitConfig(Section):
    """Ends a phase when validation losses no longer fall. A task has overfit when its validation
    loss has not fallen by more than `min_gain` below its best of this phase for `patience`
    validations in a row."""

    tasks: RoleOrTaskNames
    """The tasks whose validation loss is watched."""
    patience: Few = 3
    """Validations in a row without a new best loss after which a task has overfit."""
    min_gain: NatsOrZero = 0.0
    """How far below the best a loss must be, in nats per token, to count as a new best."""
    when: Literal["all", "any"] = "all"
    """Whether the phase ends when `all` of the tasks have overfit, or when `any` of them has."""


class StopConfig(Section):
    """Conditions that end a phase before its length is reached. They are checked after every
    validation but that before the phase's first step. The next phase begins with the weights of
    that step, and its streams continue where they stopped."""

    overfit: OverfitConfig | None = None
    """Ends the phase when validation losses no longer fall."""
    loss: dict[str, Nats] | None = Field(default=None, min_length=1)
    """Ends the phase when the validation loss of every named task has fallen to its value, in nats
    per token, for example `{hi: 2.5}`."""


class MonitorConfig(Section):
    """Tasks whose best weights over the whole run are kept, as the checkpoint
    `checkpoints/best-TASK`, beside the weights with the best weighted mean of their losses, as
    `checkpoints/best-mean`."""

    tasks: RoleOrTaskNames | None = None
    """The monitored tasks; none if left out."""
    weights: dict[str, Positive] | None = Field(default=None, min_length=1)
    """Weights of the tasks in the mean, for example `{hi: 2, eu: 1}`, where tasks that are not
    named do not count; equal weights if left out."""
    min_gain: NatsOrZero = 0.0
    """How far below the best a loss must be, in nats per token, to count as a new best."""


@dataclass(frozen=True)
class Best:
    """The lowest loss, nats a token, and the step of the run that had it."""

    step: int
    loss: float


@dataclass(frozen=True)
class PhaseEnd:
    """The consequences of one validation.

    Attributes:
        improved: those of the monitor's tasks, and "mean", whose loss is the best of the whole run.
        stop: why the phase is over, as a sentence; None where it continues.
        gaps: validation loss minus training loss since the validation before, by task, in nats a
            token; None where the task has not been trained on since.
    """

    improved: list[str]
    stop: str | None
    gaps: dict[str, float | None]


@dataclass(frozen=True)
class _Watch:
    """A task that may overfit.

    Attributes:
        best: within the phase; None before its first finite loss.
        without_gain: validations in a row that brought no new best.
    """

    best: Best | None = None
    without_gain: int = 0

    def after(self, step: int, loss: float, min_gain: float) -> _Watch:
        """Update with one more validation."""
        if _is_gain(loss, self.best, min_gain):
            return _Watch(Best(step, loss))
        return _Watch(self.best, self.without_gain + 1)

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Self:
        best = state["best"]
        return cls(None if best is None else Best(**best), state["without_gain"])


@dataclass(frozen=True)
class _TrainingLoss:
    """Of one task since the last validation: nats and scored tokens."""

    loss_sum: float = 0.0
    tokens: int = 0


class EarlyStopping(Callback):
    """Keeps the bests of a run (`monitor`) and says when a phase has to end (`phases[N].stop`).

    Bests count over the whole run, patience within a phase, whose first validation is the one at
    its start. A step counts once, however often it is observed with the same weights: where two
    phases meet, it is the last observation of the one and the first of the other, and no new best
    in the second. Weights that a phase begins with instead, such as an average, may be the best.
    """

    state_key: ClassVar[str] = "monitor"

    def __init__(
        self, monitor: MonitorConfig, monitored: list[str], stops: Sequence[StopConfig]
    ) -> None:
        """
        Args:
            monitored: the names of the tasks that `monitor.tasks` selects.
            stops: the conditions of every phase, with tasks by name.
        """
        self._monitored = monitored
        self._weights = monitor.weights or dict.fromkeys(monitored, 1.0)
        self._min_gain = monitor.min_gain
        self._stops = list(stops)
        self._bests: dict[str, Best] = {}
        self._training: dict[str, _TrainingLoss] = {}
        self._last_step: int | None = None
        self.begin_phase(0)

    def on_phase_begin(self, number: int, name: str) -> None:
        """From here on the stop conditions of this phase hold; patience begins anew."""
        self.begin_phase(number)

    def on_step_end(self, record: StepRecord) -> None:
        if record.applied:
            self.add_training_losses(record.loss_sums, record.scored_tokens)

    def begin_phase(self, number: int) -> None:
        """From here on the stop conditions of phase `number` hold; patience begins anew."""
        self._phase = number
        self._watches: dict[str, _Watch] = {}

    def add_training_losses(
        self, loss_sums: Mapping[str, float], tokens: Mapping[str, int]
    ) -> None:
        """Count the losses of a training step in: finite sums over its scored tokens, by task."""
        for task, loss_sum in loss_sums.items():
            known = self._training.get(task, _TrainingLoss())
            self._training[task] = _TrainingLoss(
                known.loss_sum + loss_sum, known.tokens + int(tokens[task])
            )

    def observe(
        self, step: int, losses: Mapping[str, float], *, new_weights: bool = False
    ) -> PhaseEnd:
        """Take in the validation losses, by task, after `step` steps of the run.

        The training losses that were added count for this observation and are then forgotten.

        new_weights: whether the weights are others than those of an earlier observation of `step`.
        """
        again = step == self._last_step and not new_weights
        self._last_step = step
        if not (again and self._watches):
            self._update_watches(step, losses)
        improved = [] if again else self._update_bests(step, losses)
        gaps = {task: self._gap(task, loss) for task, loss in losses.items()}
        self._training = {}
        return PhaseEnd(improved, self._reason_to_stop(losses), gaps)

    def best(self) -> dict[str, tuple[int, float]]:
        """Step and loss of the best so far of each of the monitor's tasks and of "mean"."""
        return {name: (best.step, best.loss) for name, best in self._bests.items()}

    def state_dict(self) -> dict[str, Any]:
        """All that the monitor knows, as JSON values that survive being written and read."""
        return {
            "phase": self._phase,
            "last_step": self._last_step,
            "bests": {name: asdict(best) for name, best in self._bests.items()},
            "watches": {task: asdict(watch) for task, watch in self._watches.items()},
            "training": {task: asdict(loss) for task, loss in self._training.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state_dict` gave, for the same run file."""
        self._phase, self._last_step = state["phase"], state["last_step"]
        self._bests = {name: Best(**best) for name, best in state["bests"].items()}
        self._watches = {task: _Watch.from_json(each) for task, each in state["watches"].items()}
        self._training = {task: _TrainingLoss(**each) for task, each in state["training"].items()}

    def _update_watches(self, step: int, losses: Mapping[str, float]) -> None:
        overfit = self._stops[self._phase].overfit
        if overfit is not None:
            self._watches = {
                task: self._watches.get(task, _Watch()).after(step, losses[task], overfit.min_gain)
                for task in overfit.tasks
            }

    def _update_bests(self, step: int, losses: Mapping[str, float]) -> list[str]:
        if not self._monitored:
            return []
        named = {task: losses[task] for task in self._monitored}
        named[MONITORED_MEAN] = self._mean(losses)
        improved = [
            name
            for name, loss in named.items()
            if _is_gain(loss, self._bests.get(name), self._min_gain)
        ]
        self._bests |= {name: Best(step, named[name]) for name in improved}
        return improved

    def _mean(self, losses: Mapping[str, float]) -> float:
        weighted = sum(weight * losses[task] for task, weight in self._weights.items())
        return weighted / sum(self._weights.values())

    def _gap(self, task: str, loss: float) -> float | None:
        training = self._training.get(task)
        if training is None or training.tokens == 0:
            return None
        return loss - training.loss_sum / training.tokens

    def _reason_to_stop(self, losses: Mapping[str, float]) -> str | None:
        stop = self._stops[self._phase]
        if stop.loss is not None and _all_reached(losses, stop.loss):
            reached = [f"the loss of {task} reached {goal:g}" for task, goal in stop.loss.items()]
            return ", ".join(reached)
        if stop.overfit is not None:
            return self._reason_of_overfit(stop.overfit)
        return None

    def _reason_of_overfit(self, stop: OverfitConfig) -> str | None:
        overfit = {
            task: watch
            for task, watch in self._watches.items()
            if watch.without_gain >= stop.patience
        }
        needed = 1 if stop.when == "any" else len(stop.tasks)
        if len(overfit) < needed:
            return None
        return "; ".join(_overfit_sentence(task, watch) for task, watch in overfit.items())


def _all_reached(losses: Mapping[str, float], goals: Mapping[str, float]) -> bool:
    return all(losses[task] <= goal for task, goal in goals.items())


def _is_gain(loss: float, best: Best | None, min_gain: float) -> bool:
    return math.isfinite(loss) and (best is None or loss < best.loss - min_gain)


def _overfit_sentence(task: str, watch: _Watch) -> str:
    validations = "1 validation" if watch.without_gain == 1 else f"{watch.without_gain} validations"
    best = "no finite loss"
    if watch.best is not None:
        best = f"best {watch.best.loss:.4f} at step {watch.best.step:,}"
    return f"{task} has overfit: no gain for {validations} ({best})"
