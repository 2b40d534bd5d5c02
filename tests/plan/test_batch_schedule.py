"""The global batch of every step, against a list of all of them."""

from __future__ import annotations

from itertools import accumulate

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
