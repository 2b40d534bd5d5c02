"""`prune: halving`: decisions against a slow simulation, in any order in which runs arrive."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from sweep_support import HIGH, LOW, sweep_of, write_run

from megaphase.launch.slurm.job_file import read_job, remember_job
from megaphase.sweep.directory import SweepDirectory
from megaphase.sweep.outcome import Outcome
from megaphase.sweep.planning.pruning import comparison_steps, sweep_state
from megaphase.sweep.planning.ranking import by_fronts, by_loss
from megaphase.sweep.slurm import SlurmSweep
from megaphase.sweep.sweep import Sweep
from megaphase.sweep.trials import Trial, all_trials, known_trials
from megaphase.utils.errors import InputError

EVERY = 3
PEAKS = [1e-3, 2e-3, 4e-3]
ARMS = {
    "static": {"rates": [0.05, 0.1, 0.25]},
    "two-phase": {"pretrain": [0.5], "rates": [0.1, 0.5]},
    "keep": {"pretrain": [0.5], "rates": [0.3]},
}


def pruned_sweep(prune: Any, arms: dict[str, Any] = ARMS, **more: Any) -> Sweep:
    more = {"learning_rate": {"peaks": PEAKS}, "seeds": [1, 2]} | more
    sweep = sweep_of(Path("somewhere/sweep"), arms, prune=prune, **more)
    base = sweep.base | {"validation": {"every_steps": EVERY}}
    return sweep.model_copy(update={"base": base})


class Lottery:
    """Losses of a run at a step, (high, low), which are the same whenever they are asked for."""

    def __init__(self, chance: Any) -> None:
        self._chance, self._drawn = chance, {}

    def losses(self, trial: Trial, step: int) -> dict[str, float]:
        key = trial.name, step
        if key not in self._drawn:
            self._drawn[key] = self._chance.randint(1, 8), self._chance.randint(1, 8)
        high, low = self._drawn[key]
        return dict.fromkeys(HIGH, float(high)) | dict.fromkeys(LOW, float(low))

    def fate(self, trial: Trial) -> str:
        """Return whether a run ends, fails or diverges."""
        key = trial.name, -1
        if key not in self._drawn:
            self._drawn[key] = self._chance.choice(["ends"] * 12 + ["fails", "diverges"])
        return self._drawn[key]


def run_all(sweep: Sweep, lottery: Lottery, chance: Any) -> dict[str, Outcome]:
    """Train the pending runs of a sweep in random order, as a runner would; return all outcomes."""
    outcomes: dict[str, Outcome] = {}
    rungs: dict[str, dict[int, dict[str, float]]] = {}
    while True:
        state = sweep_state(sweep, outcomes, rungs)
        if not state.pending_runs:
            return dict(state.outcomes)
        for trial, end_after in chance.sample(
            state.pending_runs, chance.randint(1, len(state.pending_runs))
        ):
            fate, last = lottery.fate(trial), trial.first_step + trial.steps
            if fate == "fails":
                outcomes[trial.name] = Outcome(failed="the disk is full")
            elif fate == "diverges":
                nan = dict.fromkeys([*HIGH, *LOW], math.nan)
                outcomes[trial.name] = Outcome(diverged="ended", losses=nan)
            elif end_after is None:
                outcomes[trial.name] = Outcome(step=last, losses=lottery.losses(trial, last))
            else:
                assert trial.first_step < end_after < last
                rungs.setdefault(trial.name, {})[end_after] = lottery.losses(trial, end_after)


def mean_losses(lottery: Lottery, runs: list[Trial], step: int) -> tuple[float, float]:
    if any(lottery.fate(trial) != "ends" for trial in runs):
        return math.inf, math.inf
    found = [lottery.losses(trial, step) for trial in runs]
    high, low = ([losses[group[0]] for losses in found] for group in (HIGH, LOW))
    return sum(high) / len(high), sum(low) / len(low)


def simulate_static(sweep: Sweep, lottery: Lottery, by: str) -> dict[str, int]:
    """Return the pruned runs of the arm static, with their steps, by plain successive halving."""
    settings_: dict[tuple[Any, float], list[Trial]] = {}
    for trial in all_trials(sweep):
        if trial.arm == "static":
            settings_.setdefault((trial.mixture.rate, trial.peak), []).append(trial)
    left, stopped = list(settings_), {}
    for step in (15, 30):
        pairs = [mean_losses(lottery, settings_[each], step) for each in left]
        score = {"mean": sum, "high": lambda pair: pair[0], "low": lambda pair: pair[1]}[by]
        ranked = sorted(left, key=lambda each: score(pairs[left.index(each)]))  # a stable sort
        kept = ranked[: math.ceil(len(left) / 2)]
        for setting in left:
            if setting not in kept:
                stopped |= {trial.name: step for trial in settings_[setting]}
        left = [setting for setting in left if setting in kept]
    return stopped


@settings(max_examples=15, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from(["mean", "high", "low"]))
def test_decisions_are_those_of_a_plain_simulation(chance: Any, by: str) -> None:
    sweep, lottery = pruned_sweep({"by": by}, {"static": ARMS["static"]}), Lottery(chance)
    outcomes = run_all(sweep, lottery, chance)
    pruned = {n: o.step for n, o in outcomes.items() if o.pruned and n.startswith("static")}
    expected = simulate_static(sweep, lottery, by)
    broken = {n for n, o in outcomes.items() if o.failed or o.diverged}
    assert pruned == {name: step for name, step in expected.items() if name not in broken}


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_arrival_changes_nothing(seed: int) -> None:
    """Also that of first stages; every run ends, was pruned, or waits for one that has no end."""
    more = {"learning_rate": {"peaks": PEAKS[:2]}, "seeds": [1]}
    sweep, lottery = pruned_sweep("halving", **more), Lottery(Random(seed))
    orders = [run_all(sweep, lottery, Random(number)) for number in range(3)]
    first, *others = [{name: repr(each) for name, each in order.items()} for order in orders]
    assert others == [first, first]
    assert any(outcome.pruned for outcome in orders[0].values())
    alone = {trial.name for trial in all_trials(sweep) if trial.source is None}
    assert alone <= set(first)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=9))
def test_fronts_come_in_their_order(pairs: list[tuple[int, int]]) -> None:
    """No pair comes before one that dominates it; first are the lowest mean and then the ends of
    the first front."""
    order = by_fronts([(float(x), float(y)) for x, y in pairs])
    assert sorted(order) == list(range(len(pairs)))
    for place, i in enumerate(order):
        for j in order[place + 1 :]:
            (x, y), (other_x, other_y) = pairs[i], pairs[j]
            assert not (other_x <= x and other_y <= y and (other_x, other_y) != (x, y))
    if len(set(pairs)) > 1:
        front = [
            p for p in pairs if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in pairs)
        ]
        if len(set(front)) > 1 and len(front) == len(set(front)):
            best, *others = (pairs[i] for i in order)
            assert sum(best) == min(map(sum, pairs))
            ends = [end for end in (min(front), max(front)) if end != best]
            assert set(ends) == set(others[: len(ends)])


def test_of_a_front_the_most_isolated_are_kept() -> None:
    front = [(0.0, 10.0), (1.0, 6.0), (1.5, 5.5), (2.0, 5.0), (6.0, 1.0), (10.0, 0.0)]
    assert by_fronts(front)[:5] == [1, 0, 5, 4, 3]
    assert by_fronts([(math.inf, 0.0), (9.0, 9.0)]) == [1, 0]
    assert by_loss([2.0, 1.0, math.inf, 1.0]) == [1, 3, 0, 2]


def test_comparisons_are_at_validations() -> None:
    sweep = pruned_sweep({"at": [0.3, 0.5, 0.9]})
    steps = {t.first_step: comparison_steps(sweep, [t]) for t in all_trials(sweep) if t.is_final}
    assert steps == {0: [18, 30, 54], 30: [39, 45, 57]}


def test_a_comparison_needs_a_validation_before_it() -> None:
    sweep = pruned_sweep({"at": [0.05]})
    with pytest.raises(InputError, match=r"prune\.at: 0\.05 of the 30 steps .* before its first"):
        sweep_state(sweep, {}, {})


FIRST, OTHERS = {"share": 0.5, "rate": 0.1}, {"peak": PEAKS}
NEEDED = {"peak": PEAKS[0]}


@pytest.mark.parametrize(
    "arms",
    [
        {"a": {"phases": [FIRST | {"learning_rate": NEEDED}, {"rate": 0.2}]}},
        {
            "a": {
                "branch_from": "every_peak",
                "phases": [FIRST | {"learning_rate": NEEDED}, {"rate": 0.2}],
            }
        },
        {"a": {"phases": [FIRST | {"learning_rate": {"peak": PEAKS[::2]}}, {"rate": 0.2}]}},
    ],
    ids=["its only peak", "every peak", "one of other peaks"],
)
@pytest.mark.parametrize("seed", range(4))
def test_a_first_stage_that_another_arm_needs_is_not_pruned(arms: Any, seed: int) -> None:
    """Every arm has runs that spend the budget, whatever the losses."""
    both = arms | {"b": {"phases": [FIRST | {"learning_rate": OTHERS}, {"rate": 0.3}]}}
    sweep = pruned_sweep("halving", both, seeds=[1])
    lottery = Lottery(Random(seed))
    lottery.fate = lambda trial: "ends"  # type: ignore[method-assign]
    outcomes = run_all(sweep, lottery, Random(seed))
    known = {trial.name: trial for trial in known_trials(sweep, outcomes)}
    ended = {known[name].arm for name, outcome in outcomes.items() if not outcome.pruned}
    assert {"a", "b"} <= ended
    assert len(known) == len(all_trials(sweep))


def test_nothing_is_compared_after_a_first_stage_that_diverged_with_every_peak() -> None:
    phases = [FIRST, {"share": 0.2, "rate": 0.2}, {"rate": 0.3}]
    sweep = pruned_sweep("halving", {"a": {"phases": phases}}, seeds=[1])
    nan = dict.fromkeys([*HIGH, *LOW], math.nan)
    lost = {trial.name: Outcome(diverged="ended", losses=nan) for trial in known_trials(sweep, {})}
    state = sweep_state(sweep, lost, {})
    assert state.pending_runs == []
    assert state.outcomes == lost


def test_runs_with_other_validations_are_compared_where_all_have_one() -> None:
    every = {"static": {"rates": [0.5], "settings": {"validation.every_steps": [4, 6]}}}
    more = {"learning_rate": {"peaks": PEAKS[:1]}, "seeds": [1], "prune": {"at": [0.5]}}
    sweep = pruned_sweep(arms=every, **more)
    state = sweep_state(sweep, {}, {})
    assert [(each.trial.validation_every, each.end_after) for each in state.pending_runs] == [
        (4, 24), (6, 24)
    ]  # fmt: skip
    outcomes = run_all(sweep, Lottery(Random(1)), Random(1))
    assert len([each for each in outcomes.values() if each.pruned]) <= 1
    assert len(outcomes) == 2
    rare = {"static": {"rates": [0.5], "settings": {"validation.every_steps": [7, 10]}}}
    with pytest.raises(InputError, match=r"first validation of all runs .* is 7 and 10; lower"):
        sweep_state(pruned_sweep(arms=rare, **more), {}, {})


def test_without_prune_all_runs_are_trained_at_once() -> None:
    state = sweep_state(pruned_sweep(None), {}, {})
    assert {pending.end_after for pending in state.pending_runs} == {None}
    assert {
        pending.end_after for pending in sweep_state(pruned_sweep("halving"), {}, {}).pending_runs
    } != {None}


def test_a_failed_run_that_is_retried_is_compared_again() -> None:
    """The decision is a function of what is known: it changes when a failure is taken back."""
    sweep = pruned_sweep("halving", {"static": {"rates": [0.1]}}, seeds=[1])
    names = {trial.peak: trial.name for trial in all_trials(sweep)}
    flat = {
        peak: dict.fromkeys([*HIGH, *LOW], loss)
        for peak, loss in zip(PEAKS, (3.0, 2.0, 1.0), strict=True)
    }
    rungs = {names[peak]: {15: flat[peak]} for peak in PEAKS[:2]}
    failed = {names[PEAKS[2]]: Outcome(failed="the disk is full")}
    state = sweep_state(sweep, failed, rungs)
    assert not state.outcomes.get(names[PEAKS[0]])
    assert [pending.trial.name for pending in state.pending_runs] == [
        names[PEAKS[0]],
        names[PEAKS[1]],
    ]
    waiting = sweep_state(sweep, {}, rungs)
    assert [(pending.trial.peak, pending.end_after) for pending in waiting.pending_runs] == [
        (PEAKS[2], 15)
    ]
    rungs[names[PEAKS[2]]] = {15: flat[PEAKS[2]]}
    assert sweep_state(sweep, {}, rungs).outcomes[names[PEAKS[0]]].pruned == "after step 15 of 60"


def test_runs_that_were_paused_on_a_cluster_go_on_when_nothing_is_pruned_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "squeue").write_text("#!/bin/sh\n")  # an empty queue
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    cluster = {"gpus_per_node": 0}
    sweep = sweep_of(tmp_path / "sweep", {"static": {"rates": [0.1, 0.2]}}, slurm=cluster)
    directory = SweepDirectory(sweep.output)
    directory.prepare(sweep)
    paused, failed = all_trials(sweep)[:2]
    for trial, said in (
        (paused, "job 5_0: checkpoint.end_after: 30 has ended the run; it can be resumed"),
        (failed, "job 5_1: failed with exit code 1; not requeued"),
    ):
        write_run(directory, trial, None)
        log = tmp_path / f"{trial.name}.log"
        log.write_text(f"2026 start 1 of job 5\nmegaphase: {said}\n")
        remember_job(directory.run(trial.name), "5", log)
    assert sweep.config.slurm is not None
    console = Console(quiet=True)
    state = SlurmSweep(sweep, directory, sweep.config.slurm, None, console)._collect_results()
    assert {name: each.failed for name, each in state.outcomes.items()} == {
        failed.name: "job 5_1: failed with exit code 1; not requeued"
    }
    assert paused.name in {pending.trial.name for pending in state.pending_runs}
    assert read_job(directory.run(paused.name)) is None
