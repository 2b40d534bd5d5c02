"""Contrasts of arms and the words that follow from them, against plain arithmetic."""

import math
import re
from collections import Counter
from functools import cache
from itertools import combinations

import numpy as np
import pytest
from audited_support import HIGH as AUDITED_HIGH
from audited_support import audited_record, audited_rows, audited_tasks
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep_support import record_of

from megaphase.sweep.pareto.contrasts import contrast, contrasts_of
from megaphase.sweep.pareto.fronts import ArmFront, fronts_of
from megaphase.sweep.pareto.points import Point, RunLosses
from megaphase.sweep.pareto.statistics import estimate
from megaphase.sweep.pareto.verdict import progress_of, verdicts_of
from megaphase.sweep.pareto.verdict_tables import adjusted_p

T_2 = 4.302653  # two-sided 95 % quantile of Student's t with 2 degrees of freedom


def verdicts(record):
    fronts = fronts_of(record)
    return verdicts_of(record, fronts, contrasts_of(record, fronts), progress_of(record))


def p_of(t):
    """Return the two-sided p of Student's t with 2 degrees of freedom."""
    return 1 - abs(t) / math.sqrt(t * t + 2)


def by_hand(name, arm, other, measure, k=None):
    """Return mean, interval and p of a contrast, from the rows and by enumeration of all subsets.

    measure: maps a row to the loss that is compared.
    """
    tables = []
    for each in (arm, other):
        found = {}
        for row in audited_rows(name):
            if row["arm"] == each:
                key = row["pretrain_share"], row["rate"], row["peak"]
                found.setdefault(key, {})[row["seed"]] = row
        tables.append(list(found.values()))
    k = k or min(len(table) for table in tables)
    expected = []
    for table in tables:
        score = [np.mean([mean_loss(name, row) for row in runs.values()]) for runs in table]
        order = sorted(range(len(table)), key=lambda i: score[i])
        firsts = counts_of_firsts(len(table), min(k, len(table)))
        by_seed = [
            sum(n * measure(table[order[first]][seed]) for first, n in firsts.items())
            for seed in "123"
        ]
        expected.append(np.array(by_seed) / sum(firsts.values()))
    differences = expected[0] - expected[1]
    mean, error = differences.mean(), differences.std(ddof=1) / math.sqrt(3)
    return mean, mean - T_2 * error, mean + T_2 * error, p_of(mean / error)


@cache
def counts_of_firsts(n, k):
    """Return how often each of n is the first member of a subset of k, which is the choice."""
    return Counter(first for first, *_ in combinations(range(n), k))


def mean_loss(name, row, unit="loss"):
    tasks = audited_tasks(name)
    high = [float(row[f"{unit}_{task}"]) for task in tasks if task in AUDITED_HIGH[name]]
    low = [float(row[f"{unit}_{task}"]) for task in tasks if task not in AUDITED_HIGH[name]]
    return (sum(high) / len(high) + sum(low) / len(low)) / 2


@pytest.fixture(scope="module", params=["translation", "languages"])
def audited(request):
    record = audited_record(request.param)
    (fronts,) = fronts_of(record)
    return request.param, record, fronts, contrasts_of(record, [fronts])


@pytest.mark.parametrize("against", ["static", "restart"])
def test_contrasts_of_real_sweeps_are_those_of_plain_arithmetic(audited, against):
    name, _, _, contrasts = audited
    found = next(c for c in contrasts if (c.arm, c.against) == ("two-phase", against))
    expected = {
        "nats": by_hand(name, "two-phase", against, lambda row: mean_loss(name, row)),
        "bits": by_hand(
            name, "two-phase", against, lambda row: mean_loss(name, row, "bits_per_byte")
        ),
        "all": by_hand(name, "two-phase", against, lambda row: mean_loss(name, row), k=99),
    }
    shown = {"nats": found.nats.mean, "bits": found.bits.mean, "all": found.best_of_all}
    for key, (mean, low, high, p) in expected.items():
        each = shown[key]
        assert (each.mean, each.low, each.high, each.p) == pytest.approx(
            (mean, low, high, p), rel=1e-5
        )
    for task in audited_tasks(name):
        mean, *_, p = by_hand(
            name, "two-phase", against, lambda row, task=task: float(row[f"loss_{task}"])
        )
        each = found.nats.tasks[task]
        assert (each.mean, each.p) == pytest.approx((mean, p), rel=1e-5)


