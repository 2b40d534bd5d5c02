"""The plan of a sweep: runs, steps, tokens and hours by arm, and what a budget would leave out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from megaphase.config.load import run_config
from megaphase.estimate.hardware import hardware_of
from megaphase.estimate.step_time import step_time
from megaphase.plan.load_plan import phase_setups
from megaphase.sweep.local import Machine
from megaphase.sweep.planning.budget import Omission, fit_budget
from megaphase.sweep.planning.timed_trial import STEPS, timed_costs
from megaphase.sweep.planning.work import (
    HOUR,
    Costs,
    Work,
    shape_of,
    tokens_per_step,
    work_of,
)
from megaphase.sweep.sweep import Sweep
from megaphase.sweep.trials import Trial, all_trials, chain_of
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError

# Of an optimizer step, the part that is a forward pass: 2 of 6 operations a weight and token.
FORWARD = 1 / 3
# Guesses: seconds from a command to its first step and from its last one to its end, and the least
# seconds of a layer's forward and backward pass, in which its kernels are launched.
START_SECONDS, LAYER_SECONDS = 30.0, 0.001


@dataclass(frozen=True)
class TimeSource:
    """Where the times come from. card: a GPU of the table, computed; else measured here."""

    card: str | None
    machine: Machine


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep would train. costs: None if no time is known."""

    sweep: Sweep
    trials: Sequence[Trial]
    work: Work
    tokens_per_step: Mapping[str, int]
    costs: Mapping[str, Costs] | None
    source: TimeSource
    card_title: str | None = None

    def costs_of(self, trial: Trial) -> Costs:
        """Return the costs of a run."""
        assert self.costs is not None
        return self.costs[shape_of(trial)]

    def hours(self, work: Work | None = None) -> float:
        """Return how long all runs take, so many at a time."""
        work = work or self.work
        seconds = work.seconds(self.costs_of)
        if self.in_rounds:
            jobs = self.sweep.config.slurm
            return work.elapsed_in_rounds(seconds, None if jobs is None else jobs.at_a_time) / HOUR
        return work.elapsed(seconds, self.source.machine.jobs) / HOUR

    @property
    def in_rounds(self) -> bool:
        """Whether the estimate is of the cluster that the sweep file describes."""
        return self.source.card is not None and self.sweep.config.slurm is not None

    @property
    def processes(self) -> int:
        """Processes of each run."""
        return processes_of(self.sweep, self.source)


def processes_of(sweep: Sweep, source: TimeSource) -> int:
    """Return the processes of each run: those of the sweep file's cluster for a card, if any."""
    jobs = sweep.config.slurm
    if source.card is None or jobs is None:
        return source.machine.processes
    return jobs.nodes * (jobs.tasks_per_node or jobs.gpus_per_node or 1)


def plan_of(
    sweep: Sweep,
    source: TimeSource,
    *,
    timed: bool,
    say: Callable[[str], object] = lambda _: None,
) -> SweepPlan:
    """Return the plan of a sweep.

    timed: whether runs of a few steps are timed here, which takes minutes for each model. say:
    called with a line about each trial before it begins.

    Raises:
        InputError: a run file is invalid, or the table has no such card.
        RunError: a timed run has failed.
    """
    trials = all_trials(sweep)
    tokens, costs, title = {}, {}, None
    for trial in trials:
        shape = shape_of(trial)
        if shape in tokens:
            continue
        config = run_config(Path(f"{sweep.file}: run {trial.name}"), dict(trial.run))
        tokens[shape] = tokens_per_step(config)
        if source.card is None:
            continue
        if (hardware := hardware_of(config, source.card)) is None:
            raise InputError(
                "--card", "the table has no peak in fp32", "add precision: bf16 under settings"
            )
        title = hardware.title
        tokenizer = Tokenizer.load(config.tokenizer)
        setup = phase_setups(config, tokenizer, processes_of(sweep, source))[0].setup
        launches = LAYER_SECONDS * setup.shape.layers * setup.accumulation
        step = max(step_time(setup, hardware).seconds, launches)
        samples = config.validation.samples * len(config.tasks) / config.phase_batch(0).samples
        costs[shape] = Costs(step, step * FORWARD * samples, START_SECONDS)
    if timed:
        costs = timed_costs(sweep, trials, source.machine, say)
    return SweepPlan(sweep, trials, work_of(sweep), tokens, costs or None, source, title)


