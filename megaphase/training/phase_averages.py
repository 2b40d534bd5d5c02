"""The averages of a run's phases: when the weights are taken, and what a switch does with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megaphase.callbacks.callback import CallbackList
from megaphase.checkpoint.parameters import StoredParameters
from megaphase.checkpoint.state import AVERAGE
from megaphase.checkpoint.store import Checkpoint
from megaphase.config.run import RunConfig
from megaphase.distributed.all_ranks import run_on_all_ranks
from megaphase.optim.average_config import AverageConfig
from megaphase.training.checkpointer import Checkpointer
from megaphase.training.engine import Engine
from megaphase.training.evaluator import HeldOutEvaluator, Losses
from megaphase.training.step_result import StepResult
from megaphase.training.train_state import TrainState
from megaphase.utils.errors import RunError


class PhaseAverages:
    """Keeps the average of the phase in work; every method is called by all ranks."""

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        evaluator: HeldOutEvaluator,
        callbacks: CallbackList,
        checkpointer: Checkpointer,
    ) -> None:
        self._phases, self._engine, self._average = config.phases, engine, engine.average
        self._evaluator, self._callbacks = evaluator, callbacks
        self._checkpointer = checkpointer

    def begin_phase(self, at: TrainState) -> bool:
        """End the average of the phase before and begin that of the next phase.

        Returns whether the weights have become the average before.

        Raises:
            RunError: the phase begins from an average in which no weights are; what was saved last
                is published first.
        """
        phase = self._phases[at.phase]
        taken = self._average.taken
        if phase.begin_from == "average":
            if not taken:
                self._checkpointer.finish()
                raise self._nothing_taken(at)
            self._average.take_over()
            self._callbacks.event(at.step, "begin_from_average", phase=phase.name, taken=taken)
            self._callbacks.say(
                f"{phase.name} step {at.step:,}  begins with the average of {_times(taken)}"
            )
        self._average.end()
        if phase.average is not None:
            self._average.begin(phase.average)
        return phase.begin_from == "average"

    def after_step(self, at: TrainState, result: StepResult) -> None:
        """Take the weights after a step, if that is due and the step was applied; at: after it."""
        config = self._phases[at.phase].average
        if config is not None and config.is_due(at.phase_step):
            self._average.take(result.applied_on_device)

    def losses(self, phase: int, progress: Callable[[], object]) -> Losses | None:
        """The held-out losses of the average by task; None if it has not begun.

        phase, progress: see HeldOutEvaluator.
        """
        if not self._average.taken:
            return None
        progress()
        with self._average.exchanged():
            return self._evaluator.evaluate(phase, progress)

    def _nothing_taken(self, at: TrainState) -> RunError:
        before, phase = self._phases[at.phase - 1], self._phases[at.phase]
        first = 1 if before.average is None else before.average.from_step
        return RunError(
            f"{phase.name} step {at.step:,}: begin_from is average, but {before.name} ended before "
            f"its step {first:,}, after which its average begins (average.from_step), or its steps "
            f"were skipped; the weights are saved: start a run with --from, without begin_from"
        )


def load_average(
    engine: Engine, config: RunConfig, at: TrainState, checkpoint: Checkpoint, *, is_own: bool
) -> None:
    """Load the average that the next step, or the switch before it, needs; called by all ranks.

    Args:
        at: where the run starts or resumes.
        is_own: whether the checkpoint is of this run; otherwise the run is a branch of it.
    """
    if at.phase == len(config.phases):
        return
    wanted = config.phases[at.phase].average
    if at.phase_step == 0:
        if config.phases[at.phase].begin_from == "weights":
            return
        wanted = config.phases[at.phase - 1].average if is_own and at.phase > 0 else None
        wanted = wanted or AverageConfig(kind="uniform")  # read once, for the weights
    if wanted is None:
        return
    stored = StoredParameters(checkpoint.folder)
    if AVERAGE in stored.kinds:
        taken = _taken(checkpoint.state)
        run_on_all_ranks(lambda: engine.average.load(stored, wanted, taken))
    elif at.phase_step > 0:
        engine.average.begin(wanted)


def _taken(state: Mapping[str, object]) -> int:
    found = state.get(AVERAGE)
    taken = found.get("taken") if isinstance(found, dict) else None
    return taken if isinstance(taken, int) and taken > 0 else 1


def _times(taken: int) -> str:
    return "the weights after 1 step" if taken == 1 else f"the weights after {taken:,} steps"
