"""Whether the data-parallel ranks can share the batches of the steps that are left to train."""

from __future__ import annotations

from collections.abc import Sequence

from megaphase.checkpoint.names import newest_state
from megaphase.config.phases import PhaseConfig
from megaphase.config.run import RunConfig
from megaphase.plan.batch_config import PhaseBatch
from megaphase.plan.batch_schedule import BatchSchedule, BatchStage
from megaphase.plan.spec import PhaseSpec, PlanSpec
from megaphase.utils.errors import InputError


def check_batches(config: RunConfig, spec: PlanSpec, processes: int) -> None:
    """Check the batch of every step that the run has left after its newest checkpoint.

    Raises:
        InputError: so many processes cannot share one of them evenly.
    """
    state = newest_state(config.output) or {}
    at = state.get("position", {}) if state.get("plan") == spec.fingerprint else {}
    check_remaining_batches(
        config, spec.phases, processes, at.get("phase", 0), at.get("phase_step", 0)
    )


def check_remaining_batches(
    config: RunConfig, phases: Sequence[PhaseSpec], processes: int, phase: int, phase_step: int
) -> None:
    """Likewise, of the steps from step `phase_step` of `phase` on."""
    data = config.data_ranks(processes)
    for number in range(phase, len(phases)):
        first = phase_step if number == phase else 0
        for stage, steps in phases[number].batch.within(phases[number].steps):
            if stage.first_step + steps > first:
                _check(config, number, stage, phases[number].batch, data)


def check_batches_beforehand(config: RunConfig, processes: int) -> None:
    """Likewise, as far as the run file tells without the corpora: the stages of all phases whose
    steps follow from it, and the full batches of the others; of a run that has a checkpoint, the
    full batches alone.

    Raises:
        InputError: so many processes cannot share one of them evenly.
    """
    data = config.data_ranks(processes)
    state = newest_state(config.output)
    begun = {} if state is None else state.get("position", {})
    before: int | None = 0  # tokens planned before the phase, if they are known
    for number in range(begun.get("phase", 0), len(config.phases)):
        settings = config.phase_batch(number)
        batch = settings.schedule(before or 0)
        is_known = before is not None or settings.ramp is None or not settings.ramp.since_run
        steps = _steps(config.phases[number], settings, batch) if is_known else None
        known = batch.stages[-1:]
        if steps is not None and not begun:
            known = tuple(stage for stage, _ in batch.within(steps))
        for stage in known:
            _check(config, number, stage, batch, data)
        if steps is None or before is None:
            before = None
        else:
            before += batch.samples_before(steps) * settings.seq_len


def _steps(phase: PhaseConfig, settings: PhaseBatch, batch: BatchSchedule) -> int | None:
    """Return the steps of a phase, if they follow from the run file alone."""
    if phase.tokens is not None:
        return batch.steps_for(-(-phase.tokens // settings.seq_len))
    return phase.steps


def _check(
    config: RunConfig, number: int, stage: BatchStage, batch: BatchSchedule, data: int
) -> None:
    """Refuse a stage whose batch the data-parallel ranks cannot share."""
    settings, phase = config.phase_batch(number), config.phases[number]
    micro, samples = settings.micro, stage.samples
    if samples % (data * micro) == 0:
        return
    key, whose, change = settings.keys["samples"], "", settings.keys["samples"].split(".")[-1]
    if len(batch.stages) > 1:
        whose = f" samples, the batch of {phase.name} from its step {stage.first_step + 1:,} on,"
        if samples < settings.samples:
            key, change = settings.keys["ramp"], "the ramp's from and step"
    elif phase.batch is not None or phase.model is not None:
        whose = f" samples, the batch of {phase.name},"
    raise InputError(
        config.where(key),
        f"{samples}{whose} is not a multiple of {data} data-parallel ranks × micro {micro} = "
        f"{data * micro}",
        f"change {change}, micro or the number of processes",
    )
