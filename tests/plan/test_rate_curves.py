"""Rates that change within a phase: in the run file, under caps, in the plan and its summary."""

from __future__ import annotations

import hashlib
import json
from decimal import Decimal, getcontext
from fractions import Fraction
from math import ceil, cos, pi
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_support import (
    build_plan,
    contents,
    phase,
    random_lengths,
    spec_of,
    write_corpus,
    write_run,
)
from pydantic import ValidationError

from megaphase.config.load import load_run_file
from megaphase.plan import rate_curves
from megaphase.plan.mixture import (
    MixtureConfig,
    TaskSupply,
    effective_rates,
    rate_pieces,
    requested_at,
    requested_rates,
)
from megaphase.plan.phase_blend import make_piecewise_blend
from megaphase.plan.preview import plan_table
from megaphase.plan.rate_curves import RatePieces, resolution
from megaphase.utils.errors import InputError

NAMES = ["en", "hi", "no"]
COOLDOWN = {"temperature": {"from": 5, "to": 1}}
RISING = {"rates": {"en": {"from": 0.88, "to": 0.8}, "hi": {"from": 0.02, "to": 0.1}, "no": 0.1}}


def supplies(tokens: list[int], used: list[int] | None = None) -> dict[str, TaskSupply]:
    used = used or [0] * len(tokens)
    return {
        f"t{i}": TaskSupply(n, max(1, n // 10), u)
        for i, (n, u) in enumerate(zip(tokens, used, strict=True))
    }


def mixture(**keys) -> MixtureConfig:
    return MixtureConfig.model_validate(keys)


def rates_in(pieces: RatePieces) -> np.ndarray:
    """Return the rates of every piece, float64 [tasks, pieces]."""
    return pieces.weights / (np.diff(pieces.bounds.astype(np.int64)) * pieces.unit)


def blended(pieces: RatePieces, order: str = "balanced") -> np.ndarray:
    """Return the task of every sample."""
    spec = SimpleNamespace(order=order, order_key=3)
    blend = make_piecewise_blend(spec, pieces)  # type: ignore[arg-type]
    tasks = np.zeros(pieces.samples, np.uint16)
    blend.fill(tasks, np.zeros((-(-len(tasks) // 1024), len(pieces.weights)), np.int64), 1024)
    return tasks


# --- the run file ---


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"temperature": {"from": 5}}, "to"),
        ({"temperature": {"from": 5, "to": 0}}, "greater than or equal to 0.01"),
        ({"temperature": {"from": 5, "to": 1, "shape": "sine"}}, "'linear' or 'cosine'"),
        ({"temperature": {"from": 5, "to": 1, "form": "linear"}}, "unknown key 'form'"),
        ({"temperature": {"from_": 5, "to": 1}}, "unknown key 'from_'; did you mean 'from'"),
        ({"rates": {"a": {"from": 0.5, "to": 0.6}, "b": 0.5}},
         "the rates sum to 1 at the phase's start and to 1.1 at its end; make both sums 1"),
        ({"rates": {"a": {"from": 0.1, "to": 1}}}, "sum to 0.1 at the phase's start and to 1 at"),
        ({"rates": {"a": {"from": 2, "to": 1}, "b": 0}}, "less than or equal to 1"),
        ({"rates": {"a": 0.5, "b": 0.6}}, "the rates sum to 1.1; make them sum to 1"),
        ({"rates": {"a": [0.5, 0.6]}}, "valid number"),
    ],
)  # fmt: skip
def test_curves_that_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        mixture(**keys)


def test_messages_name_the_keys_that_were_written(folder):
    for values, line in [
        ({"temperature": {"from": 5, "to": "x"}},
         'phases[0].mixture.temperature.to: must be a number; found "x"'),
        ({"rates": {"en": {"to": 1}}},
         "phases[0].mixture.rates.en.from: this key is missing; add it"),
        ({"temperature": [5, 1]},
         "phases[0].mixture.temperature: must be a number; found a list"),
        ({"temperature": {"frm": 5, "to": 1}},
         "phases[0].mixture.temperature: unknown key 'frm'; did you mean 'from'?"),
    ]:  # fmt: skip
        with pytest.raises(InputError) as error:
            write_run(folder, NAMES, phases=[phase("one", 10, values)])
        assert str(error.value) == f"{folder / 'run.yaml'}: {line}"


def test_a_curve_is_stored_as_it_was_written():
    for keys in (COOLDOWN, RISING, {"temperature": {"from": 1, "to": 3, "shape": "cosine"}}):
        found = mixture(**keys)
        stored = json.loads(json.dumps(found.model_dump(mode="json", exclude_none=True)))
        assert MixtureConfig.model_validate(stored) == found
        assert "from_" not in json.dumps(stored)


# --- the curves ---


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_rates_follow_the_curve_in_its_samples(shape):
    """Every piece's rate is the average there, against a closed form."""
    curve = {"from": 0.02, "to": 0.5, "shape": shape}
    other = {"from": 0.98, "to": 0.5, "shape": shape}
    samples = 100_000
    found = rate_pieces(mixture(rates={"t0": curve, "t1": other}), supplies([9, 9]), samples, "")
    bounds = found.bounds.astype(np.int64)
    assert len(bounds) == 1025

    def integral(u: np.ndarray) -> np.ndarray:
        part = u**2 / 2 if shape == "linear" else u / 2 - np.sin(pi * u) / (2 * pi)
        return 0.02 * u + 0.48 * part

    u = bounds / samples
    expected = np.diff(integral(u)) / np.diff(u)
    assert rates_in(found)[0] == pytest.approx(expected, rel=1e-9)
    assert found.requested.tolist() == found.ends.tolist() == [[0.02, 0.98], [0.5, 0.5]]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(10, 10**12), min_size=1, max_size=6),
    st.floats(0.3, 20),
    st.floats(0.3, 20),
    st.sampled_from(["linear", "cosine"]),
    st.floats(0, 1),
)
def test_temperature_is_that_of_the_point(tokens, start, end, shape, at):
    getcontext().prec = 40
    curve = {"from": start, "to": end, "shape": shape}
    rates = requested_at(mixture(temperature=curve), supplies(tokens))(np.array([at]))[0]
    progress = at if shape == "linear" else (1 - cos(pi * at)) / 2
    temperature = Decimal(start) + (Decimal(end) - Decimal(start)) * Decimal(progress)
    powers = [(Decimal(n).ln() / temperature).exp() for n in tokens]
    for rate, power in zip(rates.tolist(), powers, strict=True):
        assert rate == pytest.approx(float(power / sum(powers)), rel=1e-11, abs=1e-300)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_weights_of_a_piece_are_its_samples(data):
    tasks = data.draw(st.integers(1, 6))
    tokens = data.draw(st.lists(st.integers(10, 10**9), min_size=tasks, max_size=tasks))
    samples = data.draw(st.integers(1, 3000) | st.integers(1, 2**48))
    curve = {
        "from": data.draw(st.sampled_from([0.01, 0.5, 1, 5, 1e6])),
        "to": data.draw(st.sampled_from([0.01, 1, 3.3, 1e6])),
        "shape": data.draw(st.sampled_from(["linear", "cosine"])),
    }
    found = rate_pieces(mixture(temperature=curve), supplies(tokens), samples, "")
    sizes = np.diff(found.bounds.astype(np.int64))
    assert sizes.min() >= 1
    assert sizes.max() - sizes.min() <= 1
    assert int(found.bounds[-1]) == samples
    assert [int(each) for each in found.weights.sum(axis=0)] == [
        size * found.unit for size in sizes.tolist()
    ]
    assert sum(found.totals()) == found.unit * samples
    means = effective_rates(mixture(temperature=curve), supplies(tokens), samples, "")
    assert sum(means.values()) == 1


