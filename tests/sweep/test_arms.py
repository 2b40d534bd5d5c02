"""Arms that are given phase by phase: which runs follow from them."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep_support import HIGH, LOW, PEAKS, STEPS, sweep_of
from test_short_forms import trained

from megaphase.config.run import RunConfig
from megaphase.sweep.arms.config import ArmPhase
from megaphase.sweep.arms.values import combinations, schema_at, takes_list
from megaphase.sweep.directory import SweepDirectory, SweepRecord
from megaphase.sweep.measurements import measurements
from megaphase.sweep.outcome import Outcome
from megaphase.sweep.pareto.points import points_of
from megaphase.sweep.pareto.verdict import progress_of
from megaphase.sweep.planning.pruning import PendingRun
from megaphase.sweep.slurm_round import groups_of
from megaphase.sweep.trial_run import train_arguments
from megaphase.sweep.trials import (
    Trial,
    all_trials,
    blocked_trials,
    known_trials,
    own_loss,
    ready_trials,
)
from megaphase.utils.errors import InputError
from megaphase.utils.yaml_file import read_yaml

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "paper"


def finals(trials: list[Trial], arm: str) -> list[Trial]:
    return [trial for trial in trials if trial.is_final and trial.arm == arm]


# An expansion that shares no code with the program: it goes through the phases of an arm with
# loops, and writes down for each run what it trains, as [(steps, rate, peak)].


def slow_recipes(phases: list[dict[str, Any]], steps: int, best: float) -> set[tuple[Any, ...]]:
    """Return the recipes of an arm whose phases have lists of shares and rates; the last one has no
    share, and earlier phases continue from the peak `best`."""
    found = set()
    shares = [phase.get("share", [None]) for phase in phases]
    rates = [phase["rate"] for phase in phases]
    for chosen_shares in itertools.product(*shares):
        ends = []
        for number in range(len(phases) - 1):
            tenths = sum(round(10 * share) for share in chosen_shares[: number + 1])
            ends.append(tenths * steps // 10)
        ends.append(steps)
        lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        for chosen_rates in itertools.product(*rates):
            for last in PEAKS:
                peaks = [best] * (len(phases) - 1) + [last]
                found.add(tuple(zip(lengths, chosen_rates, peaks, strict=True)))
    return found


def as_trained(trial: Trial) -> tuple[Any, ...]:
    return tuple(
        (
            phase["steps"],
            round(sum(phase["mixture"]["rates"].get(task, 0.0) for task in LOW), 5),
            phase["learning_rate"]["peak"],
        )
        for phase in trial.phases
    )


def several(values: list[float], most: int) -> st.SearchStrategy[list[float]]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=most, unique=True)


@st.composite
def phase_lists(draw: st.DrawFn) -> list[dict[str, Any]]:
    count = draw(st.integers(1, 4))
    phases: list[dict[str, Any]] = []
    for number in range(count):
        phase: dict[str, Any] = {"rate": draw(several([0.0, 0.1, 0.4, 1.0], 2))}
        if number < count - 1:
            phase["share"] = draw(several([0.1, 0.2, 0.3], 2))
        phases.append(phase)
    return phases


arm_lists = st.lists(phase_lists(), min_size=1, max_size=3)


@settings(deadline=None, max_examples=40)
@given(arm_lists)
def test_the_runs_are_those_of_a_slow_expansion(arms: list[list[dict[str, Any]]]) -> None:
    best = 0.004
    trials = trained(best, {f"arm-{i}": {"phases": phases} for i, phases in enumerate(arms)})
    prefixes = set()
    for i, phases in enumerate(arms):
        own = finals(trials, f"arm-{i}")
        expected = slow_recipes(phases, STEPS, best)
        assert {as_trained(trial) for trial in own} == expected
        assert len(own) == len(expected)
        assert all(sum(phase["steps"] for phase in trial.phases) == STEPS for trial in own)
        for recipe in expected:
            for length in range(1, len(recipe)):
                for peak in PEAKS:
                    *before, (steps, rate, _) = recipe[:length]
                    prefixes.add((*before, (steps, rate, peak)))
    # Every first part is trained once, with every peak, whatever arms share it.
    firsts = [trial for trial in trials if not trial.is_final]
    assert sorted(map(as_trained, firsts)) == sorted(prefixes)
    assert len({trial.name for trial in trials}) == len(trials)


@settings(deadline=None, max_examples=25)
@given(arm_lists, st.randoms(use_true_random=False))
def test_names_do_not_depend_on_other_arms_or_their_order(
    arms: list[list[dict[str, Any]]], chance: Any
) -> None:
    named = {f"arm-{i}": {"phases": phases} for i, phases in enumerate(arms)}
    together = {trial.name: trial.run for trial in trained(0.001, named)}
    order = list(named)
    chance.shuffle(order)
    shuffled = trained(0.001, {name: named[name] for name in order})
    assert {trial.name: trial.run for trial in shuffled} == together
    alone = {}
    for name, arm in named.items():
        alone |= {trial.name: trial.run for trial in trained(0.001, {name: arm})}
    assert alone == together


@settings(deadline=None, max_examples=25)
@given(phase_lists())
def test_a_branch_from_every_peak_tries_all_of_them(phases: list[dict[str, Any]]) -> None:
    trials = trained(0.001, {"arm": {"phases": phases, "branch_from": "every_peak"}})
    own = finals(trials, "arm")
    recipes = {
        tuple((steps, rate) for steps, rate, _ in recipe)
        for recipe in slow_recipes(phases, STEPS, 0.001)
    }
    peaks = list(itertools.product(PEAKS, repeat=len(phases)))
    expected = {
        tuple((*each, peak) for each, peak in zip(recipe, chosen, strict=True))
        for recipe in recipes
        for chosen in peaks
    }
    assert {as_trained(trial) for trial in own} == expected
    assert len({trial.setting for trial in own}) == len(own) == len(expected)


def test_the_first_stage_of_two_phase_is_shared_with_arms_that_are_spelled_out() -> None:
    trials = trained(
        0.004,
        {
            "two-phase": {"pretrain": [0.85], "rates": [0.1]},
            "spelled": {"phases": [{"share": 0.85, "rate": 0}, {"rate": 0.1}]},
            "averaged": {
                "kind": "two-phase",
                "pretrain": [0.85],
                "rates": [0.1],
                "settings": {"phases[1].average": {"kind": "ema", "decay": 0.9}},
            },
        },
    )
    sources = {trial.source for trial in trials if trial.is_final}
    assert sources == {"pretrain-0.85-p0.004-s1234"}
    (averaged, _) = finals(trials, "averaged")
    assert averaged.takes_average
    assert averaged.run["phases"][0]["average"] == {"kind": "ema", "decay": 0.9}
    short, spelled = (finals(trials, name)[0].phases for name in ("two-phase", "spelled"))
    assert [phase | {"name": ""} for phase in short] == [phase | {"name": ""} for phase in spelled]


def test_what_is_spelled_as_it_would_be_without_is_the_same_run() -> None:
    usual = {"schedule": "cosine", "final": 0.1, "warmup": 0.03, "scale_with_batch": "none"}
    usual["peak"] = None  # a blank: the sweep's peaks
    first = {"share": 0.5, "rate": 0.1}
    spelled = first | {"learning_rate": usual, "optimizer_state": "reset", "order": "balanced"}
    arms = {"a": {"phases": [first, {"rate": 0.3}]}, "b": {"phases": [spelled, {"rate": 0.4}]}}
    trials = trained(0.001, arms)
    assert len([trial for trial in trials if not trial.is_final]) == len(PEAKS)
    differs = {"phases": [first | {"learning_rate": {"final": 0.2}}, {"rate": 0.4}]}
    trials = trained(0.001, arms | {"c": differs})
    assert len([trial for trial in trials if not trial.is_final]) == 2 * len(PEAKS)


def test_schedules_may_be_tried_with_a_peak_each() -> None:
    schedules = [{"schedule": "linear", "peak": 0.003}, {"schedule": "constant"}]
    trials = trained(0.001, {"arm": {"phases": [{"rate": 0.1, "learning_rate": schedules}]}})
    found = [trial.run["phases"][0]["learning_rate"] for trial in trials]
    assert [(each["schedule"], each["peak"]) for each in found] == [
        ("linear", 0.003), ("constant", 0.001), ("constant", 0.004)
    ]  # fmt: skip


def test_a_short_form_may_have_the_papers_random_order() -> None:
    arm = {"kind": "two-phase", "pretrain": [0.5], "rates": [0.1]}
    trials = trained(0.001, {"random": arm | {"settings": {"phases[*].order": "random"}}})
    assert {trial.run["phases"][0]["order"] for trial in trials} == {"random"}
    assert {trial.arm for trial in trials} == {"random-first", "random"}


def test_a_schedule_is_one_over_the_phases_that_continue_it() -> None:
    wsd = {"schedule": "wsd", "decay": 0.15, "final": 0.0, "warmup": 0.1, "peak": [1e-3, 2e-3]}
    phases = [
        {"share": 0.5, "rate": 0, "learning_rate": wsd},
        {"share": 0.25, "rate": 0.1, "learning_rate": "continue", "optimizer_state": "reset"},
        {"rate": 0.3, "learning_rate": "continue"},
    ]
    trials = trained(0.001, {"arm": {"phases": phases}})
    for peak, trial in zip((1e-3, 2e-3), finals(trials, "arm"), strict=True):
        whole = {
            "schedule": "wsd", "peak": peak, "final": 0.0, "warmup_steps": 6, "decay_steps": 9,
            "steps": 60,
        }  # fmt: skip
        rates = [phase["learning_rate"] for phase in trial.phases]
        assert rates == [whole, whole | {"first_step": 30}, whole | {"first_step": 45}]
        kept = [phase.get("optimizer_state") for phase in trial.phases]
        assert kept == [None, None, "keep"]
        assert trial.setting.peaks == (peak, peak, peak)
        assert trial.setting.get("phases[0].learning_rate.peak") == peak
    # A new schedule after one that two phases share begins from the best of its peaks.
    phases = [*phases[:2], {"rate": 0.3}]
    trials = trained(0.002, {"arm": {"phases": phases}})
    before = {trial.source for trial in finals(trials, "arm")}
    (source,) = (trial for trial in trials if trial.name in before)
    assert source.peak == 0.002


def test_short_forms_may_have_a_wsd_schedule() -> None:
    arms = {
        "two-phase": {"pretrain": [0.5], "rates": [0.1]},
        "keep": {"pretrain": [0.7], "rates": [0.1]},
    }
    grid = {"peaks": [1e-3], "schedule": "wsd", "warmup": 0.1, "decay": 0.2, "final": 0.0}
    trials = trained(0.001, arms, learning_rate=grid)
    found = {trial.arm: trial.run["phases"][0]["learning_rate"] for trial in trials}
    own = {"schedule": "wsd", "peak": 1e-3, "final": 0.0}
    assert found["pretrain"] == found["two-phase"] == own | {"warmup_steps": 3, "decay_steps": 6}
    whole = own | {"warmup_steps": 6, "decay_steps": 12, "steps": 60}
    assert found["keep-pretrain"] == whole
    assert found["keep"] == whole | {"first_step": 42}
    with pytest.raises(ValueError, match="schedule wsd needs decay, the fraction of its steps"):
        trained(0.001, arms, learning_rate={"peaks": [1e-3], "schedule": "wsd"})


def test_an_arm_may_have_a_budget_of_its_own() -> None:
    lengths = {"share": [0.5, 1.0, 2.0], "rate": 0}
    trials = trained(
        0.001,
        {"length": {"budget": "own", "phases": [lengths, {"steps": 9, "rate": 0.1}]}},
    )
    own = [[phase["steps"] for phase in trial.phases] for trial in finals(trials, "length")]
    assert own == [[30, 9]] * 2 + [[60, 9]] * 2 + [[120, 9]] * 2
    assert [trial.setting.share for trial in finals(trials, "length")[::2]] == [0.5, 1.0, 2.0]


def test_a_setting_of_which_a_seed_cannot_start_has_no_point() -> None:
    """The first phase of one seed diverges; its branch, and what would follow, never starts."""
    phases = [
        {"share": 0.5, "rate": 0},
        {"share": 0.2, "rate": 0.1, "learning_rate": "continue"},
        {"rate": [0.1, 0.3], "learning_rate": "continue"},
    ]
    sweep = sweep_of(Path("somewhere/sweep"), {"arm": {"phases": phases}}, seeds=[1, 2])
    outcomes: dict[str, Outcome] = {}
    while ready := ready_trials(known_trials(sweep, outcomes), outcomes):
        for trial in ready:
            diverged = trial.source is None and trial.seed == 2 and trial.peak == 0.001
            losses = dict.fromkeys([*HIGH, *LOW], 3.0)
            outcomes[trial.name] = Outcome(
                diverged="at step 3" if diverged else None, losses=losses
            )
    trials = known_trials(sweep, outcomes)
    blocked = blocked_trials(trials, outcomes)
    assert [(trial.seed, trial.peak) for trial in blocked] == [(2, 0.001)] * 3
    record = SweepRecord(SweepDirectory(sweep.output), sweep, trials, outcomes)
    assert {point.setting.peak for point in points_of(record)} == {0.004}
    assert not progress_of(record).waiting


def test_runs_of_one_array_have_one_command_apart_from_the_run_file() -> None:
    """From one first stage start last phases of several names, averages and further stages."""
    average = {"phases[1].average": {"kind": "ema", "decay": 0.9}}
    arms = {
        "two-phase": {"pretrain": [0.5], "rates": [0.1, 0.2]},
        "low-only": {"pretrain": [0.5]},
        "best": {"kind": "two-phase", "pretrain": [0.5], "rates": [0.1], "early_stopping": 2},
        "mean": {"kind": "two-phase", "pretrain": [0.5], "rates": [0.1], "settings": average},
        "long": {"phases": [{"share": 0.5, "rate": 0}, {"share": 0.2, "rate": 0.1}, {"rate": 0.2}]},
    }
    sweep = sweep_of(Path("somewhere/sweep"), arms, translation={})
    first = all_trials(sweep)[0]
    outcomes = {
        trial.name: Outcome(losses=dict.fromkeys([*HIGH, *LOW], 3.0))
        for trial in known_trials(sweep, {})
        if trial.source is None
    }
    directory, file = SweepDirectory(sweep.output), Path("x.yaml")
    known = known_trials(sweep, outcomes)
    ready = [trial for trial in ready_trials(known, outcomes) if trial.source]
    groups = groups_of([PendingRun(trial, None) for trial in ready], most=1001)
    assert len(groups) == 5
    for name, pending_runs in groups.items():
        assert name.startswith(first.name)
        commands = {
            (
                *train_arguments(directory, trial, file, 1),
                *(
                    argument
                    for each in measurements(sweep, trial)
                    for argument in each.arguments(sweep, trial, file, file)
                ),
            )
            for trial, _ in pending_runs
        }
        assert len(commands) == 1


def test_large_groups_are_split_under_names_that_no_other_has() -> None:
    """The last runs begin from a first stage whose name is that of another's second part."""
    trial = all_trials(sweep_of(Path("somewhere/sweep"), {"static": {"rates": [0.1]}}))[0]
    runs = [
        PendingRun(replace(trial, source=source, seed=seed), None)
        for source, seeds in (("a", 5), ("a-2", 2))
        for seed in range(seeds)
    ]
    groups = groups_of(runs, most=2)
    assert list(groups) == ["a", "a-3", "a-4", "a-2"]
    assert [len(members) for members in groups.values()] == [2, 2, 1, 2]
    assert [each for members in groups.values() for each in members] == runs


