"""Steps that are not finite are skipped, too many in a row end a run; spikes are reported."""

import json
import math
import statistics
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from run_support import (
    TEXT_BYTES,
    make_corpora,
    read_rows,
    run_settings,
    timeless,
    write_run_file,
)
from safetensors.torch import load_file
from warm_commands import run, run_killed, run_well

from megaphase.callbacks.loss_spikes import ENOUGH, WINDOW, LossSpikeDetector
from megaphase.fault_tolerance.config import FaultsConfig

ALLOWED = 2
BAD_STEP, LAST_STEP = 4, 6
SPIKE_STEP = ENOUGH + 4
FACTOR = 3.0


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return make_corpora(tmp_path_factory.mktemp("corpora"))


def settings_of(corpora, steps, peak, **changes):
    """Return one phase with a constant learning rate, validated only at its ends."""
    rate = {"schedule": "constant", "peak": peak}
    mixture = {"temperature": 3.0}
    phase = {"name": "only", "steps": steps, "mixture": mixture, "learning_rate": rate}
    return run_settings(
        corpora,
        phases=[phase],
        validation={"every_steps": 100, "samples": 4, "fraction": 0.1},
        **changes,
    )


def scale_losses(steps: list[int], factor: float) -> None:
    """In a run's process: scale the losses of these steps, and thus their gradients."""
    from megaphase.training.engine import Engine
    from megaphase.training.trainer import Trainer

    train_step, forward = Trainer.train_step, Engine._forward
    now = [0]

    def noting_step(trainer, *arguments):
        now[0] = trainer.state.step + 1
        train_step(trainer, *arguments)
        now[0] = 0

    def forward_scaled(engine, micro, dropout_seeds):
        scale = factor if now[0] in steps else 1.0
        total, losses = forward(engine, micro, dropout_seeds)
        return total * scale, losses * scale

    Trainer.train_step, Engine._forward = noting_step, forward_scaled


BREAK = partial(scale_losses, list(range(2, 13)), math.nan)


def events(run_dir: Path, name: str):
    return [row for row in read_rows(run_dir) if row.get("event") == name]


def trace_of(run_file: Path, step: int) -> str:
    return run_well("plan", "trace", run_file, "--step", step, "--json")


@pytest.fixture(scope="module")
def broken(corpora, tmp_path_factory):
    """Return a run whose losses are NaN from its second step on, and how it ended."""
    settings = settings_of(
        corpora, 12, 1e-3, faults={"skip_batches": ALLOWED}, checkpoint={"every_steps": 2},
        logging={"every_steps": 5, "tensorboard": True},
    )  # fmt: skip
    run_file = write_run_file(tmp_path_factory.mktemp("broken"), settings)
    return run_file, run("train", run_file, prepare=BREAK)


def test_too_many_skipped_steps_in_a_row_end_the_run(broken):
    run_file, result = broken
    run_dir = run_file.parent / "run"
    first, *skipped = [row for row in read_rows(run_dir) if "loss" in row]
    assert "skipped" not in first
    assert [row["step"] for row in skipped] == [2, 3, 4]
    assert all(row["skipped"] is True and row["loss"] is None for row in skipped)
    trace = run_dir / "traces" / "step-00000004.jsonl"
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    said = result.stderr.strip()
    tasks = ", ".join(tasks_of(run_file, 4))
    assert said.startswith(f"megaphase: only step 4: the loss of {tasks} is not finite, ")
    assert f"in 3 steps in a row (faults.skip_batches: 2); what the step saw: {trace};" in said
    for step in (2, 3):
        assert f"only step {step}  skipped: the loss of" in result.stdout


def tasks_of(run_file: Path, step: int) -> list[str]:
    seen = {json.loads(line)["task"] for line in trace_of(run_file, step).splitlines()}
    return [task for task in TEXT_BYTES if task in seen]


def test_what_skipped_steps_saw_is_written_down(broken):
    run_file, _ = broken
    told = events(run_file.parent / "run", "step_skipped")
    assert [(row["step"], row["phase"]) for row in told] == [(2, "only"), (3, "only"), (4, "only")]
    for row in told:
        assert Path(row["trace"]).read_text() == trace_of(run_file, row["step"])
        assert row["tasks"] == tasks_of(run_file, row["step"])


def test_started_again_it_counts_the_skipped_steps_before_its_checkpoint(broken):
    """The row of the checkpoint's step, whose loss is no number, goes to TensorBoard again."""
    run_file, first = broken
    before = timeless(read_rows(run_file.parent / "run"))
    result = run("train", run_file, prepare=BREAK)
    assert (result.returncode, result.stderr) == (1, first.stderr)
    assert timeless(read_rows(run_file.parent / "run")) == before


def test_a_learning_rate_beyond_all_bounds_ends_the_run(corpora, tmp_path):
    """No step is made to fail: losses stay finite, since norms divide, but gradients do not."""
    settings = settings_of(corpora, 12, 1e30, faults={"skip_batches": 0})
    result = run("train", write_run_file(tmp_path, settings))
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert " is not finite, in 1 step (faults.skip_batches: 0); " in result.stderr
    last = [row for row in read_rows(tmp_path / "run") if "loss" in row][-1]
    assert last["skipped"]
    assert last["grad_norm"] is None


