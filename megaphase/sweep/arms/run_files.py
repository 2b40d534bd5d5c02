"""The content of the run file of one stage of a recipe."""

from __future__ import annotations

import copy
from typing import Any

from megaphase.plan.rate_curves import RateCurve
from megaphase.sweep.arms.config import Arm, PhaseKeys
from megaphase.sweep.arms.setting import Mixture
from megaphase.sweep.arms.stages import Stage
from megaphase.sweep.sweep import Sweep, set_all
from megaphase.utils.decimals import as_written
from megaphase.utils.errors import InputError
from megaphase.utils.remote_files import joined

RATE_DECIMALS = 6
# In what phases of arms differ that have no other settings, such as an order or a batch.
USUAL_KEYS = {"name", "steps", "mixture", "learning_rate", "optimizer_state"}

Phase = dict[str, Any]


def run_content(
    sweep: Sweep, arm: str, model: str | None, name: str, seed: int, stage: Stage, phase: Phase
) -> dict[str, Any]:
    """Return the content of a run file that trains one phase; its checkpoints are uploaded, if at
    all, into a folder of its own.

    Raises:
        InputError: a setting of the arm leads through something that has no such key.
    """
    run: dict[str, Any] = {"seed": seed, "output": str(sweep.output / "runs" / name)}
    run |= copy.deepcopy(sweep.base)
    if model is not None:
        run["model"] |= sweep.config.models[model]
    set_all(sweep.file, f"arms.{arm}.settings", sweep.file, run, stage.settings)
    checkpoint = run.get("checkpoint")
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("upload"), str):
        checkpoint["upload"] = joined(checkpoint["upload"], name)
    return run | {"phases": [phase]}


def stops_early(sweep: Sweep, arm: Arm, run: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a run file whose phase ends when low-resource losses only rise."""
    (phase,) = run.pop("phases")
    overfit = {"tasks": sweep.low, "patience": arm.early_stopping, "when": "all"}
    phase = phase | {"stop": {"overfit": overfit}}
    return run | {"monitor": {"tasks": sweep.low}, "phases": [phase]}


def phase_content(sweep: Sweep, stage: Stage, peak: float) -> Phase:
    """Return the phase of a run file.

    Raises:
        InputError: a task's rate would be rounded to nothing.
    """
    grid, whole = stage.grid, stage.schedule_span.steps
    warmup = round(as_written(grid.warmup) * whole)
    rate: dict[str, Any] = {
        "schedule": grid.schedule,
        "peak": peak,
        "final": float(f"{peak * grid.final:.6g}"),
        "warmup_steps": warmup,
    }
    if grid.decay is not None:
        rate["decay_steps"] = max(1, min(round(as_written(grid.decay) * whole), whole - warmup))
    if stage.schedule_span != stage.span:
        rate["steps"] = whole
    if stage.continues:
        rate["first_step"] = stage.span.start_step - stage.schedule_span.start_step
    if stage.scale_with_batch not in (None, "none"):
        rate["scale_with_batch"] = stage.scale_with_batch
    phase: Phase = {
        "name": stage.name,
        "steps": stage.span.steps,
        "mixture": _mixture_content(sweep, stage),
        "learning_rate": rate,
    }
    own = stage.phase.model_dump(
        mode="json", include=set(PhaseKeys.model_fields), exclude_unset=True, exclude_defaults=True
    )
    if stage.continues:
        own = {"optimizer_state": "keep"} | own
    if own.get("optimizer_state") == "reset":
        del own["optimizer_state"]
    return phase | own


def _mixture_content(sweep: Sweep, stage: Stage) -> dict[str, Any]:
    phase = stage.phase
    if phase.mixture is not None:
        return phase.mixture.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    if not isinstance(phase.rate, RateCurve):
        return mixture_section(sweep, Mixture(rate=phase.rate))
    start, end = (
        mixture_section(sweep, Mixture(rate=rate))["rates"]
        for rate in (phase.rate.from_, phase.rate.to)
    )
    shape = {} if phase.rate.shape == "linear" else {"shape": phase.rate.shape}
    ends = {task: (start.get(task, 0.0), end.get(task, 0.0)) for task in start | end}
    return {
        "rates": {
            task: first if first == last else {"from": first, "to": last, **shape}
            for task, (first, last) in ends.items()
        }
    }


def mixture_section(sweep: Sweep, mixture: Mixture) -> dict[str, Any]:
    """Return the section `mixture` of a phase that is given by a rate or a temperature."""
    if mixture.temperature is not None:
        return {"temperature": mixture.temperature}
    rate = mixture.rate or 0.0
    within = sweep.config.within
    rates = _shares(sweep, sweep.high, within.high, 1 - rate)
    rates |= _shares(sweep, sweep.low, within.low, rate)
    for group, part in ((sweep.high, 1 - rate), (sweep.low, rate)):
        if part > 0 and (lost := next((task for task in group if rates[task] == 0), None)):
            raise InputError(
                sweep.where("arms"),
                f"with {mixture.label} for the low-resource tasks {lost} has a rate below "
                f"{10**-RATE_DECIMALS:g}",
                "choose another rate, or another temperature under within",
            )
    largest = max(rates, key=lambda task: rates[task])
    rest = sum(each for task, each in rates.items() if task != largest)
    rates[largest] = round(1 - rest, RATE_DECIMALS)
    return {"rates": {task: each for task, each in rates.items() if each > 0}}


def _shares(sweep: Sweep, tasks: list[str], temperature: float, rate: float) -> dict[str, float]:
    """Divide a group's rate among its tasks."""
    most = max(sweep.tokens[task] for task in tasks)
    weights = {task: (sweep.tokens[task] / most) ** (1 / temperature) for task in tasks}
    total = sum(weights.values())
    return {task: round(rate * each / total, RATE_DECIMALS) for task, each in weights.items()}