def test_curves_of_both_shapes_are_divided_by_their_sum():
    keys = {
        "t0": {"from": 0.2, "to": 0.8}, "t1": {"from": 0.8, "to": 0.2, "shape": "cosine"},
    }  # fmt: skip
    supply = supplies([9, 9])
    at = requested_at(mixture(rates=keys), supply)(np.array([0, 0.25, 0.5, 1]))
    assert at.sum(axis=1) == pytest.approx(1, abs=1e-15)
    cosine = 0.8 - 0.6 * (1 - cos(pi / 4)) / 2
    assert at[1, 0] == pytest.approx(0.35 / (0.35 + cosine))
    assert at[[0, 2, 3], 0].tolist() == [0.2, 0.5, 0.8]
    means = requested_rates(mixture(rates=keys), supply)
    assert sum(means.values()) == 1
    u = (np.arange(10**5) + 0.5) / 10**5
    first, second = 0.2 + 0.6 * u, 0.8 - 0.3 * (1 - np.cos(pi * u))
    assert float(means["t0"]) == pytest.approx((first / (first + second)).mean(), abs=1e-9)


def test_means_of_rates_are_exact():
    means = requested_rates(mixture(**RISING), dict.fromkeys(NAMES, TaskSupply(9, 9, 0)))
    assert means == {"en": Fraction(84, 100), "hi": Fraction(6, 100), "no": Fraction(1, 10)}


