"""Whole runs of `megaphase train`, as real processes: phases, metrics, resume, layouts."""

import json
import math
import re
import signal
import time
from pathlib import Path

import pytest
from distributed import RunningRanks, check, launch
from rounding import FP32, approx_validation
from run_support import (
    HELD_OUT,
    STEPS,
    copy_run,
    make_corpora,
    megaphase,
    read_rows,
    rows_so_far,
    run_settings,
    timeless,
    without_gap,
    write_run_file,
)

from megaphase.tokenizer import Tokenizer
from megaphase.training.engine import Engine

ALL_STEPS = sum(STEPS)
PEAK_TFLOPS = 0.25  # of each process


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return make_corpora(tmp_path_factory.mktemp("corpora"))


def train(run_file: Path, processes: int = 1, *overrides: str):
    results = launch(megaphase("train", run_file, *overrides), processes)
    check(results)
    return results[0]


@pytest.fixture(scope="module")
def single(corpora, tmp_path_factory):
    """Return the folder of a finished run of one process, ZeRO 0."""
    folder = tmp_path_factory.mktemp("single") / "a"
    train(write_run_file(folder, run_settings(corpora)))
    return folder


@pytest.fixture(scope="module")
def several(corpora, tmp_path_factory):
    """Return the folder of a finished run of tensor 2 × data 2 with ZeRO 3."""
    folder = tmp_path_factory.mktemp("several") / "a"
    settings = run_settings(
        corpora, parallel={"tensor": 2, "zero": 3}, hardware={"peak_tflops": PEAK_TFLOPS}
    )
    train(write_run_file(folder, settings), 4)
    return folder


def test_mfu_is_measured_against_the_peak_of_all_processes(single, several, corpora):
    block = 32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 64
    head = 32 * Tokenizer.load(corpora / "tok").vocab_size
    flops_per_token = 6 * (2 * block + head) + 12 * 2 * 32 * 32
    for row in read_rows(several / "run"):
        if "loss" in row:
            peak = 4 * PEAK_TFLOPS * 1e12
            assert row["mfu"] == pytest.approx(flops_per_token * row["tokens_per_second"] / peak)
    assert {row["mfu"] for row in read_rows(single / "run") if "loss" in row} == {None}


def test_rows_tell_the_story_of_two_phases(single):
    rows = read_rows(single / "run")
    training = [row for row in rows if "loss" in row]
    assert all(0 <= row["data_wait_seconds"] < row["step_seconds"] for row in training)
    assert [row["step"] for row in training] == list(range(1, ALL_STEPS + 1))
    names = ["pretrain"] * STEPS[0] + ["joint"] * STEPS[1]
    assert [row["phase"] for row in training] == names
    phase_steps = [*range(1, STEPS[0] + 1), *range(1, STEPS[1] + 1)]
    assert [row["phase_step"] for row in training] == phase_steps
    assert [row["tokens"] for row in training] == [
        8 * 32 * step for step in range(1, ALL_STEPS + 1)
    ]
    validation = [(row["step"], row["phase"]) for row in rows if "validation" in row]
    assert validation == [
        (0, "pretrain"), (5, "pretrain"), (10, "pretrain"), (12, "pretrain"),
        (12, "joint"), (15, "joint"), (20, "joint"), (21, "joint"),
    ]  # fmt: skip
    events = [(row["step"], row["event"]) for row in rows if "event" in row]
    assert events == [
        (0, "phase_start"), (4, "checkpoint"), (8, "checkpoint"),
        (12, "phase_end"), (12, "checkpoint"), (12, "phase_start"), (12, "optimizer_reset"),
        (16, "checkpoint"), (20, "checkpoint"), (21, "phase_end"), (21, "checkpoint"),
    ]  # fmt: skip


def test_each_phase_follows_its_own_schedule(single):
    rates = [row["learning_rate"] for row in read_rows(single / "run") if "loss" in row]

    def cosine(peak, steps):
        warm_up = [peak / 3, 2 * peak / 3]
        falling = [0.5 * (1 + math.cos(math.pi * i / (steps - 3))) for i in range(steps - 2)]
        return warm_up + [peak / 10 + 0.9 * peak * each for each in falling]

    assert rates == pytest.approx(cosine(1e-2, STEPS[0]) + cosine(5e-3, STEPS[1]))