def test_a_gain_that_the_audit_found_undecided_is_undecided():
    record = audited_record("translation")
    (fronts,) = fronts_of(record)
    verdict = verdicts(record)[0]
    assert (verdict.arm, verdict.outcome) == ("two-phase", "undecided")
    assert verdict.headline == "two-phase against static and restart is undecided"
    arm = next(arm for arm in fronts.arms if arm.arm == "two-phase")
    # It dominates the whole static front all the same, which was once called a win.
    assert (arm.against_static.dominated, len(arm.against_static.margins)) == (2, 2)
    largest = arm.against_static.margins[1].estimate
    low = {}
    for row in audited_rows("translation"):
        low[row["run"]] = (float(row["loss_en-hi"]) + float(row["loss_en-eu"])) / 2
    gains = [
        low[f"static-r0.05-p0.001-s{seed}"] - low[f"two-phase-0.7-r0.1-p0.004-s{seed}"]
        for seed in (1, 2, 3)
    ]
    t = np.mean(gains) / (np.std(gains, ddof=1) / math.sqrt(3))
    assert (largest.t, largest.p) == pytest.approx((t, p_of(t)))
    assert (round(t, 2), round(p_of(t), 2), largest.n - 1) == (2.24, 0.15, 2)
    for margin in ("+0.002 [-0.162, +0.167] nats at static 5%", "+0.059 [-0.054, +0.172] nats at"):
        assert margin in verdict.front
    # Both facts are told: the sentence is not of the front, which is larger.
    assert verdict.front.startswith(
        "The whole front, unlike that one comparison, has a larger hypervolume than the static one "
        "(0.1382, static 0.0968): 4 of its 4 points lie outside the area that static dominates, "
        "and it dominates 2 of the 2 static points. Margin, "
    )


def test_sentence_names_the_best_baseline_and_the_tasks():
    verdict = verdicts(audited_record("translation"))[0]
    assert verdict.sentence == (
        "two-phase against static and restart is undecided: its mean loss differs from that of "
        "restart, the best baseline, by +0.051 [+0.014, +0.088] nats (p = 0.028), +0.023 [+0.007, "
        "+0.038] bits per byte; higher for en-fr (+0.055) and en-eu (+0.105), undecided for "
        "en-hi; best of 3 random settings of each, 3 seeds; best of all 18 and 3 settings: -0.008 "
        "[-0.076, +0.061] nats, which is undecided."
    )


ARMS = {"static": {"rates": [0.1, 0.5]}, "two-phase": {"rates": [0.1, 0.5], "pretrain": [0.8]}}
SPREAD = {1: -0.01, 2: 0.0, 3: 0.01}


def record_with(two_phase, arms=ARMS, seeds=(1, 2, 3), **more):
    """Return a sweep in which two-phase has the losses `two_phase` and all others (4.0, 6.0)."""

    def losses(trial):
        high, low = two_phase if trial.arm == "two-phase" else (4.0, 6.0)
        # The spread of the differences is a hundredth of a nat.
        own = SPREAD[trial.seed] if trial.arm == "two-phase" else 0.0
        return high + own, low - 2 * own

    return record_of(arms, losses, seeds=list(seeds), **more)


@pytest.mark.parametrize(
    ("two_phase", "outcome", "tasks"),
    [
        ((3.9, 5.4), "wins", "lower for en (-0.100), fr (-0.100), hi (-0.600) and eu (-0.600)"),
        ((4.1, 6.6), "loses", "higher for en (+0.100), fr (+0.100), hi (+0.600) and eu (+0.600)"),
        (
            (4.1, 5.4),
            "undecided",
            "lower for hi (-0.600) and eu (-0.600), for which en (+0.100) and fr (+0.100) pay",
        ),
        ((4.0, 6.0), "undecided", "undecided for en, fr, hi and eu"),
    ],
)
def test_words_follow_from_the_intervals(two_phase, outcome, tasks):
    (verdict,) = verdicts(record_with(two_phase))
    assert verdict.outcome == outcome
    expected = {
        "wins": "two-phase wins against static: ",
        "loses": "two-phase loses against static: ",
        "undecided": "two-phase against static is undecided: ",
    }
    assert verdict.sentence.startswith(expected[outcome])
    assert f"; {tasks}; best of 2 settings of each, 3 seeds." in verdict.sentence