@pytest.mark.parametrize("order", ["balanced", "random"])
def test_a_rate_may_begin_and_end_at_zero(order):
    keys = {"t0": {"from": 1, "to": 0}, "t1": {"from": 0, "to": 1}}
    found = rate_pieces(mixture(rates=keys), supplies([9, 9]), 40_000, "")
    tasks = blended(found, order)
    ideal = np.arange(1, 40_001) ** 2 / 80_000
    slack = 1.01 if order == "balanced" else 5 * 100  # five standard deviations, sqrt(n) / 2
    # Within a piece its average is half a sample or less from the curve.
    assert np.abs(np.cumsum(tasks) - ideal).max() < slack + 0.01


# --- caps ---


def room_of(max_epochs: float, supply: dict[str, TaskSupply]) -> list[int]:
    return [max(0, int(max_epochs * s.samples_per_epoch) - s.samples_used) for s in supply.values()]


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_no_task_exceeds_its_cap(data):
    tasks = data.draw(st.integers(1, 6))
    tokens = data.draw(st.lists(st.integers(10, 3000), min_size=tasks, max_size=tasks))
    used = data.draw(st.lists(st.integers(0, 200), min_size=tasks, max_size=tasks))
    supply = supplies(tokens, used)
    curve = {
        "from": data.draw(st.sampled_from([0.5, 1, 5, 100])),
        "to": data.draw(st.sampled_from([0.5, 1, 3.3])),
    }
    max_epochs = data.draw(st.sampled_from([0.5, 1.0, 2.0, 3.0]))
    room = room_of(max_epochs, supply)
    samples = data.draw(st.integers(1, max(1, sum(room))) | st.just(max(1, sum(room))))
    asked = mixture(temperature=curve, max_epochs=max_epochs)
    if sum(room) < samples:
        with pytest.raises(InputError, match="max_epochs"):
            rate_pieces(asked, supply, samples, "here")
        return
    found = rate_pieces(asked, supply, samples, "here")
    counts = np.bincount(blended(found), minlength=tasks).tolist()
    assert all(count <= most for count, most in zip(counts, room, strict=True))
    free = rate_pieces(mixture(temperature=curve), supply, samples, "")
    for task, most in enumerate(room):
        total = Fraction(found.totals()[task], found.unit)
        assert total <= most
        if Fraction(free.totals()[task], free.unit) > most:
            assert total == counts[task] == most
    if sum(room) == samples:
        assert counts == room


def test_a_capped_curve_keeps_its_form_and_the_others_share_what_it_leaves():
    keys = {"t0": {"from": 0.6, "to": 0.2}, "t1": {"from": 0.1, "to": 0.5}, "t2": 0.3}
    supply = {
        "t0": TaskSupply(9, 10**6, 0),
        "t1": TaskSupply(9, 500, 0),
        "t2": TaskSupply(9, 10**6, 0),
    }
    asked, samples = mixture(rates=keys, max_epochs=3), 10_000
    wanted = rates_in(rate_pieces(mixture(rates=keys), supply, samples, ""))
    found = rate_pieces(asked, supply, samples, "")
    rates = rates_in(found)
    assert found.totals()[1] == 1500 * found.unit
    assert rates[1] == pytest.approx(wanted[1] / 2, rel=1e-9)  # 1,500 of 3,000 samples
    assert rates[0] / rates[2] == pytest.approx(wanted[0] / wanted[2], rel=1e-9)
    for ends, first_and_last in zip(found.ends.T, rates[:, [0, -1]], strict=True):
        assert ends == pytest.approx(first_and_last, rel=1e-9)
    assert found.requested[0].tolist() == [0.6, 0.1, 0.3]