def test_training_learns_and_low_resource_text_waits_for_its_phase(single):
    rows = read_rows(single / "run")
    training = [row for row in rows if "loss" in row]
    assert all("cimri" not in row["loss_by_task"] for row in training[: STEPS[0]])
    assert any("cimri" in row["loss_by_task"] for row in training[STEPS[0] :])
    first, *_, last = (row["validation"] for row in rows if "validation" in row)
    assert first["alda"]["loss"] == pytest.approx(math.log(500), rel=0.01)
    assert all(last[task]["loss"] < first[task]["loss"] for task in first)


def test_bits_per_byte_are_nats_over_the_bytes_of_the_scored_text(single, corpora):
    """Compared with a count that decodes each scored token separately."""
    from plan_support import read_held_out

    from megaphase.config.load import load_run_file
    from megaphase.plan.spec import plan_spec
    from megaphase.tokenizer import Tokenizer

    config = load_run_file(single / "run.yaml")
    tokenizer = Tokenizer.load(config.tokenizer)
    last = [row for row in read_rows(single / "run") if "validation" in row][-1]["validation"]
    for number, (task, stream) in enumerate(plan_spec(config, tokenizer).held_out.items()):
        targets = read_held_out(stream, number, HELD_OUT, tokenizer.eod).targets.flatten().tolist()
        scored = [token for token in targets if token >= 0]
        # A byte of a character that is written as several tokens is one byte.
        bytes_of = {
            token: 1 if "\ufffd" in text else len(text.encode())
            for token in set(scored)
            for text in [tokenizer.decode([token])]
        }
        size = sum(bytes_of[token] for token in scored)
        expected = last[task]["loss"] * len(scored) / size / math.log(2)
        assert last[task]["bits_per_byte"] == pytest.approx(expected)


def test_a_finished_run_is_left_alone(single):
    files = [single / "run" / name for name in ("metrics.jsonl", "run.json", "plan.json")]
    before = [file.read_bytes() for file in files]
    assert "nothing to do" in train(single / "run.yaml", 1, "faults.skip_batches=77").stdout
    assert [file.read_bytes() for file in files] == before


def test_losses_do_not_depend_on_the_layout(single, several):
    one, four = timeless(read_rows(single / "run")), timeless(read_rows(several / "run"))
    assert len(one) == len(four)
    for a, b in zip(one, four, strict=True):
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=FP32)
            assert a["loss_by_task"] == pytest.approx(b["loss_by_task"], rel=FP32)
        elif "validation" in a:
            for task, figures in a["validation"].items():
                assert figures == approx_validation(b["validation"][task], FP32)
        else:
            assert a == b


def test_evaluate_measures_what_training_measured(several):
    results = launch(megaphase("evaluate", several / "run.yaml", "--json"), 4)
    check(results)
    last = [row for row in read_rows(several / "run") if "validation" in row][-1]
    expected = {task: without_gap(figures) for task, figures in last["validation"].items()}
    found = json.loads(results[0].stdout)
    assert found == {"step": ALL_STEPS, "validation": expected}
    assert [result.stdout for result in results[1:]] == ["", "", ""]


@pytest.mark.parametrize("layout", ["single", "several"])
def test_killed_at_any_moment_it_goes_on_bit_for_bit(layout, request, tmp_path):
    """SIGKILL in the middle of a save, right after one, and between two, then to the end."""
    whole = request.getfixturevalue(layout)
    processes = 1 if layout == "single" else 4
    folder = tmp_path / "killed"
    folder.mkdir()
    run_file = folder / "run.yaml"
    run_file.write_text((whole / "run.yaml").read_text())
    checkpoints = folder / "run" / "checkpoints"

    def saving_again():
        return any(checkpoints.glob("*step-00000008*"))  # in progress, or already complete

    def second_phase_begun():
        return any(
            row.get("phase_step") == 2 and row["phase"] == "joint"
            for row in rows_so_far(folder / "run")
        )

    for moment in (saving_again, second_phase_begun):
        with RunningRanks(megaphase("train", run_file), processes) as ranks:
            ranks.wait_for(moment)
            ranks.signal(signal.SIGKILL)
    said = train(run_file, processes).stdout
    assert "resuming from" in said
    assert timeless(read_rows(folder / "run")) == timeless(read_rows(whole / "run"))
    assert not any(checkpoints.glob(".*"))