def test_settings_name_what_differs() -> None:
    arm = {
        "phases": [
            {"share": [0.5, 0.7], "mixture": {"temperature": {"from": [5, 3], "to": 1}}},
            {"mixture": {"unimax": True, "max_epochs": 4, "over": ["hi", "eu"]},
             "settings": {"model.dropout": [0.1, 0.2]}},
        ],
        "settings": {"optimizer.betas": {"try": [[0.9, 0.95], [0.9, 0.99]]}},
    }  # fmt: skip
    trials = finals(trained(0.001, {"arm": arm}), "arm")
    assert len(trials) == 2**4 * 2
    setting = trials[0].setting
    assert setting.values == (
        ("phases[0].share", 0.5),
        ("phases[0].mixture.temperature.from", 5),
        ("phases[1].settings.model.dropout", 0.1),
        ("settings.optimizer.betas", "[0.9, 0.95]"),
        ("phases[1].learning_rate.peak", 0.001),
    )
    assert setting.label == "share 0.5, temperature.from 5, dropout 0.1, betas [0.9, 0.95]"
    assert setting.mixture.label == "UniMax, over [hi, eu], max_epochs 4"
    assert trials[0].run["optimizer"] == {"betas": [0.9, 0.95]}
    assert trials[0].run["model"]["dropout"] == 0.1
    assert len({trial.setting for trial in trials}) == len(trials)