def plan_table(plan: SweepPlan) -> Table:
    """Return the runs, steps, tokens and hours by arm."""
    title = f"{plan.sweep.output}: {len(plan.trials)} runs"
    table = Table(title=title, title_justify="left")
    table.add_column("arm", overflow="fold")
    for column in ("settings", "runs", "first parts", "steps", "tokens"):
        table.add_column(column, justify="right", overflow="fold")
    if plan.costs is not None:
        table.add_column("hours", justify="right")
    rows: dict[str, Counter[str]] = {trial.arm: Counter() for trial in plan.trials}
    settings: dict[str, set[object]] = {arm: set() for arm in rows}
    for trial in plan.trials:
        row = rows[trial.arm]
        row["runs"] += 1
        row["first parts"] += not trial.is_final
        if trial.is_final:
            settings[trial.arm].add(trial.setting)
    seconds = None if plan.costs is None else plan.work.seconds(plan.costs_of)
    hours = dict.fromkeys(rows, 0.0)
    for number, part in enumerate(plan.work.parts):
        row, arm = rows[part.trial.arm], part.trial.arm
        row["steps"] += part.steps
        row["tokens"] += part.steps * plan.tokens_per_step[shape_of(part.trial)]
        if seconds is not None:
            hours[arm] += seconds[number] / HOUR
    users = _users_of_first_parts(plan)
    for arm, row in rows.items():
        row["settings"] = len(settings[arm])
        name = f"{arm}, of {', '.join(users[arm])}" if arm in users else arm
        table.add_row(*_cells(name, row, None if seconds is None else hours[arm]))
    whole = sum(rows.values(), Counter[str]())
    all_hours = None if seconds is None else sum(seconds) / HOUR
    table.add_row(*_cells("all", whole, all_hours), style="bold")
    return table


def _users_of_first_parts(plan: SweepPlan) -> Mapping[str, Sequence[str]]:
    """Return the arms that use them, by the names of first parts."""
    trials = {trial.name: trial for trial in plan.trials}
    found: dict[str, list[str]] = {}
    for trial in plan.trials:
        for part in chain_of(trial, trials)[:-1] if trial.is_final else []:
            users = found.setdefault(part.arm, [])
            if trial.arm not in users:
                users.append(trial.arm)
    return {name: users for name, users in found.items() if name not in plan.sweep.config.arms}


def _cells(arm: str, row: Counter[str], hours: float | None) -> list[str]:
    cells = [arm, *(f"{row[each]:,}" for each in ("settings", "runs", "first parts", "steps"))]
    cells.append(_rounded(row["tokens"]))
    return cells if hours is None else [*cells, _hours(hours)]


def plan_sentences(plan: SweepPlan) -> Iterator[str]:
    """Yield how long the sweep takes, and what the estimate assumes."""
    sweep, machine = plan.sweep, plan.source.machine
    if sweep.config.halving is not None:
        yield (
            "prune: halving is counted; which settings it stops depends on their losses, and here "
            "it is those that come last in the file."
        )
    if plan.costs is None:
        yield "Add --trial to time a few steps here, or --card to compute the time on a GPU."
        return
    of_each = "1 process" if plan.processes == 1 else f"{plan.processes} processes"
    if plan.in_rounds:
        jobs = sweep.config.slurm
        assert jobs is not None
        limit = "all runs of a round" if jobs.at_a_time is None else f"{jobs.at_a_time} runs"
        at_a_time = f"in rounds, {limit} at a time, without waiting in the queue"
    else:
        at_a_time = f"{machine.jobs} {'run' if machine.jobs == 1 else 'runs'} at a time"
    place = "here" if plan.card_title is None else f"on {plan.card_title}"
    yield f"Estimate: {_time(plan.hours())} {place}, {at_a_time}, {of_each} each."
    if plan.card_title is None:
        yield (
            f"Assumed: {STEPS} timed steps of each model, batch and sequence length are like the "
            "others, with as many runs at a time; start-up, validation, evaluation and "
            "translation as in the trial (its translations are by untrained weights, which end "
            "late); no run fails, diverges or ends early; checkpoints are saved in the background."
        )
    else:
        yield (
            "Assumed: the step time that megaphase plan computes, but at least "
            f"{1000 * LAYER_SECONDS:g} ms for each layer and micro-batch, in which kernels are "
            f"launched, and {START_SECONDS:.0f} s for a run to start and end, which are guesses; "
            "concurrent runs do not slow each other; no evaluation nor translation; no run fails, "
            "diverges or ends early. None of it has been measured."
        )


def budget_sentences(plan: SweepPlan, hours: float) -> Iterator[str]:
    """Yield what would be left out so that the sweep fits a budget of hours.

    Raises:
        InputError: no time is known.
    """
    if plan.costs is None:
        raise InputError("--budget", "no time is known", "add --trial, or --card")
    if plan.hours() <= hours:
        yield f"Budget: {_time(hours)} are enough for all runs."
        return
    least: Omission | None = None
    larger, before = "all runs", plan.work
    for least in fit_budget(plan.sweep, plan.trials):
        needed = plan.hours(least.work)
        if needed <= hours:
            yield (
                f"Budget: {least.title} take {_time(needed)} of the {_time(hours)}; "
                f"{larger} would take {_time(plan.hours(before))}."
            )
            yield from least.sentences
            return
        larger, before = least.title, least.work
    assert least is not None
    needed = plan.hours(least.work)
    yield (
        f"Budget: {_time(hours)} are too few: {least.title} take {_time(needed)}. "
        "Leave out arms, or lower steps."
    )


def _hours(hours: float) -> str:
    return f"{hours:.2g}" if hours < 10 else f"{hours:,.0f}"


def _time(hours: float) -> str:
    """In hours, or below one hour in minutes."""
    return f"{_hours(hours)} hours" if hours >= 1 else f"{60 * hours:.2g} minutes"


def _rounded(number: int) -> str:
    for unit, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= unit:
            return f"{number / unit:.3g} {letter}"
    return str(number)
