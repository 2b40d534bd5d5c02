"""The runs of a sweep: what each one trains, and from which other run it starts.

Arms that begin with the same phases share the runs of these: the runs are a tree. A phase with a
schedule of its own is trained with every peak, and starts from the peak of the phase before that
had the lowest loss, averaged over the seeds, or from every peak. So the runs are determined step by
step as runs end: `known_trials` is a pure function of the outcomes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from megaphase.sweep.arms.config import PRETRAIN
from megaphase.sweep.arms.recipes import arm_recipes
from megaphase.sweep.arms.run_files import Phase, phase_content, run_content, stops_early
from megaphase.sweep.arms.setting import (
    Mixture,
    TriedSetting,
    number_in_name,
    phases_setting,
    short_form_setting,
)
from megaphase.sweep.arms.stages import Recipe, Stage
from megaphase.sweep.outcome import Outcome
from megaphase.sweep.sweep import Sweep
from megaphase.training.config import ValidationConfig
from megaphase.utils.errors import InputError
from megaphase.utils.names import MOST_BYTES_OF_RUN


@dataclass(frozen=True)
class Trial:
    """One run of `megaphase train`.

    Attributes:
        setting: what it trains, up to and including its own phase; runs of other seeds share it.
        run: the content of its run file.
        phases: of the run files of the whole recipe up to and including this run, first to last.
        source: the name of the run from which it starts.
        source_phase: the phase at whose end it starts.
        is_final: whether it completes the budget; the others are first stages.
        takes_best: whether its weights are those with the lowest mean low-resource loss.
        takes_average: whether its weights are the average at the end of its phase.
    """

    name: str
    setting: TriedSetting
    seed: int
    run: Mapping[str, Any]
    phases: Sequence[Phase]
    source: str | None
    source_phase: str | None
    is_final: bool
    takes_best: bool = False
    takes_average: bool = False

    @property
    def steps(self) -> int:
        """Optimizer steps of the run itself, without those of its sources."""
        return _steps(self.run["phases"])

    @property
    def first_step(self) -> int:
        """Optimizer steps before its own."""
        return _steps(self.phases) - self.steps

    @property
    def validation_every(self) -> int:
        """Steps from one validation to the next."""
        section = self.run.get("validation", {})
        return int(section.get("every_steps", ValidationConfig().every_steps))

    @property
    def arm(self) -> str:
        """The name in the sweep file; "pretrain" for a first stage that several arms share."""
        return self.setting.arm

    @property
    def model(self) -> str | None:
        """A name of the sweep file's models; None if there is only one model."""
        return self.setting.model

    @property
    def share(self) -> float | None:
        """Of the budget before the last phase; None if there is only one phase."""
        return self.setting.share

    @property
    def mixture(self) -> Mixture:
        """Of the run's own phase."""
        return self.setting.mixture

    @property
    def peak(self) -> float:
        """Of the run's own phase."""
        return self.setting.peak


def _steps(phases: Sequence[Phase]) -> int:
    return sum(int(phase["steps"]) for phase in phases)


Choice = Callable[[Sequence[Trial]], float | None]
"""Chooses the peak of a first stage for its branches; None if it is not known (yet)."""


def known_trials(sweep: Sweep, outcomes: Mapping[str, Outcome]) -> list[Trial]:
    """Return all runs that are known to belong to the sweep, in the order of their start."""
    return _trials(sweep, lambda candidates: best_peak(sweep, candidates, outcomes))


def ready_trials(trials: Sequence[Trial], outcomes: Mapping[str, Outcome]) -> list[Trial]:
    """Return the known runs that have not ended and do not wait for another one."""

    def is_there(source: str | None) -> bool:
        return source is None or (source in outcomes and outcomes[source].can_be_branched)

    return [trial for trial in trials if trial.name not in outcomes and is_there(trial.source)]


def blocked_trials(trials: Sequence[Trial], outcomes: Mapping[str, Outcome]) -> list[Trial]:
    """Return the known runs that cannot start, since a run before them has failed or diverged."""
    found: dict[str, Trial] = {}
    for trial in trials:
        source = trial.source
        if trial.name in outcomes or source is None:
            continue
        if source in found or (source in outcomes and not outcomes[source].can_be_branched):
            found[trial.name] = trial
    return list(found.values())


def all_trials(sweep: Sweep) -> list[Trial]:
    """Return as many runs as there will be in the end, as if the first peak were always best."""
    return _trials(sweep, lambda candidates: candidates[0].peak)


