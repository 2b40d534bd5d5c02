"""The plan of a sweep: its work, its time, and what a budget leaves out."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from run_support import make_corpora
from sweep_run_support import settings as sweep_settings
from sweep_run_support import write
from test_pruning import ARMS, PEAKS, pruned_sweep
from warm_commands import run

from megaphase.sweep import start
from megaphase.sweep.local import Machine
from megaphase.sweep.outcome import Outcome
from megaphase.sweep.planning.budget import fit_budget, spread
from megaphase.sweep.planning.pruning import sweep_state
from megaphase.sweep.planning.timed_trial import STEPS, timed_costs, trial_run
from megaphase.sweep.planning.work import Costs, Part, Work, shape_of, work_of
from megaphase.sweep.start import dry_run
from megaphase.sweep.sweep import Sweep, load_sweep
from megaphase.sweep.trials import all_trials
from megaphase.utils.errors import InputError


def by_place(sweep: Sweep) -> dict[str, int]:
    """Train a sweep of which earlier settings are always better; return the steps of each run."""
    order = {trial.setting: n for n, trial in enumerate(all_trials(sweep))}
    outcomes: dict[str, Outcome] = {}
    rungs: dict[str, dict[int, dict[str, float]]] = {}
    steps: dict[str, int] = {}
    while True:
        state = sweep_state(sweep, outcomes, rungs)
        for trial, end_after in state.pending_runs:
            losses = dict.fromkeys([*sweep.high, *sweep.low], float(order[trial.setting]))
            last = end_after or trial.first_step + trial.steps
            steps[trial.name] = last - trial.first_step
            if end_after is None:
                outcomes[trial.name] = Outcome(step=last, losses=losses)
            else:
                rungs.setdefault(trial.name, {})[end_after] = losses
        if not state.pending_runs:
            return steps


@pytest.mark.parametrize("prune", [None, "halving", {"at": [0.5], "by": "mean"}])
def test_the_work_is_that_of_the_sweep(prune: Any) -> None:
    sweep = pruned_sweep(prune, seeds=[1, 2])
    found: dict[str, int] = {}
    for number, part in enumerate(work_of(sweep).parts):
        found[part.trial.name] = found.get(part.trial.name, 0) + part.steps
        assert all(before < number for before in part.before) or prune is not None
    assert found == by_place(sweep)


def test_a_part_waits_for_the_choice_of_its_source_and_for_its_rivals() -> None:
    plain = work_of(pruned_sweep(None))
    names = [part.trial.name for part in plain.parts]
    branch = next(part for part in plain.parts if part.trial.arm == "two-phase")
    assert {names[n] for n in branch.before} == {n for n in names if n.startswith("pretrain-")}
    kept = next(part for part in plain.parts if part.trial.arm == "keep")
    assert [names[n] for n in kept.before] == [kept.trial.source]
    halved = work_of(pruned_sweep("halving"))
    second = next(part for part in halved.parts if part.trial.arm == "static" and not part.is_start)
    before = [halved.parts[n] for n in second.before]
    assert len(before) == len(PEAKS) * len(ARMS["static"]["rates"]) * 2
    assert {part.last_step for part in before} == {second.first_step}


def parts(lengths: list[int], before: list[set[int]]) -> Work:
    trial = next(t for t in all_trials(pruned_sweep(None)) if t.source is None)
    return Work([Part(trial, 0, n, frozenset(b)) for n, b in zip(lengths, before, strict=True)])


def test_time_passes_as_slots_and_sources_allow() -> None:
    work = parts([3, 2, 2, 1], [set(), set(), {0}, {0, 1}])
    seconds = [3.0, 2.0, 2.0, 1.0]
    assert work.elapsed(seconds, 1) == 8
    assert work.elapsed(seconds, 2) == 5
    assert work.elapsed(seconds, 9) == 5
    assert work.elapsed_in_rounds(seconds, None) == 3 + 2
    assert work.elapsed_in_rounds(seconds, 1) == 8


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.sets(st.integers(0, 5))), min_size=1, max_size=6),
    st.integers(1, 4),
)
def test_elapsed_is_that_of_a_second_by_second_simulation(
    drawn: list[tuple[int, set[int]]], slots: int
) -> None:
    lengths = [length for length, _ in drawn]
    before = [{b for b in each if b < n} for n, (_, each) in enumerate(drawn)]
    left, ended, running, now = dict(enumerate(lengths)), set[int](), list[int](), 0
    while left:
        for n in left:
            if len(running) < slots and n not in running and before[n] <= ended:
                running.append(n)
        now += 1
        for n in list(running):
            left[n] -= 1
            if left[n] == 0:
                del left[n]
                running.remove(n)
                ended.add(n)
    seconds = [float(length) for length in lengths]
    assert parts(lengths, before).elapsed(seconds, slots) == now


def test_validations_and_starts_are_counted() -> None:
    sweep = pruned_sweep("halving", {"static": {"rates": [0.1, 0.2]}}, seeds=[1])
    own = [part for part in work_of(sweep).parts if part.trial.peak == PEAKS[0]]
    (first, second, third) = [part for part in own if part.trial.mixture.rate == 0.1]
    assert [part.validations for part in (first, second, third)] == [1 + 5, 5, 10]
    costs = Costs(step=2.0, validation=10.0, start=100.0, measuring=1000.0)
    assert costs.seconds(first) == 100 + 15 * 2 + 6 * 10
    assert costs.seconds(third) == 100 + 30 * 2 + 10 * 10 + 1000


def test_runs_of_equal_sizes_take_equally_long() -> None:
    sweep = pruned_sweep(None)
    assert len({shape_of(trial) for trial in all_trials(sweep)}) == 1
    models = {"small": {}, "large": {"layers": 9}}
    assert len({shape_of(t) for t in all_trials(pruned_sweep(None, models=models))}) == 2
    arms = ARMS | {"dropped": {"kind": "regularized", "rates": [0.1],
                               "settings": {"model.dropout": 0.1}}}  # fmt: skip
    assert len({shape_of(trial) for trial in all_trials(pruned_sweep(None, arms))}) == 1


def test_a_budget_takes_from_all_arms_alike_and_seeds_last() -> None:
    sweep = pruned_sweep(None, seeds=[1, 2, 3])
    trials = all_trials(sweep)
    steps, sizes = [work_of(sweep).steps], []
    for omission in fit_budget(sweep, trials):
        steps.append(omission.work.steps)
        finals = [part.trial for part in omission.work.parts if part.trial.is_final]
        by_arm = {arm: {t.setting for t in finals if t.arm == arm} for arm in ARMS}
        assert all(by_arm.values())  # no arm is left out
        sizes.append((sum(map(len, by_arm.values())), len({t.seed for t in finals})))
        sources = {t.source for t in finals if t.source}
        assert sources <= {part.trial.name for part in omission.work.parts}
    assert steps == sorted(steps, reverse=True)
    assert sizes[-1] == (3, 1)
    assert [n for _, n in sizes if n < 3] == [2, 1]
    assert all(settings_ == 3 for settings_, seeds in sizes if seeds < 3)


def test_what_is_left_out_is_listed_by_setting() -> None:
    sweep = pruned_sweep("halving", {"static": {"rates": [0.05, 0.1, 0.25]}}, seeds=[1])
    first = next(iter(fit_budget(sweep, all_trials(sweep))))
    assert first.title == "6 of 9 settings"
    assert first.sentences == [
        "prune: halving is in the file",
        "static: leave out 3 of 9 settings: 10% at peak 0.001, 10% at peak 0.002, "
        "10% at peak 0.004",
    ]


def test_values_that_are_kept_spread_over_all() -> None:
    assert spread([0.4, 0.1, 0.2, 0.3]) == [0.1, 0.4]
    assert spread([1, 2, 3, 4, 5]) == [1, 3, 5]
    assert spread([1, 2]) == [1]
    assert spread(["a", "b", "c"]) == ["a", "c"]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpora"))


def printed(path: Path, **options: Any) -> str:
    console = Console(width=200, record=True, file=StringIO())
    dry_run(path, console, **options)
    return console.export_text()


def test_a_dry_run_counts_steps_and_tokens_and_writes_nothing(
    corpora: Path, tmp_path: Path
) -> None:
    text = printed(write(tmp_path, sweep_settings(corpora)))
    rows = [line.strip("│ ").split("│") for line in text.splitlines() if line.startswith("│")]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    # 6 × 8 samples × 32 tokens
    assert cells["pretrain, of two-phase"] == ["0", "1", "1", "6", "1.54 K"]
    assert cells["static"] == ["1", "1", "0", "10", "2.56 K"]
    assert cells["all"] == ["2", "3", "1", "20", "5.12 K"]
    assert "Add --trial to time a few steps here, or --card" in text
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]


def test_on_a_card_times_are_computed(corpora: Path, tmp_path: Path) -> None:
    content = sweep_settings(corpora, settings={"precision": "bf16"})
    text = printed(write(tmp_path, content), card="h200-sxm", jobs=2, budget=1000.0)
    assert "minutes on H200 SXM, 2 runs at a time, 1 process each." in text
    assert "None of it has been measured." in text
    assert "Budget: 1,000 hours are enough for all runs." in text
    text = printed(write(tmp_path, content), card="h200-sxm", budget=0.0)
    assert "Budget: 0 minutes are too few" in text
    cluster = content | {"slurm": {"nodes": 2, "gpus_per_node": 2, "at_a_time": 3}}
    cluster["run"]["parallel"] = {"tensor": 1, "zero": 1}
    text = printed(write(tmp_path, cluster), card="h200-sxm")
    assert "in rounds, 3 runs at a time, without waiting in the queue, 4 processes each" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trial"], "--trial: is for planning; add --dry-run"),
        (["--budget", "3"], "--budget: is for planning; add --dry-run"),
        (["--slurm", "--dry-run", "--card", "h200-sxm"], "--card: --slurm is also given"),
        (["--dry-run", "--budget", "3"], "--budget: no time is known; add --trial, or --card"),
        (["--dry-run", "--card", "h300"], "--card: no card 'h300' in the table"),
        (["--dry-run", "--card", "l4", "--trial"], "--card: --trial is also given"),
        (["--dry-run", "--card", "l4"], "--card: the table has no peak in fp32"),
    ],
)
def test_wrong_options_are_told_in_one_line(
    corpora: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = run("sweep", write(tmp_path, sweep_settings(corpora)), *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ("thirds", r"prune: must be 'halving', found thirds|prune: .*thirds"),
        ({"at": [0.5, 0.25]}, r"prune\.at: the fractions do not ascend"),
        ({"at": [1.5]}, r"prune\.at"),
        ({"by": "seconds"}, r"prune\.by: must be"),
        ({"at": [0.1]}, r"prune\.at: 0\.1 of the .* before its first validation"),
    ],
)
def test_wrong_rules_of_pruning_are_refused(
    corpora: Path, tmp_path: Path, prune: Any, message: str
) -> None:
    arms = {"static": {"rates": [0.1, 0.2]}}
    path = write(tmp_path, sweep_settings(corpora, prune=prune, arms=arms))
    with pytest.raises(InputError, match=message):
        printed(path)


def test_a_trial_is_a_short_run_of_the_same_sizes(corpora: Path, tmp_path: Path) -> None:
    sweep = load_sweep(write(tmp_path, sweep_settings(corpora)))
    trials = all_trials(sweep)
    costs = timed_costs(sweep, trials, Machine(jobs=1, processes=1, gpus=0))
    assert set(costs) == {shape_of(trial) for trial in trials}
    (found,) = costs.values()
    assert found.step > 0
    assert found.start > 0
    assert found.measuring == 0
    assert not (tmp_path / "out").exists()
    run = trial_run(trials[0].run, tmp_path / "out")
    assert run["phases"][0]["steps"] == STEPS
    assert shape_of(trials[0]) != ""


def test_a_trial_leaves_nothing_where_the_run_does(corpora: Path, tmp_path: Path) -> None:
    content = sweep_settings(corpora)
    content["run"]["checkpoint"] = {"every_steps": 3, "upload": f"file://{tmp_path / 'store'}"}
    content["run"]["logging"] = {"wandb": {"project": "languages"}}
    (trial, *_) = all_trials(load_sweep(write(tmp_path, content)))
    run = trial_run(trial.run, tmp_path / "out")
    assert run["checkpoint"] == {"every_steps": 3}
    assert "logging" not in run
    assert trial.run["checkpoint"]["upload"].startswith("file://")


def test_more_runs_than_there_are_gpus_for_are_refused(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "gpus", lambda: 3)
    path = write(tmp_path, sweep_settings(corpora))
    said = r"--jobs: 2 concurrent runs with --gpus 2 need 4 GPUs, and here are 3; lower --jobs or"
    with pytest.raises(InputError, match=said):
        start.sweep(path, jobs=2, processes=2, retry=False, console=Console(quiet=True))
    with pytest.raises(InputError, match=said):
        printed(path, jobs=2, processes=2, trial=True)
    printed(path, jobs=2, processes=2)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ["0,1", "2,3"]),
        ("4,5, 6,7", ["4,5", "6,7"]),
        ("GPU-a,GPU-b,MIG-c,3", ["GPU-a,GPU-b", "MIG-c,3"]),
    ],
)
def test_runs_take_the_gpus_that_the_user_has(given, expected, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    machine = Machine(jobs=2, processes=2, gpus=4)
    found = [machine.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(2)]
    assert found == expected