def test_one_seed_decides_nothing():
    (verdict,) = verdicts(record_with((3.0, 5.0), seeds=[2]))
    assert verdict.outcome == "undecided"
    assert verdict.sentence == (
        "two-phase against static is undecided: its mean loss differs from that of static by "
        "-1.000 nats; by task en -1.000, fr -1.000, hi -1.000, eu -1.000; best of 2 "
        "settings of each, one seed: no interval."
    )


def test_an_arm_must_win_against_every_baseline():
    arms = ARMS | {"restart": {"rates": [0.1, 0.5], "pretrain": [0.8]}}

    def losses(trial):
        low = {"static": 6.0, "restart": 5.5, "two-phase": 5.5}[trial.arm]
        return 4.0, low + SPREAD[trial.seed] * (trial.arm != "static")

    first, second = verdicts(record_of(arms, losses, seeds=[1, 2, 3]))
    assert first.outcome == "undecided"
    assert first.headline == "two-phase wins against static and is undecided against restart"
    assert first.detail.startswith(
        "its mean loss differs from that of restart, the best baseline, by +0.000"
    )
    assert second.headline == "restart wins against static"


def test_neither_many_settings_nor_few_win_alone():
    """With as many settings the arm wins; the best of all of the other is as good."""
    arms = ARMS | {"static": {"rates": [0.1, 0.2, 0.3, 0.4, 0.5]}}

    def losses(trial):
        good = trial.arm == "two-phase" or trial.mixture.rate == 0.1
        return 4.0, (5.5 if good else 6.5) + SPREAD[trial.seed] * (trial.arm == "static")

    record = record_of(arms, losses, seeds=[1, 2, 3])
    (found,) = contrasts_of(record, fronts_of(record))
    assert (found.k, found.settings) == (2, (2, 5))
    # Of 10 pairs of static's settings 4 hold the good one.
    assert found.nats.mean.mean == pytest.approx(-0.5 * 0.6)
    assert (found.nats.mean.sign, found.best_of_all.sign) == (-1, 0)
    assert found.result == "undecided"


def test_two_units_that_disagree_decide_nothing():
    record = record_with((3.0, 6.5))
    outcomes = record.outcomes
    for name, outcome in outcomes.items():
        # Many bytes a token for the high-resource tasks, few for the others.
        bits = {
            task: loss / (9 if task in ("en", "fr") else 1) for task, loss in outcome.losses.items()
        }
        outcomes[name] = outcome.model_copy(update={"bits_per_byte": bits})
    (found,) = contrasts_of(record, fronts_of(record))
    assert (found.nats.mean.sign, found.bits.mean.sign, found.result) == (-1, 1, "undecided")


@pytest.mark.parametrize(("on_validation", "expected"), [(5.9, "wins"), (6.1, "undecided")])
def test_the_documents_of_both_splits_must_agree(on_validation, expected):
    """Lower by 0.5 on the test split for every seed, and by 0.1 less or more on the other."""
    record = record_with((4.0, on_validation))
    for trial in record.trials:
        low = (5.0 if trial.arm == "two-phase" else 6.0) + SPREAD[trial.seed]
        losses = {task: 4.0 if task in ("en", "fr") else low for task in ("en", "fr", "hi", "eu")}
        found = record.outcomes[trial.name]
        record.outcomes[trial.name] = found.model_copy(
            update={"test": losses, "test_bits_per_byte": {}}
        )
    (found,) = contrasts_of(record, fronts_of(record))
    assert found.nats.mean.mean == pytest.approx(-0.5)
    assert found.on_validation.mean == pytest.approx((on_validation - 6.0) / 2)
    assert (found.nats.mean.sign, found.result) == (-1, expected)
    (verdict,) = verdicts(record)
    assert verdict.outcome == expected
    told = "but on the validation split by +0.050 [" in verdict.sentence
    assert told == (expected == "undecided")