def test_stages_are_compared_by_the_tasks_that_they_train() -> None:
    sweep = sweep_of(Path("somewhere/sweep"), {
        "arm": {"phases": [
            {"share": 0.5, "mixture": {"rates": {"en": 0.5, "hi": 0.5}}},
            {"mixture": {"temperature": 2, "over": ["fr", "hi", "eu"]}},
        ]},
    })  # fmt: skip
    first, second = all_trials(sweep)[0], all_trials(sweep)[-1]
    outcome = Outcome(losses={"en": 1.0, "fr": 2.0, "hi": 4.0, "eu": 8.0})
    assert own_loss(sweep, first, outcome) == (1 + 4) / 2
    assert own_loss(sweep, second, outcome) == (2 + (4 + 8) / 2) / 2


def test_a_list_is_what_is_tried_unless_the_key_takes_a_list() -> None:
    assert not takes_list(schema_at(RunConfig, "model.dropout"))
    assert takes_list(schema_at(RunConfig, "optimizer.betas"))
    assert takes_list(schema_at(RunConfig, "monitor.tasks"))
    assert takes_list(schema_at(ArmPhase, "mixture.over"))
    assert not takes_list(schema_at(ArmPhase, "mixture.temperature.from"))
    assert not takes_list(schema_at(ArmPhase, "average"))
    section = {"mixture": [{"temperature": 2}, {"proportional": True}], "share": 0.1}
    found = combinations(section, ArmPhase, "phases[0]", "")
    assert [axes for axes, _ in found] == [
        (("phases[0].mixture", "{temperature: 2}"),),
        (("phases[0].mixture", "{proportional: true}"),),
    ]
    assert [value["mixture"] for _, value in found] == section["mixture"]
    section = {"over": {"try": ["high", ["en", "fr"]]}}
    found = combinations(section, ArmPhase, "x", "")
    assert [value for _, value in found] == [{"over": "high"}, {"over": ["en", "fr"]}]


