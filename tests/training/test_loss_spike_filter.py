"""Steps that are left out as loss spikes: like those that are not finite, on every layout."""

from __future__ import annotations

import json
import math
import statistics
from functools import partial
from typing import Any

import pytest
import torch
from distributed import RunningRanks, check
from hypothesis import given, settings
from hypothesis import strategies as st
from run_support import make_corpora, megaphase, read_rows, run_settings, timeless, write_run_file
from warm_commands import run, run_killed, run_well

from megaphase.fault_tolerance.config import SkipSpikesConfig
from megaphase.training.loss_spike_filter import LossSpikeFilter
from megaphase.utils.spike_words import spike_in_words

# In the first phase, and in the second one, which begins after step 12.
SPIKES = {9: 40.0, 19: 40.0}
FILTER = {"deviations": 8.0, "after_steps": 5}
KILLED_BEFORE = 18


class PlainFilter:
    """The statistics of the definition, from the list of all applied steps."""

    def __init__(self, config: SkipSpikesConfig) -> None:
        self.config, self.applied, self.in_a_row = config, [], 0

    def weights(self) -> list[float]:
        weights: list[float] = []
        for number in range(len(self.applied)):
            new = max(1 / (number + 1), 1 - self.config.decay)
            weights = [each * (1 - new) for each in weights] + [new]
        return weights

    def leaves_out(self, values: tuple[float, float]) -> bool:
        if not all(math.isfinite(each) for each in values):
            return True
        acts = len(self.applied) >= self.config.after_steps
        if acts and self.in_a_row < self.config.most_in_a_row:
            for index, value in enumerate(values):
                pairs = list(zip(self.weights(), [a[index] for a in self.applied], strict=True))
                mean = math.fsum(weight * each for weight, each in pairs)
                variance = math.fsum(weight * (each - mean) ** 2 for weight, each in pairs)
                if value > mean + self.config.deviations * math.sqrt(variance):
                    self.in_a_row += 1
                    return True
        self.applied.append(values)
        self.in_a_row = 0
        return False


FIGURES = st.tuples(*[st.sampled_from([1.0, 1.25, 1.5, 0.75, 3.0, 30.0, math.inf, math.nan])] * 2)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(FIGURES, min_size=10, max_size=40),
    st.sampled_from([0.5, 0.8, 0.99]),
    st.integers(1, 3),
    st.integers(1, 6),
)
def test_decisions_and_statistics_are_those_of_the_definition(steps, decay, most, after):
    config = SkipSpikesConfig(deviations=2.3, decay=decay, most_in_a_row=most, after_steps=after)
    spikes, plain = LossSpikeFilter(config), PlainFilter(config)
    for loss, norm in steps:
        resumed = LossSpikeFilter(config)
        resumed.load(json.loads(json.dumps(spikes.record())))
        assert resumed.record() == spikes.record()
        spikes = resumed
        spikes.take_loss(torch.tensor(loss, dtype=torch.float64), torch.tensor(True))
        judged = spikes.judge(torch.tensor(norm))
        out = bool(spikes.left_out)
        assert spikes.judgement is not None
        assert not out or spikes.judgement[0].any()
        assert plain.leaves_out((loss, norm)) == (out or not math.isfinite(loss + norm))
        assert torch.equal(judged, torch.tensor(math.inf if out else norm)) or math.isnan(norm)
    record = spikes.record()["skip_spikes"]
    assert record["applied"] == len(plain.applied)
    if plain.applied:
        weights = plain.weights()
        assert math.isclose(sum(weights), 1)
        mean = math.fsum(w * a[0] for w, a in zip(weights, plain.applied, strict=True))
        assert record["means"][0] == pytest.approx(mean)


def test_the_first_steps_weigh_equally():
    spikes = LossSpikeFilter(SkipSpikesConfig(deviations=3.0))
    losses = [2.0, 4.0, 7.0, 1.0]
    for loss in losses:
        spikes.take_loss(torch.tensor(loss, dtype=torch.float64), torch.tensor(True))
        spikes.judge(torch.tensor(1.0))
    record = spikes.record()["skip_spikes"]
    assert record["means"][0] == pytest.approx(statistics.fmean(losses))
    assert record["variances"] == pytest.approx([statistics.pvariance(losses), 0.0])


def test_steps_that_train_nothing_are_applied_and_no_part_of_the_statistics():
    spikes = LossSpikeFilter(SkipSpikesConfig(deviations=2.0, after_steps=3))

    def judge(loss, norm, trains):
        spikes.take_loss(torch.tensor(loss, dtype=torch.float64), torch.tensor(trains))
        spikes.judge(torch.tensor(norm))
        return bool(spikes.left_out)

    for loss in [2.0, 2.5, 1.5, 2.0]:
        assert not judge(loss, loss / 2, trains=True)
        before = spikes.record()
        for _ in range(5):
            assert not judge(40.0, 0.0, trains=False)
        assert spikes.record() == before
    assert not judge(2.0, 1.0, trains=True)
    assert judge(40.0, 1.0, trains=True)


def prepare_run(factors: dict[int, float]) -> None:
    """In a run's process: multiply the loss of these steps."""
    from megaphase.training.engine import Engine

    train_step, forward = Engine.train_step, Engine._forward
    now = [0]

    def noting_step(engine, batch, learning_rate, step, progress):
        now[0] = step
        result = train_step(engine, batch, learning_rate, step, progress)
        now[0] = 0
        return result

    def spoiled(engine, micro, dropout_seeds):
        factor = factors.get(now[0], 1.0)
        total, losses = forward(engine, micro, dropout_seeds)
        return total * factor, losses * factor

    Engine.train_step, Engine._forward = noting_step, spoiled