def test_verdict_without_what_it_compares():
    (verdict,) = verdicts(record_with((3.9, 5.4), {"two-phase": ARMS["two-phase"]}))
    assert verdict.sentence == (
        "there is no verdict on two-phase: the sweep has no baseline for it."
    )  # fmt: skip
    (verdict,) = verdicts(record_with((3.9, 5.4), ended=lambda trial: trial.arm != "two-phase"))
    assert verdict.outcome == "undecided"
    assert verdict.sentence == (
        "So far, with 9 of 15 runs, there is no verdict on two-phase yet: no run of two-phase has "
        "ended normally."
    )


def test_every_other_arm_has_a_verdict_and_two_phase_comes_first():
    arms = {"keep": {"rates": [0.25], "pretrain": [0.8]}} | ARMS
    assert [each.arm for each in verdicts(record_with((3.9, 5.4), arms))] == ["two-phase", "keep"]


def test_models_are_compared_one_by_one():
    def losses(trial):
        low = 5.0 if (trial.arm == "static") == (trial.model == "large") else 6.0
        return 4.0, low + SPREAD[trial.seed] * (trial.arm == "static")

    record = record_of(ARMS, losses, models={"small": {}, "large": {}}, seeds=[1, 2, 3])
    first, second = verdicts(record)
    assert first.sentence.startswith("small: two-phase wins against static: ")
    assert second.sentence.startswith("large: two-phase loses against static: ")


def test_primary_contrast_comes_first():
    primary = {"arm": "keep", "against": "two-phase", "loss": "low"}
    arms = ARMS | {"keep": {"rates": [0.1, 0.5], "pretrain": [0.8]}}
    first, *_ = verdicts(record_with((3.9, 5.4), arms, primary=primary))
    assert first.outcome == "loses"
    assert first.sentence == (
        "primary contrast, in the low-resource loss: keep loses against two-phase: it differs by "
        "+0.600 [+0.550, +0.650] nats from that of two-phase (best of 2 settings of each, 3 "
        "seeds)."
    )


def point(losses):
    """Return a setting with these (high, low) losses by seed."""
    by_seed = {
        seed: RunLosses({"en": high, "hi": low}, high, low) for seed, (high, low) in losses.items()
    }
    highs, lows = zip(*losses.values(), strict=True)
    high, low = estimate(highs), estimate(lows)
    means = RunLosses({"en": high.mean, "hi": low.mean}, high.mean, low.mean)
    return Point(None, [], {"en": high, "hi": low}, high, low, by_seed, None, by_seed, means)


def arm_of(name, table):
    """Return an arm with a row of low losses, one per seed, for every setting."""
    points = [point({i: (4.0, low) for i, low in enumerate(row)}) for row in table]
    return ArmFront(name, "static", points, points, None, None)


tables = st.integers(1, 4).flatmap(
    lambda n: st.lists(st.lists(st.floats(4, 6), min_size=3, max_size=3), min_size=n, max_size=n)
)


@settings(deadline=None)
@given(tables, tables)
def test_verdict_is_antisymmetric(one, two):
    there = contrast(arm_of("a", one), arm_of("b", two), None)
    back = contrast(arm_of("b", two), arm_of("a", one), None)
    if there.nats.mean.p is not None:
        # Two baselines are compared with each other twice, which is one difference.
        assert adjusted_p([there, back]) == pytest.approx([there.nats.mean.p] * 2)
    assert back.nats.mean.mean == pytest.approx(-there.nats.mean.mean, abs=1e-12)
    assert back.sign == -there.sign
    opposite = {"wins": "loses", "loses": "wins", "undecided": "undecided"}
    assert back.result == opposite[there.result]
    assert back.chance == pytest.approx(1 - there.chance)