def test_caps_of_a_curve_that_is_flat_are_those_of_a_constant_rate():
    flat = {"t0": {"from": 0.2, "to": 0.2}, "t1": {"from": 0.5, "to": 0.5}, "t2": 0.3}
    constant = {"t0": 0.2, "t1": 0.5, "t2": 0.3}
    supply = supplies([5000, 900, 2000])
    for samples in (50, 200, 700):
        a, b = (
            effective_rates(mixture(rates=rates, max_epochs=1.5), supply, samples, "")
            for rates in (flat, constant)
        )
        for task in supply:
            assert float(a[task]) == pytest.approx(float(b[task]), rel=1e-12)


def test_a_demand_that_cannot_be_met_names_its_figures():
    keys = {"t0": {"from": 0.6, "to": 0.2}, "t1": {"from": 0.4, "to": 0.8}}
    supply = {"t0": TaskSupply(0, 1000, 500), "t1": TaskSupply(0, 10, 5)}
    with pytest.raises(InputError) as error:
        rate_pieces(
            mixture(rates=keys, max_epochs=2.5), supply, 5000, "run.yaml: phases[1].mixture"
        )
    assert str(error.value) == (
        "run.yaml: phases[1].mixture: the phase wants 5,000 samples, but max_epochs 2.5 leaves "
        "only 2,020 (t0 2,000, t1 20); raise max_epochs, shorten the phase or add tasks"
    )


def supply_of(*samples: int) -> dict[str, TaskSupply]:
    return {f"t{i}": TaskSupply(10 * each, each, 0) for i, each in enumerate(samples)}


@pytest.mark.parametrize("max_epochs", [2, 8, 1e6])
def test_the_only_task_of_several_that_takes_part_has_the_rate_1(max_epochs):
    asked = mixture(temperature=COOLDOWN["temperature"], over=["t1"], max_epochs=max_epochs)
    found = rate_pieces(asked, supply_of(900, 50, 70), 100, "")
    assert rates_in(found).tolist() == [[0.0] * 100, [1.0] * 100, [0.0] * 100]
    with pytest.raises(InputError, match=r"wants 100 samples, but max_epochs 1 leaves only 50 \("):
        rate_pieces(
            mixture(temperature=COOLDOWN["temperature"], over=["t1"], max_epochs=1),
            supply_of(900, 50, 70),
            100,
            "",
        )


def test_a_phase_of_all_caps_together_leaves_nothing_to_a_task_that_takes_no_part():
    for over, counts in ((["t1", "t2"], [0, 600, 140]), (["t0", "t2"], [1800, 0, 140])):
        asked = mixture(temperature=COOLDOWN["temperature"], over=over, max_epochs=2)
        found = rate_pieces(asked, supply_of(900, 300, 70), sum(counts), "")
        assert [Fraction(each, found.unit) for each in found.totals()] == counts
        assert np.bincount(blended(found), minlength=3).tolist() == counts


def test_a_task_with_room_enough_is_not_capped_where_the_others_have_almost_no_rate():
    """The rate of the smaller task is 0 as a number at the start, and above 0 at the end."""
    asked = mixture(temperature={"from": 0.01, "to": 0.05}, max_epochs=100)
    supply = {"t0": TaskSupply(10**9, 100, 0), "t1": TaskSupply(10, 10**6, 0)}
    found = rate_pieces(asked, supply, 1000, "")
    assert found.totals() == [1000 * found.unit, 0]


def test_a_part_of_a_phase_that_only_capped_tasks_can_fill():
    """At temperature 0.01 the rates of all but the largest task are too small for a number."""
    asked = mixture(temperature={"from": 0.01, "to": 5}, max_epochs=1)
    supply = {"t0": TaskSupply(10**9, 100, 0), "t1": TaskSupply(10, 10**6, 0)}
    with pytest.raises(InputError) as error:
        rate_pieces(asked, supply, 1000, "run.yaml: phases[0].mixture")
    assert str(error.value) == (
        "run.yaml: phases[0].mixture: after 0% of the phase only tasks that max_epochs 1 caps have "
        "a rate (t0 100 samples); raise max_epochs, shorten the phase or give another task a rate "
        "there"
    )


# --- the plan ---


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(NAMES):
        lengths = random_lengths(40 - 10 * i, 30, i)
        write_corpus(tmp_path / name, lengths, seed=i, first_token=i * 9000)
    return tmp_path


