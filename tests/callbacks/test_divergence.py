"""The detector of divergence on loss curves, both synthetic and recorded."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaphase.callbacks.divergence import DivergenceDetector

VOCABULARY = 500
UNIFORM = 6.2146  # the natural logarithm of 500
RECORDED = json.loads(
    (Path(__file__).resolve().parents[1] / "fixtures" / "loss_curves.json").read_text()
)


def detector_at(**held_out: float) -> DivergenceDetector:
    """Return a detector at the start of a phase with these held-out losses."""
    detector = DivergenceDetector(VOCABULARY)
    detector.begin_phase(held_out)
    return detector


def feed(detector, losses, *, first=1, rate=1e-3, norms=None):
    """Feed steps on the task `a` alone; return (step, finding) of all new findings."""
    found = []
    for number, loss in enumerate(losses):
        norm = 1.0 if norms is None else norms[number]
        new = detector.observe(first + number, {"a": 64 * loss}, {"a": 64.0}, norm, rate)
        if new is not None:
            found.append((first + number, new))
    return found


def noisy(level: float, count: int, seed: int = 0, deviation: float = 0.05) -> list[float]:
    return (level + deviation * np.random.default_rng(seed).standard_normal(count)).tolist()


def test_a_jump_above_uniform_guessing_is_found_in_four_steps():
    """Each step counts for at most 3 nats, and 10 are needed."""
    detector = detector_at(a=3.0)
    assert feed(detector, [3.0] * 50) == []
    ((step, found),) = feed(detector, [20.0] * 4, first=51)
    assert (step, found.kind, found.since, found.value) == (54, "above_uniform", 51, 20.0)
    assert found.expected == pytest.approx(3.0)
    assert not detector.is_diverged(phase_ends=False)
    assert detector.is_diverged(phase_ends=True)
    # 100 nats, of which a step can add 3.
    feed(detector, [20.0] * 29, first=55)
    assert not detector.is_diverged(phase_ends=False)
    assert feed(detector, [20.0], first=84) == []
    assert detector.is_diverged(phase_ends=False)


def test_a_rise_below_uniform_guessing_is_found_later():
    """Two nats above 3 are one above the margin."""
    detector = detector_at(a=3.0)
    ((step, found),) = feed(detector, [3.0] * 30 + [5.0] * 99)
    assert (step, found.kind, found.since) == (40, "rise", 31)
    assert not detector.is_diverged(phase_ends=False)
    feed(detector, [5.0], first=130)
    assert detector.is_diverged(phase_ends=False)


def test_a_rise_within_the_margin_is_none():
    assert feed(detector_at(a=3.0), noisy(3.0, 30) + noisy(3.9, 400)) == []


def test_the_first_steps_are_compared_with_the_held_out_loss():
    ((step, found),) = feed(detector_at(a=6.3), [6.3, 6.4, 9.0, 200.0, 9e5, 9e5, 9e5])
    assert (step, found.kind, found.since) == (6, "above_uniform", 3)


def test_a_first_step_above_the_held_out_loss_is_no_rise():
    """The step may be trained with dropout, by weights that were measured without it."""
    detector = detector_at(a=3.0)
    assert feed(detector, noisy(4.8, 200)) == []
    ((step, found),) = feed(detector, [20.0] * 4, first=201)
    assert step == 204
    assert found.expected == pytest.approx(4.8, abs=0.1)
    # One below it lowers nothing.
    ((step, _),) = feed(detector_at(a=3.0), [1.0, *noisy(3.5, 30), *[20.0] * 4])
    assert step == 35


def test_what_was_reached_counts_from_twenty_steps_on():
    falling = [6.2 - 0.1 * step for step in range(40)]
    ((_, found),) = feed(detector_at(a=6.2), falling + [6.0] * 30)
    assert found.kind == "rise"
    # Approximately the mean of the newest 20 steps: the loss of 20 steps ago is 4.2.
    assert falling[-1] < found.expected < falling[-20]


def test_a_spike_that_passes_is_over_and_ends_nothing():
    detector = detector_at(a=3.0)
    curve = [3.0] * 30 + [15.0] * 5
    ((step, _),) = feed(detector, curve)
    assert step == 34
    assert detector.is_diverged(phase_ends=True)
    feed(detector, [3.0] * 14, first=36)
    assert detector.found is not None
    assert not detector.is_diverged(phase_ends=True)
    assert detector.last_sound_step == 29
    feed(detector, [3.0], first=50)  # 15 nats less 1 a step
    assert detector.found is None
    assert detector.last_sound_step is None
    ((step, _),) = feed(detector, [15.0] * 5, first=51)
    assert step == 54


def test_one_huge_spike_is_none():
    assert feed(detector_at(a=3.0), [3.0] * 30 + [9e9] * 3 + [3.0] * 30) == []


def test_a_task_that_is_new_in_a_phase_is_no_rise():
    """`c` begins above uniform guessing, and is half of every batch."""
    detector = detector_at(a=6.3, c=9.5)
    feed(detector, noisy(3.0, 100))
    detector.begin_phase({"a": 3.0, "c": 9.5})
    for step in range(101, 200):
        sums = {"a": 64 * 3.2, "c": 64 * (9.6 - 0.03 * (step - 100))}
        assert detector.observe(step, sums, {"a": 64.0, "c": 64.0}, 1.0, 1e-3) is None


def test_batches_of_another_composition_are_no_rise():
    detector = detector_at(a=1.0, c=8.0)
    tokens = [(640.0, 0.0)] * 40 + [(0.0, 640.0)] * 40
    for step, (of_a, of_c) in enumerate(tokens, 1):
        sums = {"a": of_a * 1.0, "c": of_c * 8.0}
        assert detector.observe(step, sums, {"a": of_a, "c": of_c}, 1.0, 1e-3) is None


def test_a_phase_that_begins_diverged_is_compared_with_the_time_before():
    detector = detector_at(a=3.0)
    feed(detector, [3.0] * 30 + [20.0] * 10)
    detector.begin_phase({"a": 20.0})
    feed(detector, [20.0] * 24, first=41)
    assert detector.is_diverged(phase_ends=False)


def test_a_task_of_which_nothing_is_known_is_compared_with_uniform_guessing():
    """As after resuming from a checkpoint of an earlier version."""
    detector = DivergenceDetector(VOCABULARY)
    assert feed(detector, noisy(4.0, 10)) == []
    ((step, found),) = feed(detector, [20.0] * 4, first=11)
    assert (step, found.since) == (14, 11)
    assert found.expected == pytest.approx(UNIFORM, abs=1e-4)


def test_a_held_out_loss_that_is_no_number_counts_as_uniform_guessing():
    ((_, found),) = feed(detector_at(a=math.inf), [6.0, *[20.0] * 4])
    assert found.expected == pytest.approx(UNIFORM, abs=1e-4)


def test_a_loss_that_stands_still_is_stuck():
    detector = detector_at(a=6.3)
    assert feed(detector, [UNIFORM] * 99) == []
    ((step, found),) = feed(detector, [UNIFORM] * 101, first=100)
    assert (step, found.kind, found.since) == (100, "stuck", 1)
    assert detector.is_diverged(phase_ends=False)


def test_a_loss_that_stands_still_somewhere_else_is_stuck():
    ((_, found),) = feed(detector_at(a=6.3), [*noisy(5.0, 60), *[4.9] * 100])
    assert (found.kind, found.since) == ("stuck", 61)


def test_a_loss_that_does_not_come_below_uniform_guessing_is_stuck():
    detector = detector_at(a=6.3)
    ((step, found),) = feed(detector, noisy(UNIFORM, 400, deviation=0.2))
    assert 100 <= step <= 200
    assert (found.kind, found.since) == ("stuck", step - 99)
    assert detector.found == found


def test_while_the_rate_rises_nothing_is_stuck():
    detector = detector_at(a=6.3)
    for step in range(1, 300):
        assert feed(detector, [UNIFORM], first=step, rate=step * 1e-9) == []
    assert feed(detector, [UNIFORM] * 98, first=300, rate=1e-9) == []


@pytest.mark.parametrize(
    "curve",
    [
        [0.01] * 500,  # everything is memorized
        noisy(2.5, 500, deviation=0.02),  # converged
        [UNIFORM - 0.0004 * step for step in range(500)],  # slow
        [math.exp(-step / 100) * UNIFORM for step in range(900)],
    ],
)
def test_a_plateau_below_and_a_slow_fall_are_not_stuck(curve):
    assert feed(detector_at(a=6.3), curve) == []


def test_gradients_far_larger_than_before_are_a_warning_alone():
    detector = detector_at(a=3.0)
    losses, norms = [3.0 + step % 2 / 8 for step in range(200)], [0.5] * 60 + [50.0] * 140
    ((step, found),) = feed(detector, losses, norms=norms)
    # At step 65 the median of the newest ten is that of five small and five large ones.
    assert (step, found.kind, found.since) == (65, "gradient_norm", 56)
    assert (found.value, found.expected) == (25.25, 0.5)
    assert not detector.is_diverged(phase_ends=True)
    feed(detector, losses[:20], first=201, norms=[0.5] * 20)
    assert detector.found is None


@pytest.mark.parametrize("norms", [[0.5] * 60 + [9.0] * 100, ([0.5] * 30 + [500.0] * 4) * 5])
def test_somewhat_larger_gradients_and_single_large_ones_are_none(norms):
    losses = [3.0 + step % 2 / 8 for step in range(len(norms))]
    assert feed(detector_at(a=3.0), losses, norms=norms) == []


@pytest.mark.parametrize("seed", range(20))
def test_noise_of_small_batches_with_rare_tasks_is_none(seed):
    """One sample per step of tasks at 2, 4 and 7 nats, the last in one step of fifty."""
    random = np.random.default_rng(seed)
    levels, rates = {"a": 2.0, "b": 4.0, "c": 7.0}, [0.68, 0.30, 0.02]
    detector = DivergenceDetector(VOCABULARY)
    detector.begin_phase(dict.fromkeys(levels, 6.3))
    for step in range(1, 3001):
        task = str(random.choice(list(levels), p=rates))
        level = levels[task] + max(0.0, 6.3 - levels[task]) * math.exp(-step / 200)
        loss = max(0.1, level + 0.6 * random.standard_normal())
        norm = float(random.lognormal(0, 0.7))
        assert detector.observe(step, {task: 30 * loss}, {task: 30.0}, norm, 1e-3) is None


def curve_of(name: str):
    """Return a recorded run, step by step; see loss_curves.json."""
    run = RECORDED["runs"][name]
    detector, found = DivergenceDetector(run["vocabulary"]), []
    for phase in run["phases"]:
        detector.begin_phase(phase["held_out"])
        for number, (losses, tokens, norm, rate) in enumerate(phase["steps"]):
            step = phase["first_step"] + number
            count = dict(zip(losses, tokens, strict=True))
            sums = {task: loss * count[task] for task, loss in losses.items()}
            new = detector.observe(step, sums, count, norm, rate)
            if new is not None:
                found.append((step, new))
    return detector, found


@pytest.mark.parametrize("name", [n for n in RECORDED["runs"] if n.startswith("healthy")])
def test_recorded_runs_that_learn_are_left_alone(name):
    detector, found = curve_of(name)
    assert found == []
    assert detector.last_sound_step is None


@pytest.mark.parametrize(
    ("name", "within"), [("diverged from the start", 14), ("diverged at the switch", 6)]
)
def test_recorded_runs_that_diverge_are_found(name, within):
    """within: steps after the first one of the phase that diverges."""
    _, found = curve_of(name)
    first = RECORDED["runs"][name]["phases"][-1]["first_step"]
    step, divergence = found[0]
    assert divergence.kind == "above_uniform"
    assert first <= step <= first + within


levels = st.sampled_from([1.0, 3.0, 5.0, 6.25, 40.0])
stretches = st.lists(st.tuples(levels, st.integers(1, 60)), min_size=1, max_size=8)


@settings(deadline=None)
@given(stretches, st.data())
def test_cut_anywhere_and_continued_it_finds_the_same(parts, data):
    curve = [level for level, count in parts for _ in range(count)]
    norms = [level**3 for level in curve]
    cut = data.draw(st.integers(0, len(curve)))
    whole, first = detector_at(a=6.3), detector_at(a=6.3)
    expected = feed(whole, curve, norms=norms)
    found = feed(first, curve[:cut], norms=norms[:cut])
    second = DivergenceDetector(VOCABULARY)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    found += feed(second, curve[cut:], first=cut + 1, norms=norms[cut:])
    assert found == expected
    assert second.state_dict() == whole.state_dict()
    assert second.last_sound_step == whole.last_sound_step