@pytest.mark.parametrize(
    ("zero", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16")]
)
def test_a_skipped_step_changes_nothing_and_the_run_goes_on(zero, precision, corpora, tmp_path):
    settings = settings_of(
        corpora,
        LAST_STEP,
        1e-2,
        parallel={"tensor": 1, "zero": zero},
        precision=precision,
        checkpoint={"every_steps": 1, "keep": 10},
    )
    run_file = write_run_file(tmp_path, settings)
    run_well("train", run_file, prepare=partial(scale_losses, [BAD_STEP], math.nan))
    rows = [row for row in read_rows(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows if "skipped" in row] == [BAD_STEP]
    assert all(math.isfinite(row["loss"]) for row in rows if "skipped" not in row)

    def saved(step):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        steps = json.loads((folder / "state.json").read_text())["optimizer_steps"]
        return steps, load_file(folder / "shard-00000.safetensors")

    (steps_before, before), (steps_after, after) = saved(BAD_STEP - 1), saved(BAD_STEP)
    assert steps_before == steps_after == BAD_STEP - 1
    assert saved(LAST_STEP)[0] == LAST_STEP - 1
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(after[name], each) for name, each in saved(LAST_STEP)[1].items())


def test_a_spike_is_told_with_what_the_step_saw_also_after_a_kill(corpora, tmp_path):
    settings = settings_of(corpora, SPIKE_STEP + 2, 1e-5, checkpoint={"every_steps": 15})
    prepare = partial(scale_losses, [SPIKE_STEP], FACTOR)
    run_file = write_run_file(tmp_path / "a", settings)
    out = run_well("train", run_file, prepare=prepare)
    run_dir = tmp_path / "a" / "run"
    (spike,) = events(run_dir, "loss_spike")
    losses = [row["loss"] for row in read_rows(run_dir) if "loss" in row]
    before = statistics.fmean(losses[: SPIKE_STEP - 1])
    assert spike["loss"] == losses[SPIKE_STEP - 1] > 2 * before
    assert spike["mean_before"] == pytest.approx(before)
    trace = run_dir / "traces" / f"step-{SPIKE_STEP:08d}.jsonl"
    assert (spike["step"], spike["phase"], spike["trace"]) == (SPIKE_STEP, "only", str(trace))
    assert trace.read_text() == trace_of(run_file, SPIKE_STEP)
    assert f"only step {SPIKE_STEP}  loss spike: {spike['loss']:.4f}, before {before:.4f}" in out
    assert [path.name for path in trace.parent.iterdir()] == [trace.name]

    killed = write_run_file(tmp_path / "b", settings)
    run_killed(killed, "checkpoint.asynchronous=false", before_step=18)
    run_well("train", killed, prepare=prepare)
    assert without_paths(tmp_path / "b" / "run") == without_paths(run_dir)


def without_paths(run_dir: Path):
    return [{k: v for k, v in row.items() if k != "trace"} for row in timeless(read_rows(run_dir))]


def slow_spikes(losses: list[float | None], deviations: float) -> list[float | None]:
    """Return the mean before every spike, according to the documentation; None: a skipped step."""
    taken: list[float] = []
    found: list[float | None] = []
    for loss in losses:
        window = taken[-WINDOW:]
        spike = None
        if loss is not None:
            taken.append(loss)
            if deviations and len(window) >= ENOUGH:
                mean = statistics.fmean(window)
                spike = mean if loss > mean + deviations * statistics.pstdev(window) else None
        found.append(spike)
    return found


def detector(deviations: float) -> LossSpikeDetector:
    return LossSpikeDetector(FaultsConfig(spike_deviations=deviations), lambda step: Path("trace"))


def observe(watch: LossSpikeDetector, loss: float | None) -> float | None:
    if loss is None:
        watch.skip()
        return None
    return watch.spike(loss)


# Eighths: their sums, and those of their squares, are exact in floating point.
eighths = st.integers(8, 80).map(lambda number: number / 8)
some_losses = st.lists(st.one_of(st.none(), eighths, eighths, eighths), max_size=160)


@given(some_losses, st.sampled_from([0.0, 1.5, 2.0, 6.0]), st.data())
def test_spikes_are_those_of_the_slow_reference_also_when_cut_anywhere(losses, deviations, data):
    cut = data.draw(st.integers(0, len(losses)))
    watch = detector(deviations)
    found = [observe(watch, loss) for loss in losses[:cut]]
    state = json.dumps(watch.state_dict())
    watch = detector(deviations)
    watch.load_state_dict(json.loads(state))
    found += [observe(watch, loss) for loss in losses[cut:]]
    expected = slow_spikes(losses, deviations)
    assert [each is None for each in found] == [each is None for each in expected]
    assert [e for e in found if e is not None] == pytest.approx(
        [e for e in expected if e is not None]
    )
    in_a_row = 0
    for loss in losses:
        in_a_row = in_a_row + 1 if loss is None else 0
    assert watch.skipped_in_a_row == in_a_row


def test_a_new_phase_has_nothing_to_compare_with_and_skipped_steps_still_count():
    watch = detector(2.0)
    for i in range(ENOUGH):
        assert watch.spike(1.0 + i % 2 / 8) is None
    watch.skip()
    watch.on_phase_begin(1, "joint")
    assert watch.skipped_in_a_row == 1
    assert watch.spike(50.0) is None
    assert watch.skipped_in_a_row == 0
