"""Fronts and their measures, computed by hand and by slow independent algorithms."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep_support import HIGH, LOW, record_of

from megaphase.sweep.pareto.first_stages import first_stages
from megaphase.sweep.pareto.fronts import fronts_of
from megaphase.sweep.pareto.measures import (
    count_dominated,
    dominates,
    hypervolume,
    lowest_within,
    nondominated,
)
from megaphase.sweep.pareto.points import best_of, failures, reported_split
from megaphase.sweep.pareto.verdict import progress_of

SIDE = 7
coordinate = st.integers(0, SIDE + 1)
pair_lists = st.lists(st.tuples(coordinate, coordinate), max_size=9)


def cells_dominated(pairs, side):
    """Return the unit squares below the reference point (side, side) dominated by some pair."""
    return sum(any(x <= i and y <= j for x, y in pairs) for i in range(side) for j in range(side))


def is_worse(a, b):
    return b[0] <= a[0] and b[1] <= a[1] and (b[0] < a[0] or b[1] < a[1])


@settings(deadline=None)
@given(pair_lists)
def test_hypervolume_is_the_area_of_the_dominated_cells(pairs):
    assert hypervolume(pairs, (SIDE, SIDE)) == cells_dominated(pairs, SIDE)


@settings(deadline=None)
@given(pair_lists)
def test_front_is_what_nothing_is_better_than(pairs):
    expected = [i for i, a in enumerate(pairs) if not any(is_worse(a, b) for b in pairs)]
    found = nondominated(pairs)
    assert sorted(found) == expected
    assert [pairs[i] for i in found] == sorted(pairs[i] for i in expected)


@settings(deadline=None)
@given(pair_lists, pair_lists)
def test_domination_and_margins(front, others):
    expected = [a for a in front if any(is_worse(a, b) for b in others)]
    assert count_dominated(front, others) == len(expected)
    for x, _ in front:
        within = [b[1] for b in others if b[0] <= x]
        found = lowest_within(others, x)
        assert (found is None) == (not within)
        assert found is None or others[found][1] == min(within)


def test_measures_by_hand():
    front = [(1.0, 3.0), (2.0, 1.0)]
    assert hypervolume(front, (4.0, 4.0)) == 3 * 1 + 2 * 2
    assert hypervolume(front, (2.0, 4.0)) == 1
    assert hypervolume([], (4.0, 4.0)) == 0
    assert dominates((1.0, 1.0), (1.0, 2.0))
    assert not dominates((1.0, 1.0), (1.0, 1.0))
    assert not dominates((1.0, 3.0), (2.0, 1.0))


ARMS = {"static": {"rates": [0.1, 0.5]}, "two-phase": {"rates": [0.25], "pretrain": [0.8]}}
STATIC = {0.1: (4.0, 6.0), 0.5: (4.4, 5.5)}


def test_front_reference_and_shares_by_hand():
    arms = {
        "static": {"rates": [0.1, 0.2, 0.5]},
        "two-phase": {"rates": [0.1, 0.25], "pretrain": [0.8]},
    }
    losses = {
        ("static", 0.1): (4.0, 6.0), ("static", 0.2): (4.3, 6.2), ("static", 0.5): (4.4, 5.5),
        ("two-phase", 0.1): (3.9, 5.9), ("two-phase", 0.25): (4.2, 5.6),
    }  # fmt: skip
    (fronts,) = fronts_of(record_of(arms, lambda t: losses[t.arm, t.mixture.rate]))
    static, two_phase = fronts.arms
    assert fronts.reference == (4.4, 6.2)
    assert [point.pair for point in fronts.static] == [(4.0, 6.0), (4.4, 5.5)]
    assert static.hypervolume == pytest.approx(0.4 * 0.2)
    assert two_phase.hypervolume == pytest.approx(0.5 * 0.3 + 0.2 * 0.3)
    against = two_phase.against_static
    assert (against.dominated, against.share, against.dominated_by) == (1, 0.5, 0)
    assert [margin.nats for margin in against.margins] == pytest.approx([0.1, -0.1])
    assert static.against_static is None


def test_margin_has_the_interval_of_the_paired_differences():
    def losses(trial):
        # A seed's effect on both arms is not noise in their difference.
        (high, low), own = (3.9, 5.4), -0.2
        if trial.arm == "static":
            (high, low), own = STATIC[trial.mixture.rate], 0.2
        return high, low + (100 + own) * (trial.seed - 2)

    (fronts,) = fronts_of(record_of(ARMS, losses, seeds=[1, 2, 3]))
    static, two_phase = fronts.arms
    # Three seeds at -a, 0, +a: the standard deviation is a.
    low = static.front[0].low
    assert (low.mean, low.error) == pytest.approx((6.0, 100.2 / math.sqrt(3)))
    found = two_phase.against_static.margins[0].estimate
    assert (found.mean, found.error) == pytest.approx((0.6, 0.4 / math.sqrt(3)))
    assert found.high - found.mean == pytest.approx(4.303 * 0.4 / math.sqrt(3), rel=1e-3)


def test_settings_are_chosen_on_validation_and_shown_on_the_test_split():
    on_test = {0.1: (4.5, 6.5), 0.5: (4.1, 5.8)}
    record = record_of(ARMS, lambda t: STATIC.get(t.mixture.rate, (3.9, 5.4)))
    for trial in record.trials:
        found = record.outcomes[trial.name]
        high, low = on_test.get(trial.mixture.rate, (4.0, 5.6))
        losses = dict.fromkeys(HIGH, high) | dict.fromkeys(LOW, low)
        record.outcomes[trial.name] = found.model_copy(update={"test": losses})
    static, two_phase = fronts_of(record)[0].arms
    # On the test split 50 % would dominate 10 %: the front is that of the validation split.
    assert [point.pair for point in static.front] == [(4.5, 6.5), (4.1, 5.8)]
    assert best_of(static.points).setting.mixture.rate == 0.5
    margins = two_phase.against_static.margins
    assert [margin.nats for margin in margins] == pytest.approx([0.9, 0.2])
    assert reported_split(record) == "test"
    (name,) = (t.name for t in record.trials if t.arm == "two-phase")
    record.outcomes[name] = record.outcomes[name].model_copy(update={"test": {}})
    # Losses of two splits cannot be compared.
    assert reported_split(record) == "validation"
    assert fronts_of(record)[0].arms[0].front[0].pair == (4.0, 6.0)


def test_a_setting_with_a_failed_seed_is_no_point():
    def losses(trial):
        if trial.arm == "static" and trial.mixture.rate == 0.5:
            return None if trial.seed == 1 else (4.4, math.nan)
        return STATIC[0.1]

    record = record_of(ARMS, losses, seeds=[1, 2])
    (fronts,) = fronts_of(record)
    assert [point.setting.mixture.rate for point in fronts.arms[0].points] == [0.1]
    assert [tuple(failure) for failure in failures(record)] == [
        ("static-r0.5-p0.004-s1", "out of memory"),
        ("static-r0.5-p0.004-s2", "diverged: the loss of hi, eu is not finite"),
    ]


def test_seeds_that_have_not_ended_are_left_out_of_the_mean():
    record = record_of(ARMS, lambda _: (4.0, 6.0), seeds=[1, 2], ended=lambda t: t.seed == 1)
    (point, _) = fronts_of(record)[0].arms[0].points
    assert (len(point.runs), point.low.mean, point.low.error) == (1, 6.0, None)
    progress = progress_of(record)
    # With one seed of its first stage, its branches are not known.
    assert progress.sentence == "Not finished: 3 of 8 runs have ended."


def test_a_sweep_whose_first_stages_failed_says_what_could_not_begin():
    record = record_of(ARMS, lambda _: (4.0, 6.0))
    sweep = record.sweep
    name = next(trial.name for trial in record.trials if not trial.is_final)
    failed = record.outcomes[name].model_copy(update={"failed": "out of memory"})
    outcomes = {n: o for n, o in record.outcomes.items() if n.startswith("static")}
    trials = [trial for trial in record.trials if trial.arm != "two-phase"]
    broken = type(record)(record.directory, sweep, trials, outcomes | {name: failed})
    assert progress_of(broken).sentence == (
        "Finished: 3 runs. 1 more could not start: the runs before them have failed or diverged."
    )
    (stage,) = first_stages(broken)
    assert (stage.losses, stage.reason) == ({0.004: None}, "not chosen yet")
