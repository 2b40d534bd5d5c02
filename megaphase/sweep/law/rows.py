"""The rows to which a law is fitted: one per run of a sweep that has spent its budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megaphase.optim.schedules import LearningRateConfig, learning_rate
from megaphase.report.load_run import load_run
from megaphase.report.runs import PhasePlan
from megaphase.sweep.arms.run_files import USUAL_KEYS
from megaphase.sweep.arms.setting import TriedSetting
from megaphase.sweep.directory import SweepRecord
from megaphase.sweep.law.model_size import parameters_without_vocabulary
from megaphase.sweep.outcome import Outcome
from megaphase.sweep.pareto.points import reason_of_failure
from megaphase.sweep.sweep import OWN_KEYS
from megaphase.sweep.trials import Trial, chain_of

_SPANS = ", spans"  # after the name of a schedule


@dataclass(frozen=True)
class LawPhase:
    """One phase of a run.

    Attributes:
        tokens: of training text, by task; only of the tasks that it samples.
        changes: whether its mixture changes within it.
        schedule: name of the schedule, `spans` where it spans several phases.
        end: learning rate of the last step, as a fraction of the peak.
        reset: whether it begins with a fresh optimizer state; True in the first phase.
        learning_rate: the section of the run file.
    """

    steps: int
    tokens: Mapping[str, float]
    peak: float
    schedule: str
    end: float
    reset: bool
    learning_rate: Mapping[str, Any] = field(default_factory=dict)
    changes: bool = False

    @property
    def spans(self) -> bool:
        """Whether its schedule spans several phases."""
        return self.schedule.endswith(_SPANS)

    def rate(self, tasks: Iterable[str]) -> float:
        """Return the sampling rate of these tasks together."""
        total = sum(self.tokens.values())
        return sum(self.tokens.get(task, 0.0) for task in tasks) / total if total else 0.0


@dataclass(frozen=True)
class LawRow:
    """One run: what may determine its losses, and the losses.

    Attributes:
        sweep: its name among those that are fitted together; settings of different sweeps are
            different.
        model: the section of the run file.
        unique: training tokens of one epoch, by task, with the padding of packed samples.
        losses: on the validation split, nats per token, by task; empty for a run yet to be trained.
    """

    sweep: str
    run: str
    setting: TriedSetting | None
    seed: int
    model: Mapping[str, Any]
    phases: Sequence[LawPhase]
    unique: Mapping[str, int]
    losses: Mapping[str, float]

    @property
    def parameters(self) -> int:
        """Parameters of the model without embeddings and output projection."""
        return parameters_without_vocabulary(self.model)

    @property
    def steps(self) -> int:
        """Optimizer steps over all phases."""
        return sum(phase.steps for phase in self.phases)

    @property
    def total_tokens(self) -> float:
        """Training tokens of all tasks over all phases."""
        return sum(sum(phase.tokens.values()) for phase in self.phases)

    def tokens(self, task: str) -> float:
        """Return the training tokens of a task over all phases, with repetition."""
        return sum(phase.tokens.get(task, 0.0) for phase in self.phases)

    def epochs(self, task: str) -> float:
        """Return how often the text of a task is seen."""
        return self.tokens(task) / self.unique[task]

    @property
    def name(self) -> str:
        """The setting, for tables."""
        setting = self.setting
        if setting is None:
            return self.run
        parts = [setting.model, setting.arm, setting.label, f"peak {setting.peak:g}"]
        return " ".join(part for part in parts if part)


class LawRows(NamedTuple):
    """The rows of one or several sweeps with the same tasks, and what was left out.

    left_out: number of settings by reason. within: temperatures that divide the rates of the high-
    and of the low-resource group. arms: all of the sweeps', also those that are left out.
    """

    rows: Sequence[LawRow]
    high: Sequence[str]
    low: Sequence[str]
    left_out: Mapping[str, int]
    within: tuple[float, float] = (1.0, 1.0)
    arms: Sequence[str] = ()

    @property
    def tasks(self) -> list[str]:
        """All tasks, the high-resource ones first."""
        return [*self.high, *self.low]


OTHER_VALUES = "other values of the run file"
OTHER_WEIGHTS = "weights of an earlier step, or averaged ones"
FORGETTING = "a last phase that leaves out tasks, which are then forgotten"
FAILED = "a run that failed or diverged"


def law_rows(
    record: SweepRecord,
    phases: Mapping[str, Sequence[PhasePlan]] | None = None,
    name: str | None = None,
) -> LawRows:
    """Return the rows of a sweep, complete or not.

    phases: of runs that have been read already, by name, as they were trained; the directories of
    the others are read. name: of the sweep in these rows; by default that of its directory.

    A law describes what phases, mixtures, learning rates and model sizes do. So it leaves out
    settings with other values of the run file, those whose weights are not of the last step, and
    those whose last phase leaves out tasks: no form describes how fast these are forgotten.

    Raises:
        InputError: the directory of a run is damaged.
    """
    left_out: dict[TriedSetting, str] = {}
    trials = {trial.name: trial for trial in record.trials}
    for trial in record.trials:
        if trial.is_final and trial.name in record.outcomes:
            chain = chain_of(trial, trials)
            reason = _unsuitable(record, chain, record.outcomes[trial.name])
            if reason is not None:
                left_out[trial.setting] = reason
    name = name or record.sweep.output.name
    known_phases = dict(phases or {})
    rows = []
    for trial in record.trials:
        known = trial.is_final and trial.name in record.outcomes
        if known and trial.setting not in left_out:
            chain = chain_of(trial, trials)
            for each in chain:
                if each.name not in known_phases:
                    run = load_run(record.directory.run(each.name))
                    known_phases[each.name] = run.plan.phases
            trained = [phase for each in chain for phase in known_phases[each.name]]
            row = _row(record, trial, trained, name)
            if all(task in row.phases[-1].tokens for task in row.losses):
                rows.append(row)
            else:
                left_out[trial.setting] = FORGETTING
    within = record.sweep.config.within
    temperatures = within.high, within.low
    return LawRows(
        rows,
        record.sweep.high,
        record.sweep.low,
        Counter(left_out.values()),
        temperatures,
        list(record.sweep.config.arms),
    )


def _row(record: SweepRecord, trial: Trial, plans: Sequence[PhasePlan], sweep_name: str) -> LawRow:
    sweep = record.sweep
    return LawRow(
        sweep=sweep_name,
        run=trial.name,
        setting=trial.setting,
        seed=trial.seed,
        model=trial.run["model"],
        phases=_phases(trial, plans),
        unique={task: _epoch_tokens(task, plans, text) for task, text in sweep.tokens.items()},
        losses={
            task: record.outcomes[trial.name].losses[task] for task in (*sweep.high, *sweep.low)
        },
    )


def _epoch_tokens(task: str, plans: Sequence[PhasePlan], text: int) -> int:
    """Return what an epoch of a task takes of a run's tokens, the padding of packed samples
    included; the tokens of its text if it is never trained on.
    """
    shares = [plan.tasks[task] for plan in plans if task in plan.tasks]
    epochs = sum(share.epochs for share in shares)
    return round(sum(share.tokens for share in shares) / epochs) if epochs > 0 else text


def _unsuitable(record: SweepRecord, chain: Sequence[Trial], outcome: Outcome) -> str | None:
    """Return why the last of these runs, each of which starts from the one before, has no row."""
    trial = chain[-1]
    if reason_of_failure(outcome) is not None:
        return FAILED
    if trial.takes_best or trial.takes_average:
        return OTHER_WEIGHTS
    of_sweep = _run_values(record.sweep.base)
    of_sweep["model"] |= record.sweep.config.models[trial.model] if trial.model else {}
    if any(_run_values(each.run) != of_sweep for each in chain):
        return OTHER_VALUES
    return None if all(phase.keys() <= USUAL_KEYS for phase in trial.phases) else OTHER_VALUES


def _run_values(run: Mapping[str, Any]) -> dict[str, Any]:
    # Checkpoints change no loss, and every run uploads its own to another folder.
    own = (*OWN_KEYS, "checkpoint")
    found = {key: value for key, value in run.items() if key not in own}
    return found | {"model": dict(found["model"])}


def _phases(trial: Trial, plans: Sequence[PhasePlan]) -> list[LawPhase]:
    return [
        law_phase(
            content,
            plan.steps,
            {task: share.tokens for task, share in plan.tasks.items()},
            i == 0,
            changes=plan.rates_over_steps is not None,
        )
        for i, (content, plan) in enumerate(zip(trial.phases, plans, strict=True))
    ]


def law_phase(
    content: Mapping[str, Any],
    steps: int,
    tokens: Mapping[str, float],
    first: bool,
    *,
    changes: bool = False,
) -> LawPhase:
    """Return a phase from its content in the run file, its length and its tokens by task.

    changes: whether its mixture changes within it.
    """
    config = LearningRateConfig.model_validate(dict(content["learning_rate"]))
    return LawPhase(
        steps=steps,
        tokens={task: count for task, count in tokens.items() if count > 0},
        peak=config.peak,
        schedule=config.schedule if config.steps in (None, steps) else f"{config.schedule}{_SPANS}",
        end=learning_rate(config, steps - 1, steps) / config.peak,
        reset=first or content.get("optimizer_state", "reset") == "reset",
        learning_rate=content["learning_rate"],
        changes=changes,
    )
