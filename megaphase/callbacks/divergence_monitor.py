"""Reports when training diverges or has recovered, and says when a diverged run has to end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from megaphase.callbacks.callback import Callback, StepRecord, ValidationRecord
from megaphase.callbacks.divergence import Divergence, DivergenceDetector
from megaphase.config.run import RunConfig
from megaphase.utils.errors import RunError


class DivergenceMonitor(Callback):
    """A run's DivergenceDetector, which it feeds and whose findings it reports."""

    state_key: ClassVar[str] = "divergence"

    def __init__(
        self, config: RunConfig, vocabulary: int, checkpoint_until: Callable[[int], str | None]
    ) -> None:
        """
        Args:
            vocabulary: tokens among which the model chooses.
            checkpoint_until: the newest checkpoint that is not of a later step, as `--from` takes
                it; None where there is none.
        """
        self._config, self._checkpoint_until = config, checkpoint_until
        self._detector = DivergenceDetector(vocabulary)

    def on_validation_end(self, record: ValidationRecord) -> None:
        if record.begins_phase:
            losses = {task: loss.loss for task, loss in record.losses.items()}
            self._detector.begin_phase(losses)

    def on_step_end(self, record: StepRecord) -> None:
        if not record.applied:
            return
        step, phase, before = record.step, record.phase, self._detector.found
        new = self._detector.observe(
            step, record.loss_sums, record.scored_tokens, record.grad_norm, record.learning_rate
        )
        if new is not None:
            self._report(step, phase, new)
        elif before is not None and self._detector.found is None:
            self.run.event(step, "divergence_over", phase=phase, kind=before.kind)
            self.run.say(f"{phase} step {step:,}  that is over: {_describe(before)}")

    def is_over(self, *, phase_ends: bool) -> bool:
        """Return whether the run has to end here; see DivergenceDetector.is_diverged."""
        stops = self._config.faults.stop_on_divergence
        return stops and self._detector.is_diverged(phase_ends=phase_ends)

    @property
    def last_sound_step(self) -> int | None:
        """See DivergenceDetector."""
        return self._detector.last_sound_step

    def stop(self, step: int, phase: str) -> RunError:
        """Report that the run ends after `step` steps; the error with which it ends."""
        found = self._detector.found
        assert found is not None
        self.run.event(step, "divergence_stop", phase=phase, kind=found.kind)
        return self.error(step, phase)

    def error(self, step: int, phase: str) -> RunError:
        """The error with which a diverged run ends, and every later start of it.

        step: steps done. phase: whose they are.
        """
        found = self._detector.found
        assert found is not None
        return RunError(
            f"{phase} step {step:,}: the run has diverged: {_describe(found)}; "
            f"{self._remedy(self._last_sound_checkpoint())}; to train on all the same, set "
            "faults.stop_on_divergence: false"
        )

    def state_dict(self) -> dict[str, Any]:
        return self._detector.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._detector.load_state_dict(state)

    def _report(self, step: int, phase: str, new: Divergence) -> None:
        checkpoint = self._last_sound_checkpoint()
        what = "grad_norm" if new.kind == "gradient_norm" else "loss"
        figures = {what: new.value, f"{what}_before": new.expected}
        self.run.event(
            step,
            "divergence",
            phase=phase,
            kind=new.kind,
            since=new.since,
            checkpoint=checkpoint,
            **figures,
        )
        title = "this may diverge" if new.kind == "gradient_norm" else "this diverges"
        self.run.say(
            f"{phase} step {step:,}  Warning: {title}: {_describe(new)}; {self._remedy(checkpoint)}"
        )

    def _last_sound_checkpoint(self) -> str | None:
        step = self._detector.last_sound_step
        return None if step is None else self._checkpoint_until(step)

    def _remedy(self, checkpoint: str | None) -> str:
        changes = ["lower the peak learning rate", "lengthen the warm-up"]
        if self._config.optimizer.clip == 0:
            changes.append("set optimizer.clip")
        again = "begin again" if checkpoint is None else f"branch from {checkpoint} (--from)"
        return f"{', '.join(changes[:-1])} or {changes[-1]}, and {again}"


def _describe(found: Divergence) -> str:
    value, before = f"{found.value:,.4g}", f"{found.expected:,.4g}"
    if found.kind == "gradient_norm":
        return f"the gradient's norm is {value} since step {found.since:,}; it was {before} before"
    if found.kind == "stuck":
        return (
            f"the loss has stayed at {value} since step {found.since:,}; that of uniform guessing "
            f"is {before}"
        )
    above = ", above that of uniform guessing" if found.kind == "above_uniform" else ""
    return f"the loss rose from {before} at step {found.since:,} to {value}{above}"
