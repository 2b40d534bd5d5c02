"""Branches from another run's checkpoint, compared with the run that had both phases itself."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from run_support import HIGH, STEPS, make_corpora, read_rows, run_settings, timeless, write_run_file
from typer.testing import CliRunner
from warm_commands import run, run_killed, run_well

from megaphase.checkpoint.names import find_checkpoint
from megaphase.config.load import load_run_file
from megaphase.plan.branch import choose_branch
from megaphase.plan.commands import plan_app
from megaphase.plan.same_run import refuse_other_run
from megaphase.utils.errors import InputError

RATES = {"alda": 0.25, "boreth": 0.25, "cimri": 0.5}
# A run's messages about its own start and its checkpoints.
OWN_EVENTS = ("branch", "checkpoint", "best")
PRETRAIN_STEPS = STEPS[0]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return make_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def settings_of(corpora, *, state="reset", **changes):
    settings = run_settings(corpora, **changes)
    settings["phases"][1] |= {"mixture": {"rates": RATES}, "optimizer_state": state}
    return settings


def branch_settings(corpora, *, state="reset", **changes):
    settings = settings_of(corpora, state=state, **changes)
    return settings | {"phases": settings["phases"][1:]}


@pytest.fixture(scope="module")
def base(corpora, folder):
    """Return the run directory of the high-resource phase, without the task that is added later.

    With such a large required gain, the best weights are those of step 5, saved separately.
    """
    settings = run_settings(corpora, monitor={"tasks": ["alda"], "min_gain": 0.9})
    settings["phases"] = settings["phases"][:1]
    settings["tasks"] = {task: settings["tasks"][task] for task in HIGH}
    run_well("train", write_run_file(folder / "base", settings))
    return folder / "base" / "run"


@pytest.fixture(scope="module")
def whole(corpora, folder):
    """Return the uninterrupted run of both phases."""
    run_well("train", write_run_file(folder / "whole", settings_of(corpora)))
    return folder / "whole" / "run"


@pytest.fixture(scope="module")
def branch(corpora, folder, base):
    """Return a finished branch from the end of the first phase."""
    run_file = write_run_file(folder / "branch", branch_settings(corpora))
    run_well("train", run_file, "--from", f"{base}@pretrain")
    return folder / "branch" / "run"


def rows_of_joint(run_dir: Path):
    return [
        row
        for row in timeless(read_rows(run_dir))
        if row.get("phase") == "joint" and row.get("event") not in OWN_EVENTS
    ]


def names(run_dir: Path):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_branch_is_bit_for_bit_the_run_that_had_both_phases(branch, whole):
    assert rows_of_joint(branch) == rows_of_joint(whole)
    steps = [row["step"] for row in rows_of_joint(branch) if "loss" in row]
    assert steps == list(range(PRETRAIN_STEPS + 1, sum(STEPS) + 1))


def test_nothing_of_the_base_is_copied(branch, base):
    assert names(branch) == ["latest", "step-00000020", "step-00000021"]
    origin = json.loads((branch / "origin.json").read_text())
    checkpoint = base / "checkpoints" / "step-00000012"
    assert origin["checkpoint"] == str(checkpoint)
    assert origin["step"] == PRETRAIN_STEPS
    assert sum(origin["used"].values()) == 8 * PRETRAIN_STEPS
    first = read_rows(branch)[0]
    assert first == {"step": 12, "event": "branch", "checkpoint": str(checkpoint)}


def test_a_branch_is_planned_as_it_is_then_trained(branch, base, corpora, tmp_path):
    run_file = write_run_file(tmp_path, branch_settings(corpora))
    options = [str(run_file), "--from", f"{base}@pretrain"]
    planned = json.loads(CliRunner().invoke(plan_app, [*options, "--json"]).stdout)
    trained = json.loads((branch / "plan.json").read_text())
    assert [planned["fingerprint"], planned["phases"]] == [
        trained["fingerprint"],
        trained["phases"],
    ]
    used = json.loads((branch / "origin.json").read_text())["used"]
    tasks = planned["origin"]["tasks"]
    assert {task: facts["ordinal"] for task, facts in tasks.items()} == used | {"cimri": 0}
    assert tasks["alda"]["epochs"] > tasks["cimri"]["epochs"] == 0
    said = CliRunner().invoke(plan_app, options).stdout
    assert f"Branch of {base}@pretrain: step {PRETRAIN_STEPS}, " in said
    # A branch that has begun is planned without the option.
    assert "Branch of " in CliRunner().invoke(plan_app, [str(branch.parent / "run.yaml")]).stdout
    assert not (tmp_path / "run" / "origin.json").exists()


def test_planning_a_branch_refuses_what_training_it_would(base, corpora, tmp_path):
    run_file = write_run_file(tmp_path, branch_settings(corpora))
    result = CliRunner().invoke(
        plan_app, [str(run_file), "model.ffn=96", "--from", f"{base}@latest"]
    )
    assert "model.ffn: is 96, but " in str(result.exception)
    assert not (tmp_path / "run").exists()


def test_a_longer_run_is_refused_with_the_branch_that_trains_on(base, whole):
    for run_dir, changes, name in [
        (base, ("phases.0.steps=20",), "pretrain"),
        (whole, ("phases.0.steps=20",), "pretrain"),
        (whole, ("phases.1.steps=20",), "joint"),
    ]:
        config = load_run_file(run_dir.parent / "run.yaml", changes)
        with pytest.raises(
            InputError, match=rf"is 20, but .*, and start it with --from .*@{name}$"
        ):
            refuse_other_run(run_dir, config)
    settings = yaml.safe_load((base.parent / "run.yaml").read_text())
    settings["phases"] += [settings["phases"][0] | {"name": "more"}]
    config = load_run_file(write_run_file(base.parent / "longer", settings))
    with pytest.raises(
        InputError, match=r"phases: is 2 phases, but .* with 1 phases; .*@pretrain$"
    ):
        refuse_other_run(base, config)
    # Other keys are not lengths.
    config = load_run_file(base.parent / "run.yaml", ("seed=12",))
    with pytest.raises(InputError, match="put the old value back or choose another output"):
        refuse_other_run(base, config)


def test_keep_keeps_moments_and_another_branch_of_the_same_base_resets(
    branch, base, corpora, folder
):
    undisturbed = write_run_file(folder / "whole-keep", settings_of(corpora, state="keep"))
    run_well("train", undisturbed)
    kept = write_run_file(folder / "keep", branch_settings(corpora, state="keep"))
    run_well("train", kept, "--from", f"{base}@latest")
    rows = rows_of_joint(folder / "keep" / "run")
    assert rows == rows_of_joint(folder / "whole-keep" / "run")
    assert "optimizer_reset" not in [row.get("event") for row in rows]
    losses = [row["loss"] for row in rows if "loss" in row]
    reset_losses = [row["loss"] for row in rows_of_joint(branch) if "loss" in row]
    assert losses[0] == reset_losses[0]  # before the first step of the phase
    assert losses[1:] != reset_losses[1:]


def test_a_branch_that_is_killed_after_its_first_checkpoint_goes_on(branch, base, corpora, folder):
    run_file = write_run_file(folder / "killed", branch_settings(corpora))
    source = ("--from", f"{base}@step-00000012")
    run_killed(run_file, "checkpoint.asynchronous=false", *source, before_step=19)
    assert (folder / "killed" / "run" / "checkpoints" / "step-00000016").is_dir()
    shutil.copytree(folder / "killed", folder / "killed-without", symlinks=True)
    for name, arguments in (("killed", source), ("killed-without", ())):
        assert "resuming from" in run_well("train", folder / name / "run.yaml", *arguments)
        rows = read_rows(folder / name / "run")
        assert [row["event"] for row in rows if row.get("event") in ("branch", "resume")] == [
            "branch",
            "resume",
        ]
        assert rows_of_joint(folder / name / "run") == rows_of_joint(branch)


def test_a_branch_that_is_killed_before_its_first_checkpoint_begins_again(
    branch, base, corpora, folder
):
    run_file = write_run_file(folder / "early", branch_settings(corpora))
    source = ("--from", base / "checkpoints" / "step-00000012")
    run_killed(run_file, *source, before_step=15)
    assert not (folder / "early" / "run" / "checkpoints" / "latest").exists()
    shutil.copytree(folder / "early", folder / "orphan")
    run_well("train", run_file)
    assert rows_of_joint(folder / "early" / "run") == rows_of_joint(branch)

    checkpoint = base / "checkpoints" / "step-00000012"
    checkpoint.rename(folder / "moved")
    result = run("train", folder / "orphan" / "run.yaml")
    (folder / "moved").rename(checkpoint)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert f"{checkpoint}: this is not a checkpoint" in result.stderr

    # The name of another checkpoint, caused by an altered byte, is not followed.
    origin = folder / "orphan" / "run" / "origin.json"
    origin.write_text(origin.read_text().replace("step-00000012", "step-00000011"))
    result = run("train", folder / "orphan" / "run.yaml")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert f"{origin}: is damaged" in result.stderr


def kill_before_claim() -> None:
    """In a run's process: end it before it reports that it has started."""
    from megaphase.training.run_directory import RunDirectory

    def claim(*_: object, record: bool) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    RunDirectory.claim = claim  # type: ignore[assignment]


