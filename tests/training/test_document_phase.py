"""A phase whose samples begin where documents begin, between phases with others, in training."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from distributed import check, launch
from rounding import FP32
from run_support import (
    STEPS,
    make_corpora,
    megaphase,
    read_rows,
    run_settings,
    timeless,
    write_run_file,
)
from warm_commands import run_killed, run_well

SWITCH = STEPS[0]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return make_corpora(tmp_path_factory.mktemp("corpora"))


def settings_of(corpora, **changes):
    settings = run_settings(corpora, **changes)
    first, second = settings["phases"]
    long = second | {"name": "long", "cut": "documents", "model": {"seq_len": 48}}
    settings["phases"] = [first, long, second | {"model": {"seq_len": 32}}]
    return settings


@pytest.fixture(scope="module")
def single(corpora, tmp_path_factory):
    """Return the folder of a finished run of one process."""
    folder = tmp_path_factory.mktemp("single")
    run_well("train", write_run_file(folder, settings_of(corpora)))
    return folder


def test_killed_in_every_phase_it_resumes_bit_for_bit(single, corpora, tmp_path):
    run_file = write_run_file(tmp_path, settings_of(corpora))
    for step in (SWITCH + 2, SWITCH + 11):
        run_killed(run_file, before_step=step)
    run_well("train", run_file)
    assert timeless(read_rows(tmp_path / "run")) == timeless(read_rows(single / "run"))


@pytest.mark.parametrize("begin", [1, 2])
def test_a_branch_before_or_after_it_sees_what_the_run_saw(single, corpora, tmp_path, begin):
    settings = settings_of(corpora)
    source = f"{single / 'run'}@{settings['phases'][begin - 1]['name']}"
    settings["phases"] = settings["phases"][begin:]
    run_file = write_run_file(tmp_path, settings)
    run_well("train", run_file, "--from", source)
    names = [phase["name"] for phase in settings["phases"]]
    branched, whole = (
        [row for row in timeless(read_rows(folder / "run")) if row.get("phase") in names
         and row.get("event") not in ("branch", "checkpoint", "best")]
        for folder in (tmp_path, single)
    )  # fmt: skip
    assert branched == whole


def test_trace_shows_documents_from_their_start(single):
    lines = run_well("plan", "trace", single / "run", "--step", SWITCH + 1, "--json")
    samples = [json.loads(line) for line in lines.splitlines()]
    assert len(samples) == 8
    # Pieces that begin within a document are the rests of those that the first phase began.
    starts = [piece["first_token"] for sample in samples for piece in sample["documents"]]
    assert 0 in starts
    assert sum(len(sample["documents"]) > 1 for sample in samples) > 0
    padding = json.loads(run_well("plan", single / "run.yaml", "--json"))["phases"][1]["tasks"]
    assert all(0 <= padding[task]["padding"] < 0.1 for task in ("alda", "boreth"))


def note_files_to_verify(path: Path) -> None:
    """In a run's process: write down the files that are verified in the background, as if all were
    large."""
    from megaphase.plan import built_folder
    from megaphase.plan.background_check import BackgroundCheck

    built_folder.SMALL_BYTES = 0
    add = BackgroundCheck.add

    def noted(check, files):
        path.write_text("\n".join(str(file.path.parent) for file in files))
        add(check, files)

    BackgroundCheck.add = noted


def test_tables_after_an_early_end_are_verified_and_traced(corpora, tmp_path):
    settings = settings_of(corpora)
    settings["phases"][0]["stop"] = {"loss": {"alda": 100}}
    settings["phases"][1]["steps"] = 2
    settings["phases"].pop()
    run_file, found = write_run_file(tmp_path, settings), tmp_path / "found"
    run_well("plan", run_file)
    plans = tmp_path / "run" / "plan"
    planned = set(plans.glob("documents-*"))
    run_well("train", run_file, prepare=partial(note_files_to_verify, found))
    built = set(plans.glob("documents-*"))
    assert built > planned
    assert {str(folder) for folder in built} < set(found.read_text().splitlines())
    # Trace packs what is missing in memory: it writes nothing into the run.
    run, last = tmp_path / "run", read_rows(tmp_path / "run")[-1]["step"]
    traced = run_well("plan", "trace", run, "--step", last, "--json")
    for folder in built - planned:
        shutil.rmtree(folder)
    assert run_well("plan", "trace", run, "--step", last, "--json") == traced
    assert set(plans.glob("documents-*")) == planned


@pytest.mark.slow
def test_layouts_are_equal_over_the_phases(single, corpora, tmp_path):
    parallel = {"tensor": 2, "zero": 3, "sequence": True}
    run_file = write_run_file(tmp_path, settings_of(corpora, parallel=parallel))
    check(launch(megaphase("train", run_file), 4))
    one, four = (timeless(read_rows(folder / "run")) for folder in (single, tmp_path))
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in (one, four)]
    assert losses[0] == pytest.approx(losses[1], rel=FP32)
