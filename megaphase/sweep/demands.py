"""Whether the text suffices for the mixtures of an arm that cap epochs, over all of its phases."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from megaphase.config.load import run_config
from megaphase.plan.mixture import effective_rates
from megaphase.plan.spec import plan_spec
from megaphase.sweep.sweep import Sweep
from megaphase.sweep.trials import Trial
from megaphase.tokenizer import Tokenizer


def check_demands(sweep: Sweep, trials: Iterable[Trial]) -> None:
    """Check that no phase wants more samples than `max_epochs` leaves of its tasks.

    Raises:
        InputError: names the arm and the phase.
    """
    tokenizer = None
    checked = set()
    for trial in trials:
        # The learning rate changes nothing, so one peak stands for all.
        phases = [phase | {"learning_rate": {"peak": 1.0}} for phase in trial.phases]
        key = str((trial.arm, trial.run["model"], phases))
        capped = any("max_epochs" in phase["mixture"] for phase in phases)
        if not trial.is_final or not capped or key in checked:
            continue
        checked.add(key)
        tokenizer = tokenizer or Tokenizer.load(Path(sweep.base["tokenizer"]))
        spec = plan_spec(run_config(sweep.file, dict(trial.run) | {"phases": phases}), tokenizer)
        places = list(spec.starts)
        for number, phase in enumerate(spec.phases):
            where = sweep.where(f"arms.{trial.arm}.phases[{number}].mixture")
            supply = spec.supply(number, places)
            rates = effective_rates(phase.mixture, supply, phase.samples, where)
            places = [
                place.after(stream.kind_of(phase.kind), int(rates[task] * phase.samples))
                for (task, stream), place in zip(spec.task_streams.items(), places, strict=True)
            ]