spoil = partial(prepare_run, SPIKES)
spoil_to_nan = partial(prepare_run, dict.fromkeys(SPIKES, math.nan))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return make_corpora(tmp_path_factory.mktemp("corpora"))


def settings_of(corpora, zero=0, tensor=1, precision="fp32", **faults) -> dict[str, Any]:
    settings = run_settings(corpora, parallel={"tensor": tensor, "zero": zero})
    settings["checkpoint"]["asynchronous"] = False
    settings["validation"]["every_steps"] = 50
    return settings | {"precision": precision, "faults": faults}


def rows_of(run_file):
    """Return the rows of a run's training steps, apart from those that were skipped."""
    rows = timeless(read_rows(run_file.parent / "run"))
    return [row for row in rows if "loss_by_task" in row and "skipped" not in row]


def events_of(run_file, name):
    return [row for row in read_rows(run_file.parent / "run") if row.get("event") == name]


LAYOUTS = [
    (0, "fp32"),
    *[
        pytest.param(zero, precision, marks=pytest.mark.slow)
        for zero, precision in [
            (1, "bf16"),
            (1, "fp32"),
            (2, "fp32"),
            (3, "fp32"),
            (3, "bf16"),
            (0, "bf16"),
        ]
    ],
]


@pytest.mark.parametrize(("zero", "precision"), LAYOUTS)
def test_a_spike_is_left_out_as_a_step_that_is_not_finite_is_also_after_a_kill(
    zero, precision, corpora, tmp_path
):
    usual = settings_of(corpora, zero, precision=precision)
    filtered = settings_of(corpora, zero, precision=precision, skip_spikes=FILTER)
    not_finite = write_run_file(tmp_path / "not_finite", usual)
    spikes = write_run_file(tmp_path / "spikes", filtered)
    killed = write_run_file(tmp_path / "killed", filtered)
    run_well("train", not_finite, prepare=spoil_to_nan)
    said = run_well("train", spikes, prepare=spoil)
    (first, *_) = events_of(spikes, "spike_skipped")
    why = spike_in_words(first["exceeded"])
    assert f"pretrain step 9 left out as a spike: {why} (1 in this phase" in " ".join(said.split())
    assert " deviations above its mean " in why
    for name, figures in first["exceeded"].items():
        assert figures["value"] == first[name]
        applied = [row[name] for row in rows_of(spikes) if row["step"] < 9]
        assert figures["mean"] == pytest.approx(statistics.fmean(applied))
        assert figures["standard_deviation"] == pytest.approx(statistics.pstdev(applied))
    assert [row["step"] for row in events_of(not_finite, "step_skipped")] == [*SPIKES]
    assert [row["step"] for row in events_of(spikes, "spike_skipped")] == [*SPIKES]
    assert not events_of(spikes, "step_skipped")
    assert not events_of(spikes, "loss_spike")
    assert rows_of(spikes) == rows_of(not_finite)
    assert len(rows_of(spikes)) == 19

    if zero == 1:
        return  # the statistics do not depend on it
    run_killed(killed, before_step=KILLED_BEFORE, prepare=spoil)
    run_well("train", killed, prepare=spoil)
    rows, resumed = (timeless(read_rows(path.parent / "run")) for path in (spikes, killed))
    for row in [*rows, *resumed]:
        row.pop("trace", None)
    assert rows == resumed
    if precision == "fp32":
        traced = run("plan", "trace", spikes.parent / "run", "--step", 9)
        assert (
            f"step 9 was skipped: it was a loss spike ({why}), it changed nothing" in traced.stderr
        )
        assert (spikes.parent / "run" / events_of(spikes, "spike_skipped")[0]["trace"]).exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_by_two_ranks_leave_out_the_same_steps(corpora, tmp_path):
    alone = write_run_file(tmp_path / "alone", settings_of(corpora, skip_spikes=FILTER))
    run_well("train", alone, prepare=spoil)
    several = write_run_file(tmp_path / "several", settings_of(corpora, 3, 2, skip_spikes=FILTER))
    with RunningRanks(megaphase("train", several), 4, prepare=spoil) as ranks:
        check(ranks.wait())
    assert [row["step"] for row in events_of(several, "spike_skipped")] == [*SPIKES]
    for row, other in zip(rows_of(alone), rows_of(several), strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)


def test_bounds_on_the_steps_in_a_row_and_in_all(corpora, tmp_path):
    many = partial(prepare_run, dict.fromkeys((7, 8, 9), 40.0))
    settings = settings_of(corpora, skip_spikes=FILTER | {"most_in_a_row": 2})
    settings["phases"] = settings["phases"][:1]
    in_a_row = write_run_file(tmp_path / "in_a_row", settings)
    run_well("train", in_a_row, prepare=many)
    assert [row["step"] for row in events_of(in_a_row, "spike_skipped")] == [7, 8]
    settings["faults"]["skip_spikes"]["most"] = 1
    in_all = write_run_file(tmp_path / "in_all", settings)
    result = run("train", in_all, prepare=many)
    assert result.returncode == 1
    message = "pretrain step 8: 2 steps of this phase were left out as spikes, more than faults."
    assert message in " ".join(result.stderr.split())