def test_arms_of_equal_worth_are_rarely_told_apart():
    """Also if one has three times as many settings, whose best of all would be taken for better."""
    draws = np.random.default_rng(3).normal(5.0, 0.1, (250, 2 + 6, 3))
    found = [contrast(arm_of("a", table[:6]), arm_of("b", table[6:]), None) for table in draws]
    assert {each.k for each in found} == {2}
    decided = [each for each in found if each.result != "undecided"]
    assert len(decided) / len(found) < 0.05
    means = [each.nats.mean.mean for each in found]
    assert abs(np.mean(means)) < 3 * np.std(means) / math.sqrt(len(means))
    assert np.mean([each.best_of_all.mean for each in found]) < -0.01


def test_baselines_are_the_arms_whose_mixture_of_all_tasks_never_changes():
    flat = {"mixture": {"temperature": 3.3}}
    arms = {
        **ARMS,
        "restart": {"rates": [0.1], "pretrain": [0.8]},
        "regularized": {"rates": [0.1], "settings": {"model.dropout": 0.1}},
        "temperature": {"phases": [flat]},
        "unimax": {"phases": [{"mixture": {"unimax": True, "max_epochs": 4}}]},
        "restarted": {"phases": [flat | {"share": 0.5}, flat]},
        "cooldown": {"phases": [{"mixture": {"temperature": {"from": 5, "to": 1}}}]},
        "rising": {"phases": [{"rate": {"from": 0.1, "to": 0.2}}]},
        "high-only": {"phases": [{"rate": 0}]},
        "cascade": {"phases": [flat | {"share": 0.5}, {"mixture": {"temperature": 5}}]},
        "over": {"phases": [{"mixture": {"temperature": 2, "over": "high"}}]},
        "dropout": {"phases": [flat | {"settings": {"model.dropout": 0.1}}]},
        "weighted": {"phases": [flat | {"loss_weights": {"hi": 2}}]},
        "averaged": {"phases": [flat | {"average": {"kind": "ema", "decay": 0.9}}]},
        "sampled": {"phases": [flat | {"order": ["balanced", "random"]}]},
        "usual": {"phases": [flat | {"order": "balanced", "average": None}]},
        "random": {"kind": "static", "rates": [0.1], "settings": {"phases[*].order": "random"}},
        "restart-random": {"kind": "restart", "rates": [0.1], "pretrain": [0.8],
                           "settings": {"phases[*].order": "random"}},
    }  # fmt: skip
    record = record_of(arms, lambda _: (4.0, 6.0), seeds=[1])
    (fronts,) = fronts_of(record)
    found = [arm.arm for arm in fronts.arms if arm.is_baseline]
    assert found == ["static", "restart", "temperature", "unimax", "restarted", "usual"]
    with_static = [c.arm for c in contrasts_of(record, [fronts]) if c.against == "static"]
    assert with_static == [name for name in arms if name != "static"]
    assert {arm.arm for arm in fronts.arms if arm.kind == "static"} == {"static"}


def test_static_arms_with_settings_are_baselines_where_no_other_static_arm_is():
    settings = {"phases[*].order": "random"}
    arms = {"random": {"kind": "static", "rates": [0.1], "settings": settings}}
    record = record_of(arms | {"two-phase": ARMS["two-phase"]}, lambda _: (4.0, 6.0), seeds=[1])
    (fronts,) = fronts_of(record)
    assert [arm.arm for arm in fronts.arms if arm.is_baseline] == ["random"]


@pytest.mark.parametrize("points", [2, 4, 5, 8])
def test_of_many_margins_three_are_named(points):
    rates = [round(0.02 + 0.03 * i, 2) for i in range(points)]
    arms = {"static": {"rates": rates}, "two-phase": {"rates": rates, "pretrain": [0.8]}}

    def losses(trial):
        place = rates.index(dict(trial.setting.values)["rate"])
        if trial.setting.arm == "static":
            return 4 + 0.1 * place, 6 - 0.2 * place
        return 3.95 + 0.1 * place, 5.95 - 0.25 * place

    front = verdicts(record_of(arms, losses, seeds=[1, 2, 3]))[0].front
    gains = [f"{0.05 * i + 0.05:+.3f}" for i in range(points)]
    named = gains if points <= 4 else [gains[0], gains[(points - 1) // 2], gains[-1]]
    assert re.findall(r"(\+\d\.\d+) \[", front) == named
    assert (f"(least, median and most of {points})" in front) is (points > 4)