def expected_trials(
    sweep: Sweep, outcomes: Mapping[str, Outcome], see: Callable[[Sequence[Trial]], None]
) -> list[Trial]:
    """Return all runs that there will be, in the order of their start. While the best of some first
    stages is not known, their branches are those of the first one.

    see: called with the first stages of every choice.
    """

    def choose(candidates: Sequence[Trial]) -> float | None:
        see(candidates)
        if all(trial.name in outcomes for trial in candidates):
            return best_peak(sweep, candidates, outcomes)
        return candidates[0].peak

    return _trials(sweep, choose)


def certain_sources(sweep: Sweep, outcomes: Mapping[str, Outcome]) -> set[str]:
    """Return the names of the runs from which others start, whatever is chosen among first stages
    that have not all ended: those of an only peak, or of every one."""

    def choose(candidates: Sequence[Trial]) -> float | None:
        if len({trial.peak for trial in candidates}) == 1:
            return candidates[0].peak
        return best_peak(sweep, candidates, outcomes)

    return {trial.source for trial in _trials(sweep, choose) if trial.source is not None}


def count_trials(sweep: Sweep) -> int:
    """Return the number of runs in the end if none fails."""
    return len(all_trials(sweep))


def best_peak(
    sweep: Sweep, candidates: Sequence[Trial], outcomes: Mapping[str, Outcome]
) -> float | None:
    """Return the peak with the lowest loss, averaged over the seeds, if none of its runs failed.

    The loss is the mean over the tasks that the candidates train on. None while some have not
    ended, and if all have failed or diverged.
    """
    if any(trial.name not in outcomes for trial in candidates):
        return None
    scores: dict[float, list[float]] = {}
    failed: set[float] = set()
    for trial in candidates:
        outcome = outcomes[trial.name]
        if not outcome.can_be_branched:
            failed.add(trial.peak)
            continue
        scores.setdefault(trial.peak, []).append(own_loss(sweep, trial, outcome))
    means = {peak: fmean(each) for peak, each in scores.items() if peak not in failed}
    return min(means, key=lambda peak: (means[peak], peak), default=None)


def own_loss(sweep: Sweep, trial: Trial, outcome: Outcome) -> float:
    """Return the loss by which runs of a stage are compared: the mean over its training tasks, in
    which both groups have the same weight."""
    sampled = sampled_tasks(trial)
    groups = [[task for task in group if task in sampled] for group in (sweep.high, sweep.low)]
    return fmean(outcome.group_loss(group) for group in groups if group)


def sampled_tasks(trial: Trial) -> list[str]:
    """Return the tasks that a run's own phase samples."""
    mixture, tasks = trial.run["phases"][0]["mixture"], trial.run["tasks"]
    if "rates" in mixture:
        return [task for task, rate in mixture["rates"].items() if rate != 0]
    over = mixture.get("over")
    if isinstance(over, str):
        return [task for task, section in tasks.items() if section.get("role") == over]
    return list(tasks) if over is None else over


def _trials(sweep: Sweep, choose: Choice) -> list[Trial]:
    """Return each run once, first stages first.

    Raises:
        InputError: two different runs have the same name, or a name is too long.
    """
    found: dict[str, Trial] = {}
    for trial in _all_trials(sweep, choose):
        first = found.setdefault(trial.name, trial)
        if first is not trial and first.run != trial.run:
            raise InputError(
                sweep.where("arms"),
                f"two different runs would be called {trial.name}",
                "rename an arm or a model",
            )
        if len(trial.name.encode()) > MOST_BYTES_OF_RUN:
            raise InputError(
                sweep.where(f"arms.{trial.arm}"),
                f"a run would be called {trial.name}, which is too long for a file",
                "shorten the names of arm and model",
            )
    return sorted(found.values(), key=lambda trial: trial.is_final)


BySeed = Mapping[int, "Trial"]
_TrialKey = tuple[int, str | None, int, float, int, str | None]


class _Derived(NamedTuple):
    """What follows from a sweep alone; it is asked for whenever one of many runs has ended."""

    sweep: Sweep
    recipes: Mapping[str, Sequence[Recipe]]
    trials: dict[_TrialKey, Trial]


_newest: _Derived | None = None


def _derived_from(sweep: Sweep) -> _Derived:
    global _newest
    if _newest is None or _newest.sweep is not sweep:
        _newest = _Derived(sweep, {arm: arm_recipes(sweep, arm) for arm in sweep.config.arms}, {})
    return _newest


def _all_trials(sweep: Sweep, choose: Choice) -> Iterator[Trial]:
    derived = _derived_from(sweep)
    for model in sweep.config.models or [None]:
        for recipes in derived.recipes.values():
            for recipe in recipes:
                yield from _Runs(sweep, recipe, model, choose, derived.trials).all()


