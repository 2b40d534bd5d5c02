"""The global batch of every step, against a list of all of them."""

from __future__ import annotations

from fractions import Fraction
from itertools import accumulate, islice

from hypothesis import given
from hypothesis import strategies as st

from megaphase.plan.batch_schedule import BatchSchedule, BatchStage

STAGES = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=5)


@given(STAGES, st.integers(0, 40))
def test_steps_and_samples_are_those_of_the_list_of_all_steps(parts, more):
    steps = [samples for count, samples in parts for _ in range(count)] + [parts[-1][1]] * more
    stages, step, before = [], 0, 0
    for count, samples in parts:
        stages.append(BatchStage(step, before, samples))
        step, before = step + count, before + count * samples
    batch = BatchSchedule(tuple(stages))
    sums = list(accumulate(steps, initial=0))
    assert [batch.samples_at(i) for i in range(len(steps))] == steps
    assert [batch.samples_before(i) for i in range(len(sums))] == sums
    for samples in range(1, sums[-1] + 1):
        assert batch.steps_for(samples) == next(i for i, n in enumerate(sums) if n >= samples)
    found = [stage.samples for stage, count in batch.within(len(steps)) for _ in range(count)]
    assert found == steps
    assert batch.is_constant == (len(parts) == 1)
    assert batch.largest == max(samples for _, samples in parts)


def ramp_step_by_step(first, step, full, tokens, seq_len, before):
    """The batches of a ramp, by the definition of Megatron-LM's rampup-batch-size: as many steps
    up as parts of the ramp are over, each part being trained on equally many tokens."""
    part = Fraction(tokens, (full - first) // step)
    trained = before
    while True:
        samples = full if trained >= tokens else first + int(trained / part) * step
        yield samples
        trained += samples * seq_len


@given(
    first=st.integers(1, 6),
    step=st.integers(1, 4),
    number=st.integers(1, 6),
    tokens=st.integers(1, 200),
    seq_len=st.integers(1, 5),
    before=st.integers(0, 220),
)
def test_a_ramp_is_that_of_the_definition(first, step, number, tokens, seq_len, before):
    full = first + number * step
    batch = BatchSchedule.ramp(first, step, full, tokens, seq_len=seq_len, tokens_before=before)
    found = [batch.samples_at(each) for each in range(201)]
    assert found == list(islice(ramp_step_by_step(first, step, full, tokens, seq_len, before), 201))
    assert found[-1] == full
    sums = list(accumulate(found, initial=0))
    assert [batch.samples_before(each) for each in range(202)] == sums


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 6), st.integers(1, 300))
def test_a_ramp_that_two_phases_share_has_no_seam(first, step, number, tokens):
    full = first + number * step
    whole = BatchSchedule.ramp(first, step, full, tokens, seq_len=3)
    for steps in range(0, 60, 7):
        before = 3 * whole.samples_before(steps)
        rest = BatchSchedule.ramp(first, step, full, tokens, seq_len=3, tokens_before=before)
        assert [rest.samples_at(i) for i in range(50)] == [
            whole.samples_at(steps + i) for i in range(50)
        ]