MANY = [number / 100 for number in range(1, 100)]
TWO = [{"share": 0.5, "rate": 0}, {"rate": 0.1}]


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"phases": [{"rat": 0.1}]},
         "phases[0]: unknown key 'rat'; did you mean 'rate'?"),
        ({"phases": [{"share": 1.0}]}, "phases[0]: give exactly one of rate and mixture"),
        ({"phases": [{"rate": [0.1, 1.5]}]},
         "phases[0].rate: must be at most 1; found 1.5"),
        ({"phases": [{"rate": []}]}, "phases[0].rate: must hold at least one value to try; add"),
        ({"phases": [{"rate": [0.1, 0.1]}]}, "phases[0].rate: 0.1 occurs twice in this list;"),
        ({"phases": [{"rate": {"try": 0.1}}]},
         "phases[0].rate.try: must be a list of the values to try; write [0.1]"),
        ({"phases": [{"rate": 0}, {"rate": 0.1}]},
         "phases[0]: only the last phase may leave out its length; add share or steps"),
        ({"phases": [{"share": 0.5, "steps": 3, "rate": 0}, {"rate": 0.1}]},
         "phases[0]: give share or steps, not both"),
        ({"phases": [{"share": 0.001, "rate": 0}, {"rate": 0.1}]},
         "phases[0]: would have 0 of the budget’s 60 steps; raise share or steps"),
        ({"phases": [{"share": 1.0, "rate": 0}, {"rate": 0.1}]},
         "phases[1]: would have 0 of the budget’s 60 steps; shorten the phases before it"),
        ({"phases": [{"share": 0.5, "rate": 0}, {"share": 0.6, "rate": 0.1}]},
         "phases: have 66 steps together, and the budget is 60; leave out the length of the last"),
        ({"phases": [{"rate": 0.1, "learning_rate": "continue"}]},
         "phases[0].learning_rate: there is no phase before this one; leave it out"),
        ({"phases": [{"rate": 0.1, "learning_rate": "continues"}]},
         "phases[0].learning_rate: must be 'continue'; found \"continues\""),
        ({"phases": [{"rate": 0.1, "learning_rate": {"schedule": "wsd"}}]},
         "phases[0].learning_rate: schedule wsd needs decay, the fraction of its steps; add"),
        ({"phases": [{"rate": 0.1, "learning_rate": {"decay": 0.2}}]},
         "phases[0].learning_rate: decay is for schedule wsd and not for cosine; leave it out"),
        ({"phases": [{"rate": 0.1, "learning_rate": {"peak": [0.1, 0]}}]},
         "phases[0].learning_rate.peak: must be greater than 0; found 0"),
        ({"phases": [TWO[0], TWO[1] | {"name": "pretrain"}]},
         "phases[1].name: 'pretrain' occurs twice; rename one of them"),
        ({"phases": [TWO[0], TWO[1] | {"begin_from": "average"}]},
         "phases[1].begin_from: is average, but the phase before has none; set phases[0].average"),
        ({"phases": [TWO[0] | {"model": {"seq_len": 32}}, TWO[1]]},
         "phases[1].model.seq_len: this key is missing, and the phase before has its own; write"),
        ({"phases": [TWO[0], TWO[1] | {"settings": {"model.hidden": 32}}]},
         "phases[1].settings.model.hidden: a phase has settings of optimizer, faults and"),
        ({"phases": [{"share": MANY, "rate": MANY}, {"rate": MANY}]},
         "has 970,299 combinations of values to try; try fewer; an arm has at most 10,000"),
        ({"phases": [{"share": MANY, "rate": MANY, "order": ["random", "balanced"]}]},
         "phases[0]: has 19,602 combinations of values to try"),
        ({"phases": TWO, "rates": [0.1]}, "rates does not go with phases; leave it out"),
        ({"phases": TWO, "kind": "static"}, "kind does not go with phases; leave it out"),
        ({"kind": "static", "rates": [0.1], "budget": "own"},
         "budget: own needs phases; give them, or leave it out"),
        ({"phases": TWO, "settings": {"phases[1].steps": 3}},
         "settings.phases[1].steps: the sweep sets this; leave it out"),
        ({"phases": TWO, "settings": {"phases[2].order": "random"}},
         "settings.phases[2].order: the arm has 2 phases; number them from 0, or write *"),
        ({"phases": TWO, "settings": {"model.dropout": []}},
         "settings.model.dropout: must hold at least one value to try"),
        ({"phases": [TWO[0], TWO[1] | {"average": {"kind": "uniform"}}], "early_stopping": 2},
         "early_stopping: the best weights have no average, which the last phase asks for"),
    ],
)  # fmt: skip
def test_refused(arm: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((InputError, ValueError)) as caught:
        all_trials(sweep_of(tmp_path / "sweep", {"odd": arm}))
    assert message in str(caught.value)
    if isinstance(caught.value, InputError):
        assert "languages.yaml: arms.odd" in str(caught.value)


@pytest.mark.parametrize("name", ["arms.yaml", "high-control.yaml"])
def test_the_ready_arms_are_sound(name: str) -> None:
    """They have the same number of settings; only the arm without anything to try has fewer."""
    content = read_yaml(EXAMPLES / name)
    keys = {key: content[key] for key in ("steps", "learning_rate", "seeds", "arms")}
    roles = {"en": "high", "fr": "high", "hi": "low", "eu": "low"}
    sweep = sweep_of(Path("somewhere/sweep"), **keys).model_copy(update={"steps": keys["steps"]})
    sweep.base["tasks"] = {
        task: section | {"role": roles[task]} for task, section in sweep.base["tasks"].items()
    }
    settings: dict[str, set[Any]] = {}
    for trial in all_trials(sweep):
        json.dumps(trial.run)
        if trial.is_final:
            settings.setdefault(trial.arm, set()).add(trial.setting)
    counts = {name: len(found) for name, found in settings.items()}
    assert counts.pop("high-only", 2) == 2
    assert set(counts.values()) == {6}