def test_constant_mixtures_have_the_fingerprint_and_the_index_of_earlier_versions(folder):
    phases = [
        phase("one", 12, {"rates": {"en": 0.75, "hi": 0.25}}),
        phase("two", 80, {"temperature": 3.3, "max_epochs": 4}),
        phase("three", 40, {"unimax": True, "max_epochs": 30}) | {"order": "random"},
        phase("four", 400, {"proportional": True, "over": ["en", "no"]}),
    ]
    plan = build_plan(write_run(folder, NAMES, phases=phases))
    assert plan.spec.fingerprint == "3bb7a76614b5ec194986a60ff46208a4"
    hashes = {
        name: hashlib.blake2b(content, digest_size=16).hexdigest()
        for name, content in contents(plan.folder).items()
    }
    assert hashes == {
        "blend-0.counts": "941e0c502c87478811f1b6a130227018",
        "blend-0.tasks": "2ec98747d7447389e44b7607c1047bc4",
        "blend-1.counts": "941e0c502c87478811f1b6a130227018",
        "blend-1.tasks": "2385a00425dff4c134a779340cd9022b",
        "blend-2.counts": "941e0c502c87478811f1b6a130227018",
        "blend-2.tasks": "a6c4f794ed691be925a7e9c9af100b38",
        "blend-3.counts": "ca46d6c7beb09b049c15fc6ee2011923",
        "blend-3.tasks": "c4d5128f2604c22460dd9a16f1bd1137",
        "index.json": "69ca4d1fef2fad7e89f164f7d02c8d1b",
        "starts": "3ea5874074445a76c0235779e6afb238",
    }
    assert "rates_over_steps" not in plan.summary()["phases"][0]


def test_a_plan_with_a_curve(folder):
    plan = build_plan(
        write_run(
            folder,
            NAMES,
            phases=[phase("one", 10, {"rates": {"en": 1.0}}), phase("two", 500, RISING)],
        )
    )
    [one, two] = plan.summary()["phases"]
    assert "rates_over_steps" not in one
    hi = two["tasks"]["hi"]
    assert (hi["requested_from_to"], hi["rate_from_to"]) == ([0.02, 0.1], [0.02, 0.1])
    assert hi["requested_rate"] == 0.06
    assert hi["rate"] == pytest.approx(0.06)
    assert hi["samples"] == 120
    steps = np.array([0, 1, 250, 499])
    rates = plan.rates(1, steps)
    assert rates.shape == (4, 3)
    assert rates[:, 1] == pytest.approx(0.02 + 0.08 * (steps + 0.5) / 500, abs=1e-5)
    assert rates.sum(axis=1) == pytest.approx(1)
    assert plan.rates(0, steps[:2]).tolist() == [[1, 0, 0], [1, 0, 0]]
    # Before every step, the samples of a task are the sum of its rates, give or take less than one.
    sums = np.cumsum(4 * plan.rates(1, np.arange(500)), axis=0)
    counts = np.array([plan.counts(1, step + 1) for step in range(500)])
    assert np.abs(sums - counts).max() < 1 + 1e-6
    over = two["rates_over_steps"]
    assert over["steps"][0] == 0
    assert over["steps"][-1] == 500
    assert over["samples"][-1] == 2000
    assert len(over["steps"]) == len(over["rates"]["hi"]) + 1 == 65
    assert np.dot(over["rates"]["hi"], np.diff(over["samples"])) == pytest.approx(120)


def test_the_table_shows_where_rates_begin_and_end(folder, capsys):
    from rich.console import Console

    plan = build_plan(write_run(folder, NAMES, phases=[phase("two", 500, RISING)]))
    Console(width=160).print(plan_table(plan.summary()))
    rows = {words[0]: line for line in capsys.readouterr().out.splitlines()
            if (words := line.replace("two", "").split())}  # fmt: skip
    assert "0.0200 → 0.1000" in rows["hi"]
    assert "0.8800 → 0.8000" in rows["en"]
    assert "→" not in rows["no"]
    assert "0.1000" in rows["no"]