def test_a_branch_that_is_killed_before_it_has_a_run_file_is_still_a_branch(
    branch, base, corpora, folder
):
    run_file = write_run_file(folder / "unclaimed", branch_settings(corpora))
    result = run("train", run_file, "--from", f"{base}@pretrain", prepare=kill_before_claim)
    assert result.returncode == -signal.SIGKILL
    assert not (folder / "unclaimed" / "run" / "run.json").exists()
    run_well("train", run_file)
    assert rows_of_joint(folder / "unclaimed" / "run") == rows_of_joint(branch)


def test_the_same_command_goes_on_when_the_base_has_moved_on_or_is_gone(base, corpora, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(base, copy, symlinks=True)
    run_file = write_run_file(tmp_path / "new", branch_settings(corpora))
    config = load_run_file(run_file)
    source = f"{copy}@latest"
    choose_branch(config, source).record(config.output)
    (copy / "checkpoints" / "latest").unlink()
    (copy / "checkpoints" / "latest").symlink_to("step-00000008")
    assert choose_branch(config, source).checkpoint.name == "step-00000012"
    shutil.rmtree(copy)
    assert choose_branch(config, source).step == PRETRAIN_STEPS
    assert choose_branch(config, None).step == PRETRAIN_STEPS


def test_the_best_weights_of_a_task_can_be_branched(base, corpora, folder):
    settings = branch_settings(corpora)
    settings["phases"][0]["steps"] = 1
    settings["phases"][0]["learning_rate"]["warmup_steps"] = 1
    run_file = write_run_file(folder / "of-best", settings)
    run_well("train", run_file, "--from", f"{base}@best-alda")
    best = find_checkpoint(f"{base}@best-alda")
    assert best.name == "best-00000005"
    step = json.loads((best / "state.json").read_text())["step"]
    first, *_, last = read_rows(folder / "of-best" / "run")
    assert (first["step"], last["step"]) == (step, step + 1)
    measured = next(row for row in read_rows(folder / "of-best" / "run") if "validation" in row)
    there = next(r for r in read_rows(base) if "validation" in r and r["step"] == step)
    assert {task: measured["validation"][task]["loss"] for task in HIGH} == {
        task: there["validation"][task]["loss"] for task in HIGH
    }


def trace(run_dir: Path, step: int):
    out = run_well("plan", "trace", run_dir.parent / "run.yaml", "--step", step, "--json")
    return [json.loads(line) for line in out.splitlines()]


def test_trace_of_a_branch_says_what_that_of_the_whole_run_says(branch, whole):
    first = trace(branch, PRETRAIN_STEPS + 1)
    assert first == trace(whole, PRETRAIN_STEPS + 1)
    ordinals = [sample["ordinal"] for sample in first if sample["task"] == "cimri"]
    assert ordinals == [0, 1, 2, 3]  # the base has never seen it
    last = trace(branch, sum(STEPS))
    assert last == trace(whole, sum(STEPS))
    used = json.loads((branch / "origin.json").read_text())["used"]
    assert all(s["ordinal"] >= used[s["task"]] for s in first + last if s["task"] in used)


@pytest.mark.parametrize("name", ["pretrain", "step-00000020", "latest"])
def test_evaluate_by_name_measures_what_training_measured(whole, name):
    by_path = {"latest": f"{whole}@latest"}.get(name, name)
    found = run_well("evaluate", whole.parent / "run.yaml", "--checkpoint", by_path, "--json")
    step = {"pretrain": 12, "step-00000020": 20, "latest": 21}[name]
    rows = [row for row in read_rows(whole) if "validation" in row and row["step"] == step]
    measured = {
        task: {key: figures[key] for key in ("loss", "bits_per_byte")}
        for task, figures in rows[-1]["validation"].items()
    }
    assert json.loads(found) == {"step": step, "validation": measured}


def test_names_in_a_path_with_an_at_sign(base, tmp_path):
    shutil.copytree(base / "checkpoints", tmp_path / "me@home" / "checkpoints", symlinks=True)
    folder = tmp_path / "me@home"
    expected = folder / "checkpoints" / "step-00000012"
    assert find_checkpoint(f"{folder}@pretrain") == expected
    assert find_checkpoint(str(expected)) == expected
    with pytest.raises(InputError, match="has no folder checkpoints"):
        find_checkpoint(f"{tmp_path}@pretrain")


def refused(run_file: Path, source: object, *overrides: str) -> str:
    """Return the error; the command must exit with code 2 and write nothing."""
    before = tree(run_file.parent)
    result = run("train", run_file, *overrides, "--from", source)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    assert tree(run_file.parent) == before
    return result.stderr.removeprefix("megaphase: ").strip()


def tree(folder: Path):
    """Return all files but the lock, with their content."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.fixture
def new_run(corpora, tmp_path):
    return write_run_file(tmp_path / "new", branch_settings(corpora))


def test_unknown_names_are_refused_with_those_there_are(base, new_run):
    said = refused(new_run, f"{base}@pretrian")
    assert said.startswith(f"{base}@pretrian: there is no such checkpoint; ")
    assert "pretrain" in said
    with pytest.raises(InputError) as caught:
        find_checkpoint(f"{base}@joint")
    for name in ("pretrain", "best-alda", "best-mean", "latest", "step-00000008"):
        assert name in str(caught.value)
    assert "this is a run directory, not a checkpoint; give " in refused(new_run, base)
    for wrong in (base / "checkpoints", "nowhere/at/all"):
        with pytest.raises(InputError, match=r"this is not a checkpoint; .*`megaphase convert`"):
            find_checkpoint(str(wrong))


def test_a_hugging_face_model_is_named(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=r"Hugging Face model.*`megaphase convert from-hf`"):
        find_checkpoint(str(tmp_path))


def test_what_does_not_fit_the_base_is_named(base, branch, whole, new_run):
    end = f"{base}@pretrain"
    other_name = refused(new_run, end, "phases.0.name=pretrain")
    assert "phases[0].name: pretrain has been trained in" in other_name
    assert "model.hidden: is 64, but" in refused(new_run, end, "model.hidden=64")
    more_rows = refused(new_run, end, "model.vocab=5000")
    assert "model.vocab: is 5000, but" in more_rows
    assert "`megaphase convert extend-vocab`" in more_rows
    assert "tasks.alda: its samples are not those" in refused(new_run, end, "seed=12")
    corpus = f"tasks.alda.corpus={load_run_file(new_run).tasks['cimri'].corpus}"
    assert "tasks.alda: its samples are not those" in refused(new_run, end, corpus)
    best = base / "checkpoints" / "best-00000005"
    keep = refused(new_run, best, "phases.0.optimizer_state=keep")
    assert f"phases[0].optimizer_state: is keep, but {best} has weights alone" in keep
    other = refused(new_run, end, "phases.0.optimizer_state=keep", "optimizer.name=lion")
    assert "phases[0].optimizer_state: is keep, but" in other
    assert "has the state of adamw, and the optimizer is lion; write reset" in other
    by_itself = refused(whole.parent / "run.yaml", f"{base}@pretrain")
    assert "output: the run in" in by_itself
    assert "began by itself, not from" in by_itself
    otherwise = refused(branch.parent / "run.yaml", f"{base}@step-00000008")
    assert "step-00000012, not from" in otherwise


def test_a_base_that_is_damaged_is_named(base, new_run, tmp_path):
    def altered(folder):
        path = folder / "shard-00000.safetensors"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        return f"{path}: has been altered"

    def cut(folder):
        (folder / "state.json").write_text("{")
        return f"{folder / 'state.json'}: is damaged"

    def stripped(folder):
        (folder / "shard-00000.safetensors").unlink()
        return f"{folder / 'shard-00000.safetensors'}: is missing"

    for number, damage in enumerate((altered, cut, stripped)):
        copy = tmp_path / str(number) / "step-00000012"
        shutil.copytree(base / "checkpoints" / "step-00000012", copy)
        assert damage(copy) in refused(new_run, copy)
    shutil.rmtree(copy)
    assert f"{copy}: this is not a checkpoint" in refused(new_run, copy)


def test_a_branch_can_be_branched_and_a_damaged_origin_is_named(branch, corpora, tmp_path):
    settings = branch_settings(corpora)
    settings["phases"][0] |= {"name": "polish", "steps": 2}
    run_file = write_run_file(tmp_path / "polish", settings)
    run_well("train", run_file, "--from", f"{branch}@joint")
    run_dir = tmp_path / "polish" / "run"
    assert [r["step"] for r in read_rows(run_dir) if "loss" in r] == [22, 23]
    (run_dir / "origin.json").write_text('{"step": 21}')
    result = run("train", run_file)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "origin.json: is damaged" in result.stderr
