"""The recipe of `megaphase init`, over many answers."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megaphase.init.recipe import (
    MAX_EPOCHS,
    MILLION,
    MOST_LOW,
    Task,
    batch_tokens,
    capped_rates,
    for_published,
    from_scratch,
    held_out_fraction,
    in_millionths,
    peak,
)
from megaphase.utils.errors import InputError

TOKENS = st.floats(4, 13).map(lambda power: int(10**power))


@st.composite
def tasks(draw):
    sizes = draw(st.lists(st.tuples(TOKENS, st.booleans()), min_size=1, max_size=12))
    return [Task(f"t{i}", low, tokens) for i, (tokens, low) in enumerate(sizes)]


BATCH = st.integers(9, 21).map(lambda power: 2**power)
PARAMETERS = st.floats(6, 11).map(lambda power: int(10**power))


def check(recipe, tasks, wanted, batch):
    """Check what every recipe promises, and return how often each task is repeated in all."""
    epochs = dict.fromkeys((task.name for task in tasks), 0.0)
    for phase in recipe.phases:
        assert phase.tokens == phase.steps * batch > 0
        assert 0 <= phase.warmup_steps < phase.steps
        assert sum(phase.rates.values()) == MILLION
        assert min(phase.rates.values()) > 0
        for name, count in phase.epochs(tasks).items():
            epochs[name] += count
    assert recipe.tokens <= wanted
    # A rate has a millionth at least, which max_epochs in the run file takes care of.
    least = recipe.tokens / MILLION
    assert all(epochs[t.name] <= MAX_EPOCHS + least * len(tasks) / t.tokens for t in tasks)
    return epochs


@given(tasks(), TOKENS, BATCH, PARAMETERS)
def test_from_scratch(tasks, wanted, batch, parameters):
    try:
        recipe = from_scratch(tasks, wanted, batch, parameters, "--gpus 8")
    except InputError:
        # Too little for a step of each phase.
        high = sum(task.tokens for task in tasks if not task.low)
        assert min(wanted, MAX_EPOCHS * (high or sum(t.tokens for t in tasks))) < 200 * batch
        return
    check(recipe, tasks, wanted, batch)
    low = {task.name for task in tasks if task.low}
    if not low or len(low) == len(tasks):
        assert [phase.name for phase in recipe.phases] == ["pretrain"]
        return
    pretrain, joint = recipe.phases
    assert set(pretrain.rates) == {task.name for task in tasks} - low
    assert list(joint.rates) == [task.name for task in tasks]
    assert joint.peak < pretrain.peak
    # The largest rate takes what is rounded off the others.
    assert sum(joint.rates[name] for name in low) <= (MOST_LOW + 0.01) * MILLION


@given(tasks())
def test_low_resource_tasks_are_raised(tasks):
    total = sum(task.tokens for task in tasks)
    low = [task for task in tasks if task.low]
    assume(low and sum(task.tokens for task in low) < 0.1 * total)
    joint = from_scratch(tasks, 1e12, 512, 10**8, "").phases[1]
    # A millionth is the unit of rates, and what is rounded down may be a hundredth.
    assert all(joint.rates[t.name] >= 0.98 * MILLION * t.tokens / total - 1 for t in low)


@given(tasks(), TOKENS, BATCH, PARAMETERS, st.booleans())
def test_for_a_published_model(tasks, wanted, batch, parameters, new_rows):
    try:
        recipe = for_published(tasks, wanted, batch, parameters, "", new_rows=new_rows)
    except InputError:
        assert min(wanted, MAX_EPOCHS * sum(task.tokens for task in tasks)) < 200 * batch or any(
            task.tokens * MAX_EPOCHS < 200 * batch for task in tasks
        )
        return
    check(recipe, tasks, wanted, batch)
    joint = recipe.phases[-1]
    assert joint.name == "joint"
    old = [task.name for task in tasks if not task.low]
    if recipe.replay is not None:
        replay = sum(joint.rates[name] for name in old) / MILLION
        assert math.isclose(replay, recipe.replay, abs_tol=0.02)
        assert 0.25 <= recipe.replay <= 0.5
    if len(recipe.phases) == 2:
        assert recipe.phases[0].trained == "new_embeddings"
        assert set(recipe.phases[0].rates).isdisjoint(old)


def test_replay_becomes_less_where_there_is_little_old_text():
    def replay(old):
        tasks = [Task("en", False, old), Task("hi", True, 10**9)]
        return for_published(tasks, 1e12, 1 << 12, 10**9, "", new_rows=False).replay

    assert [replay(10**10), replay(7 * 10**8), replay(10**7)] == [0.5, 0.4, 0.25]


@given(st.dictionaries(st.text(min_size=1), st.floats(1e-9, 1e9), min_size=1, max_size=40))
def test_rates_in_millionths(rates):
    found = in_millionths(rates)
    assert sum(found.values()) == MILLION
    whole, largest = sum(rates.values()), max(rates, key=rates.__getitem__)
    for name, rate in rates.items():
        if name != largest:
            assert found[name] <= max(1, MILLION * rate / whole)


@given(tasks(), st.integers(1_000, 10**13))
def test_no_rate_exceeds_its_cap_where_that_is_possible(tasks, tokens):
    rates = capped_rates(tasks, tokens, 1.0, 3.3)
    assert math.isclose(sum(rates.values()), 1.0)
    if MAX_EPOCHS * 0.97 * sum(task.tokens for task in tasks) >= tokens:
        assert all(rates[t.name] * tokens <= MAX_EPOCHS * t.tokens for t in tasks)


@pytest.mark.parametrize(
    ("documents", "fraction"),
    [(1, 0.2), (500, 0.2), (1_000, 0.2), (10_000, 0.02), (15_000, 0.01), (10**9, 0.001)],
)
def test_fractions_hold_out_enough_documents(documents, fraction):
    assert held_out_fraction(documents) == fraction


def test_larger_models_get_lower_peaks_and_larger_batches():
    sizes = [10**power for power in range(6, 12)]
    peaks = [peak(size) for size in sizes]
    assert peaks == sorted(peaks, reverse=True)
    assert 2e-4 <= peak(7 * 10**9) <= 3e-4  # Llama's and GPT-3's are 3e-4 and 1.2e-4
    batches = [batch_tokens(size) for size in sizes]
    assert batches == sorted(batches)