@pytest.mark.parametrize("epochs", [{"hi": 4}, {"en": 0.35}, {"en": 1.5, "hi": 2}])
@pytest.mark.parametrize(
    "keys", [RISING, COOLDOWN, {"temperature": {"from": 1, "to": 8, "shape": "cosine"}}]
)
def test_a_phase_is_as_long_as_the_epochs_of_its_first_task(folder, epochs, keys):
    facts = phase("joint", 1, keys) | {"epochs": epochs}
    del facts["steps"]
    plan = build_plan(write_run(folder, NAMES, phases=[facts]))
    streams, steps = plan.spec.streams, plan.phases[0].steps
    wanted = {task: ceil(e * streams[task].samples_per_epoch) for task, e in epochs.items()}
    counts = dict(zip(NAMES, plan.phases[0].counts, strict=True))
    # One sample less is what the blend may be behind.
    assert any(counts[task] >= wanted[task] - 1 for task in wanted)
    means = requested_rates(
        plan.spec.phases[0].mixture,
        {t: TaskSupply(s.tokens, s.samples_per_epoch, 0) for t, s in streams.items()},
    )
    assert all(means[task] * 4 * (steps - 1) < wanted[task] for task in wanted)
    assert any(means[task] * 4 * steps >= wanted[task] for task in wanted)


@pytest.mark.parametrize("order", ["balanced", "random"])
def test_a_phase_before_a_curve_that_ends_early_changes_nothing_of_its_blend(folder, order):
    second = phase("two", 60, COOLDOWN) | {"order": order}
    plan = build_plan(write_run(folder, NAMES, phases=[phase("one", 30, RISING), second]))
    cut = plan.counts(0, 13)
    short = write_run(folder, NAMES, phases=[phase("one", 13, RISING), second], output="other")
    whole, shortened = plan.samples(1, 0, 240, cut), build_plan(short).samples(1, 0, 240)
    assert whole.tasks.tolist() == shortened.tasks.tolist()
    assert (whole.ordinals - cut[whole.tasks] >= 0).all()


def test_rates_of_a_phase_whose_batch_grows(folder):
    """A curve follows the phase's samples, not its steps."""
    ramp = {"samples": 8, "ramp": {"from": 4, "tokens": 6400, "step": 2}}
    grows = phase("two", 300, RISING) | {"batch": ramp}
    plan = build_plan(write_run(folder, NAMES, phases=[grows]))
    batch, samples = plan.spec.phases[0].batch, plan.phases[0].samples
    assert not batch.is_constant
    steps = np.array([0, 100, 200, 299])
    middles = [batch.samples_before(step) + batch.samples_at(step) / 2 for step in steps.tolist()]
    expected = 0.02 + 0.08 * np.array(middles) / samples
    assert plan.rates(0, steps)[:, 1] == pytest.approx(expected, abs=1e-5)
    assert plan.phases[0].counts[1] == pytest.approx(0.06 * samples, abs=1)


def test_a_branch_counts_what_was_used_towards_the_caps(folder):
    config = write_run(folder, NAMES, phases=[phase("two", 60, COOLDOWN | {"max_epochs": 4})])
    per_epoch = {task: s.samples_per_epoch for task, s in spec_of(config).streams.items()}
    used = {"no": 4 * per_epoch["no"] - 3, "hi": 1}
    plan = build_plan(config, used)
    assert plan.phases[0].counts[2] == 3
    assert plan.phases[0].starts == [0, 1, used["no"]]
    assert plan.rates(0, np.arange(60))[:, 2].sum() * 4 == pytest.approx(3)
    assert plan.spec.fingerprint != spec_of(config).fingerprint


def test_curves_name_the_plan(folder):
    names = set()
    for keys in (
        {"temperature": 5}, COOLDOWN, {"temperature": {"from": 5, "to": 1.5}},
        {"temperature": {"from": 5, "to": 1, "shape": "cosine"}}, RISING,
    ):  # fmt: skip
        config = write_run(folder, NAMES, phases=[phase("one", 30, keys)])
        names.add(spec_of(config).fingerprint)
        assert load_run_file(config.path) == config
    assert len(names) == 5


def test_the_pieces_are_fewer_for_many_tasks():
    assert [resolution(tasks) for tasks in (1, 8192, 16_384, 65_535, 10**6)] == [
        1024, 1024, 512, 128, 64,
    ]  # fmt: skip


def test_e_to_the_x_is_what_it_is():
    values = np.concatenate([-(10.0 ** np.linspace(-12, 2.8, 400)), [0.0, -1e9, -np.inf]])
    expected = np.exp(values)
    assert rate_curves._exp(values) == pytest.approx(expected, rel=4e-16, abs=1e-300)