def test_an_altered_checkpoint_is_named_and_the_one_before_is_used(single, tmp_path):
    run_file = copy_run(single, tmp_path / "altered")
    run_dir = tmp_path / "altered" / "run"
    newest = run_dir / "checkpoints" / "step-00000021"
    victim = next(newest.glob("*.safetensors"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    said = " ".join(train(run_file).stdout.split())
    assert f"{victim}: has been altered" in said
    assert "step-00000020" in said
    assert timeless(read_rows(run_dir)) == timeless(read_rows(single / "run"))


def test_a_run_whose_checkpoints_are_all_damaged_keeps_its_record(single, tmp_path):
    run_file = copy_run(single, tmp_path / "purged")
    run_dir = tmp_path / "purged" / "run"
    for shard in run_dir.glob("checkpoints/step-*/*.safetensors"):
        shard.unlink()
    refused = launch(megaphase("train", run_file), 2)
    assert [each.returncode for each in refused] == [2, 2]
    assert refused[0].stderr.count("\n") == 1
    assert f"remove {run_dir / 'checkpoints'} to start again" in refused[0].stderr
    assert read_rows(run_dir) == read_rows(single / "run")


def test_newest_checkpoints_and_ends_of_phases_stay(single):
    folder = single / "run" / "checkpoints"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["latest", "step-00000012", "step-00000020", "step-00000021"]
    assert (folder / "latest").resolve().name == "step-00000021"


def test_a_bf16_run_with_zero_3_learns(corpora, tmp_path):
    settings = run_settings(corpora, precision="bf16", parallel={"tensor": 1, "zero": 3})
    train(write_run_file(tmp_path, settings))
    losses = [row["loss"] for row in read_rows(tmp_path / "run") if "loss" in row]
    assert losses[-1] < losses[0] - 0.5


def test_tensorboard_gets_the_same_figures(corpora, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = run_settings(corpora, logging={"tensorboard": True})
    settings["phases"] = settings["phases"][:1]
    train(write_run_file(tmp_path, settings))
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    rows = read_rows(tmp_path / "run")
    shown = {event.step: event.value for event in board.Scalars("train/loss")}
    assert shown == pytest.approx({row["step"]: row["loss"] for row in rows if "loss" in row})
    held_out = {event.step: event.value for event in board.Scalars("validation_loss/cimri")}
    expected = {r["step"]: r["validation"]["cimri"]["loss"] for r in rows if "validation" in r}
    assert held_out == pytest.approx(expected)


def step_slowly() -> None:
    """Prepare a run's processes: every micro-batch takes 2 s."""
    step = Engine._step

    def slow(engine: Engine):
        time.sleep(2)
        return step(engine)

    Engine._step = slow


@pytest.mark.slow
def test_a_step_may_take_longer_than_a_run_may_stand_still(corpora, tmp_path):
    settings = run_settings(corpora, faults={"stalled_seconds": 6}, checkpoint={"end_after": 1})
    run_file = write_run_file(tmp_path / "slow", settings)  # of 4 micro-batches a step
    check(launch(megaphase("train", run_file), 1, prepare=step_slowly))


def test_plain_lines_without_a_terminal(corpora, tmp_path):
    settings = run_settings(corpora)
    settings["phases"] = settings["phases"][:1]
    result = train(write_run_file(tmp_path, settings))
    lines = result.stdout.splitlines()
    steps = [re.match(r"pretrain step (\d+)/12  loss [\d.]+  .* tokens/s", line) for line in lines]
    assert [int(match[1]) for match in steps if match] == [5, 10, 12]
    assert "Warning" not in result.stderr