@dataclass(frozen=True)
class _Runs:
    """The runs of one recipe with one model; known: those that were made before."""

    sweep: Sweep
    recipe: Recipe
    model: str | None
    choose: Choice
    known: dict[_TrialKey, Trial]

    def all(self) -> Iterator[Trial]:
        """Yield the runs of every stage, as far as the peaks from which they start are known."""
        arm = self.sweep.config.arms[self.recipe.arm]
        sources: Sequence[BySeed] = [{}]
        for stage, following in self._stages():
            reached = [runs for source in sources for runs in self._peaks(stage, source)]
            candidates = [trial for runs in reached for trial in runs.values()]
            yield from candidates
            if following is None:
                return
            if not following.continues and arm.branch_from == "best_peak":
                peak = self.choose(candidates)
                reached = [runs for runs in reached if next(iter(runs.values())).peak == peak]
            sources = reached

    def _stages(self) -> Iterator[tuple[Stage, Stage | None]]:
        stages = self.recipe.stages
        return zip(stages, [*stages[1:], None], strict=True)

    def _peaks(self, stage: Stage, sources: BySeed) -> Iterator[BySeed]:
        """Yield the runs of a stage that start from these, for every peak of its schedule."""
        peaks = stage.peaks
        if stage.continues:
            peaks = [next(iter(sources.values())).peak]
        for peak in peaks:
            yield {
                seed: self._trial(stage, peak, seed, sources.get(seed))
                for seed in self.sweep.config.seeds
            }

    def _trial(self, stage: Stage, peak: float, seed: int, source: Trial | None) -> Trial:
        before = None if source is None else source.name
        key = id(self.recipe), self.model, id(stage), peak, seed, before
        if key not in self.known:
            self.known[key] = self._new_trial(stage, peak, seed, source)
        return self.known[key]

    def _new_trial(self, stage: Stage, peak: float, seed: int, source: Trial | None) -> Trial:
        sweep, recipe = self.sweep, self.recipe
        arm = sweep.config.arms[recipe.arm]
        is_final = stage is recipe.stages[-1]
        peaks = (*(() if source is None else source.setting.peaks), peak)
        name = self._name(stage, peaks, seed)
        phase = phase_content(sweep, stage, peak)
        run = run_content(sweep, recipe.arm, self.model, name, seed, stage, phase)
        takes_best = is_final and arm.early_stopping is not None
        if takes_best:
            run = stops_early(sweep, arm, run)
        return Trial(
            name=name,
            setting=self._setting(stage, peaks),
            seed=seed,
            run=run,
            phases=[*(() if source is None else source.phases), *run["phases"]],
            source=None if source is None else source.name,
            source_phase=None if source is None else source.run["phases"][0]["name"],
            is_final=is_final,
            takes_best=takes_best,
            takes_average=stage.phase.average is not None,
        )

    def _name(self, stage: Stage, peaks: tuple[float, ...], seed: int) -> str:
        model = "" if self.model is None else f"{self.model}-"
        stages = zip(self.recipe.stages, peaks, strict=False)
        before = [each for own, each in stages if not own.continues][:-1]
        # If another peak becomes the best one later, its branches are different runs.
        chosen = "".join(f"-f{number_in_name(each)}" for each in before)
        chosen = chosen if set(before) - {peaks[-1]} else ""
        return f"{model}{stage.stem}{chosen}-p{number_in_name(peaks[-1])}-s{seed}"

    def _setting(self, stage: Stage, peaks: tuple[float, ...]) -> TriedSetting:
        recipe, is_final = self.recipe, stage is self.recipe.stages[-1]
        arm = recipe.arm if is_final else stage.owner
        share = self._share(stage)
        axes = recipe.axes if is_final else ()
        if recipe.is_short or (not is_final and stage.owner == PRETRAIN):
            return short_form_setting(arm, self.model, share, stage.mixture, peaks, axes)
        every = self.sweep.config.arms[recipe.arm].branch_from == "every_peak"
        starts = [each.number for each in recipe.stages[: len(peaks)] if not each.continues]
        return phases_setting(
            arm, self.model, share, stage.mixture, peaks, axes, starts if every else starts[-1:]
        )

    def _share(self, stage: Stage) -> float | None:
        """Return the share of the budget before a last stage, or up to the end of another."""
        stages = self.recipe.stages
        if len(stages) == 1:
            return None
        place = stage.span.start if stage is stages[-1] else stage.span.end
        if place.steps == 0:
            return float(place.share)
        return place.step(self.sweep.steps) / self.sweep.steps


def chain_of(trial: Trial, trials: Mapping[str, Trial]) -> list[Trial]:
    """Return the runs of a recipe, first to last; trials: by name."""
    chain = [trial]
    while chain[0].source is not None:
        chain.insert(0, trials[chain[0].source])
    return chain
