"""What follows when training diverges: a record, a sentence, and, if asked, the end of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megaphase.callbacks.divergence import Divergence, DivergenceDetector
from megaphase.config.run import RunConfig
from megaphase.training.run_logger import RunLogger
from megaphase.training.train_state import TrainState
from megaphase.utils.errors import RunError


class DivergenceWatch:
    """Between the detector and the loop; every method is called by all ranks."""

    def __init__(
        self,
        config: RunConfig,
        detector: DivergenceDetector,
        record: RunLogger,
        checkpoint: Callable[[int], str | None],
    ) -> None:
        """checkpoint: the newest one that is not of a later step, as `--from` takes it."""
        self._config, self._detector = config, detector
        self._record, self._checkpoint = record, checkpoint

    def begin_phase(self, held_out: Mapping[str, float]) -> None:
        """held_out: losses by task at the phase's start, in nats a token."""
        self._detector.begin_phase(held_out)

    def observe(
        self,
        at: TrainState,
        loss_sums: Mapping[str, float],
        tokens: Mapping[str, float],
        norm: float,
        rate: float,
    ) -> None:
        """Take in a step that was applied; see DivergenceDetector."""
        detector, phase = self._detector, self._config.phases[at.phase].name
        before = detector.found
        new = detector.observe(at.step, loss_sums, tokens, norm, rate)
        if new is not None:
            self._tell(at, phase, new)
        elif before is not None and detector.found is None:
            self._record.event(at.step, "divergence_over", phase=phase, kind=before.kind)
            self._record.say(f"{phase} step {at.step:,}  that is over: {_describe(before)}")

    def is_over(self, *, phase_ends: bool) -> bool:
        """Whether the run has to end here; see DivergenceDetector.is_diverged."""
        stops = self._config.faults.stop_on_divergence
        return stops and self._detector.is_diverged(phase_ends=phase_ends)

    def end(self, step: int, phase: str) -> RunError:
        """Write down that the run ends after `step` steps; what it ends with."""
        assert self._detector.found is not None
        self._record.event(step, "divergence_stop", phase=phase, kind=self._detector.found.kind)
        return diverged_error(self._config, self._detector, step, phase, self._checkpoint)

    def _tell(self, at: TrainState, phase: str, new: Divergence) -> None:
        checkpoint = _last_sound(self._detector, self._checkpoint)
        what = "grad_norm" if new.kind == "gradient_norm" else "loss"
        self._record.event(
            at.step,
            "divergence",
            phase=phase,
            kind=new.kind,
            since=new.since,
            checkpoint=checkpoint,
            **{what: new.value, f"{what}_before": new.expected},
        )
        title = "this may diverge" if new.kind == "gradient_norm" else "this diverges"
        self._record.say(
            f"{phase} step {at.step:,}  Warning: {title}: {_describe(new)}; "
            f"{_remedy(self._config, checkpoint)}"
        )


def diverged_error(
    config: RunConfig,
    detector: DivergenceDetector,
    step: int,
    phase: str,
    checkpoint: Callable[[int], str | None],
) -> RunError:
    """What a run that has diverged ends with, and every later start of it.

    step: steps done. phase: whose they are. checkpoint: see DivergenceWatch.
    """
    assert detector.found is not None
    return RunError(
        f"{phase} step {step:,}: the run has diverged: {_describe(detector.found)}; "
        f"{_remedy(config, _last_sound(detector, checkpoint))}; to train on all the same, set "
        "faults.stop_on_divergence: false"
    )


def _last_sound(
    detector: DivergenceDetector, checkpoint: Callable[[int], str | None]
) -> str | None:
    step = detector.last_sound_step
    return None if step is None else checkpoint(step)


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


def _remedy(config: RunConfig, checkpoint: str | None) -> str:
    changes = ["lower the peak learning rate", "lengthen the warm-up"]
    if config.optimizer.clip == 0:
        changes.append("set optimizer.clip")
    again = "begin again" if checkpoint is None else f"branch from {checkpoint} (--from)"
    return f"{', '.join(changes[:-1])} or {changes[-1]}, and {again}"
