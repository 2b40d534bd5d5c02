"""Phases measured in epochs of a task, phases that end early, and branches of a run."""

from __future__ import annotations

import json
import re
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plan_support import (
    as_rows,
    build_plan,
    contents,
    phase,
    random_lengths,
    spec_of,
    write_corpus,
    write_run,
)
from translation_support import random_pairs, write_pairs

from megaphase.config.run import RunConfig
from megaphase.plan.build import ensure_built
from megaphase.plan.dataset import StepReader, read_step
from megaphase.plan.index import block_size
from megaphase.plan.plan import Plan
from megaphase.utils.errors import InputError

FILLER = 59_999
NAMES = ["en", "hi", "pair"]
TASKS = {
    "en": {"corpus": "en"},
    "hi": {"corpus": "hi"},
    "pair": {"corpus": "pair", "kind": "translation"},
}
ONE = phase("one", 30, {"rates": {"en": 0.6, "hi": 0.1, "pair": 0.3}})
TWO = phase("two", 45, {"rates": {"en": 0.2, "hi": 0.5, "pair": 0.3}})


@pytest.fixture
def folder(tmp_path) -> Path:
    """Epochs of a few dozen samples, so that the phases above have several."""
    for seed, (name, documents) in enumerate([("en", 14), ("hi", 9)]):
        write_corpus(tmp_path / name, random_lengths(documents, 30, seed), seed=seed)
    write_pairs(tmp_path / "pair", random_pairs(30, 5, 1), seed=1, first_token=20_000)
    return tmp_path


def run(folder: Path, phases: list[dict[str, Any]], **changes: Any) -> RunConfig:
    return write_run(folder, NAMES, **{"tasks": TASKS, "phases": phases} | changes)


def epochs_phase(epochs: dict[str, float], mixture: dict[str, Any]) -> dict[str, Any]:
    facts = phase("joint", 1, mixture)
    del facts["steps"]
    return facts | {"epochs": epochs}


def rows_of(plan: Plan, number: int, steps: int, starts: np.ndarray | None = None) -> list[tuple]:
    return [
        row
        for step in range(steps)
        for row in as_rows(read_step(plan, number, step, 0, 1, FILLER, starts))
    ]


@pytest.mark.parametrize("epochs", [{"hi": 4}, {"en": 0.35}, {"en": 1.5, "hi": 2}, {"pair": 1}])
@pytest.mark.parametrize("mixture", [ONE["mixture"], {"temperature": 3.3}, {"proportional": True}])
def test_a_phase_is_as_long_as_the_epochs_of_its_first_task(folder, epochs, mixture):
    """The first phase's use of the tasks does not count."""
    plan = build_plan(run(folder, [ONE, epochs_phase(epochs, mixture)]))
    streams = plan.spec.streams
    wanted = {task: ceil(e * streams[task].samples_per_epoch) for task, e in epochs.items()}
    drawn = [plan.tasks[task] for task in plan.samples(1, 0, plan.phases[1].samples).tasks]

    def reached(steps: int, slack: int = 0) -> bool:
        counts = {task: drawn[: 4 * steps].count(task) for task in wanted}
        return any(counts[task] >= wanted[task] + slack for task in wanted)

    assert reached(plan.phases[1].steps)
    # With one step less it is short, except for the one sample that the blend may be ahead.
    assert not reached(plan.phases[1].steps - 1, slack=1)


def test_whole_epochs_of_a_lone_task_are_exact(folder):
    config = run(folder, [epochs_phase({"hi": 3}, {"rates": {"hi": 1.0}})], batch={"samples": 1})
    stream = spec_of(config).streams["hi"]
    assert spec_of(config).phases[0].steps == 3 * stream.samples_per_epoch
    facts = build_plan(config).summary()["phases"][0]["tasks"]["hi"]
    assert facts["epochs"] == 3


@pytest.mark.parametrize("own", [{"model": {"seq_len": 5}}, {"cut": "documents"}])
def test_epochs_count_whole_ones_of_the_phases_own_samples(folder, own):
    """Also where the phase begins in the middle of an epoch."""
    lone = {"rates": {"hi": 1.0}}
    phases = [phase("before", 3, lone), epochs_phase({"hi": 2}, lone) | own]
    spec = spec_of(run(folder, phases, batch={"samples": 1}))
    before, joint = spec.phases
    assert joint.kind != before.kind
    assert joint.steps == 2 * spec.task_streams["hi"].at(joint.kind).samples_per_epoch


def test_epochs_of_a_task_that_is_never_seen(folder):
    config = run(folder, [ONE, epochs_phase({"en": 1, "hi": 2}, {"rates": {"en": 1.0}})])
    with pytest.raises(InputError) as error:
        build_plan(config)
    assert str(error.value) == (
        f"{config.path}: phases[1].epochs.hi: joint never sees hi, whose rate is 0; give it a "
        "rate in the mixture, or leave it out here"
    )
    assert not config.output.exists()


def test_epochs_of_a_task_whose_rate_is_almost_zero(folder):
    config = run(folder, [ONE, epochs_phase({"hi": 1}, {"temperature": 0.01})])
    with pytest.raises(InputError) as error:
        build_plan(config)
    told = re.sub(r"[0-9.]+e-[0-9]+", "RATE", str(error.value))
    assert told == (
        f"{config.path}: phases[1].epochs.hi: joint would have more than 281,474,976,710,656 "
        "samples, as the rate of hi is RATE; raise that rate in the mixture, or ask for fewer "
        "epochs"
    )


def test_epochs_beyond_all_bounds(folder):
    with pytest.raises(InputError, match=r"phases\[0\].epochs.hi: must be at most 1e\+06"):
        run(folder, [epochs_phase({"hi": 1e18}, {"rates": {"hi": 1.0}})])


def test_counts_are_those_of_the_samples(folder):
    long = phase("long", 700, {"rates": {"en": 0.5, "hi": 0.1, "pair": 0.4}})
    plan = build_plan(run(folder, [ONE, long]))
    assert plan.phases[1].samples > 2 * block_size(3)
    tasks = plan.samples(1, 0, 2800).tasks
    for steps in (0, 1, 255, 256, 257, 512, 699, 700):
        found = plan.counts(1, steps)
        assert found.dtype == np.int64
        assert found.tolist() == [tasks[: 4 * steps].tolist().count(task) for task in range(3)]
    for steps in (-1, 701):
        with pytest.raises(ValueError, match=f"long has no {steps} steps"):
            plan.counts(1, steps)


def test_counts_at_the_end_of_a_whole_block(folder):
    plan = build_plan(run(folder, [ONE | {"steps": block_size(3) // 4}]))
    assert plan.counts(0, block_size(3) // 4).tolist() == plan.phases[0].counts


@pytest.mark.parametrize("order", ["balanced", "random"])
@pytest.mark.parametrize("cut", [0, 1, 13, 30])
def test_streams_go_on_where_a_phase_was_cut(folder, order, cut):
    planned = build_plan(run(folder, [ONE, TWO | {"order": order}]))
    starts = planned.counts(0, cut)
    shorter = [ONE | {"steps": cut}] if cut else []
    reference = build_plan(run(folder, [*shorter, TWO | {"order": order}], output="reference"))
    assert starts.tolist() == reference.phases[-1].starts
    last = len(reference.phases) - 1
    assert rows_of(planned, 1, 45, starts) == rows_of(reference, last, 45)
    reader = StepReader(planned, 1, rank=1, ranks=2, pad_token_id=FILLER, starts=starts)
    read = [as_rows(batch) for batch in reader.steps(3, 9)]
    assert read == [as_rows(read_step(reference, last, s, 1, 2, FILLER)) for s in range(3, 9)]


def test_streams_go_on_after_several_phases_that_were_cut(folder):
    phases = [ONE, TWO, phase("three", 20, {"temperature": 2})]
    planned = build_plan(run(folder, phases))
    starts = planned.first_ordinals([7, 11])
    assert starts.tolist() == (planned.counts(0, 7) + planned.counts(1, 11)).tolist()
    assert planned.first_ordinals([]).tolist() == [0, 0, 0]
    assert planned.first_ordinals([30, 45]).tolist() == planned.phases[2].starts
    shorter = [ONE | {"steps": 7}, TWO | {"steps": 11}, phases[2]]
    reference = build_plan(run(folder, shorter, output="reference"))
    assert rows_of(planned, 2, 20, starts) == rows_of(reference, 2, 20)


def test_streams_begin_where_the_index_has_them(folder):
    plan = build_plan(run(folder, [ONE, TWO]), {"en": 5})
    planned = np.array(plan.phases[1].starts)
    for change in ([1, 0, 0], [-planned[0] + 4, 0, 0]):
        with pytest.raises(ValueError, match="two cannot begin at ordinals"):
            plan.samples(1, 0, 4, planned + change)
    assert len(plan.samples(1, 0, 4, np.array([5, 0, 0])).tasks) == 4


@pytest.mark.parametrize("cut", [3, 30])
def test_a_branch_reads_on_as_the_run_would_have(folder, cut):
    base = build_plan(run(folder, [ONE | {"steps": cut}, TWO]))
    used = dict(zip(NAMES, base.counts(0, cut).tolist(), strict=True))
    branch = build_plan(run(folder, [TWO], output="branch"), used)
    assert branch.spec.used == used
    assert branch.phases[0].starts == list(used.values())
    assert rows_of(branch, 0, 45) == rows_of(base, 1, 45)
    one, two = base.summary()["phases"][1], branch.summary()["phases"][0]
    assert one["tasks"] == two["tasks"]


def test_a_branch_counts_what_was_used_before_against_max_epochs(folder):
    capped = phase("joint", 20, {"rates": {"en": 0.5, "hi": 0.5}, "max_epochs": 5})
    config = run(folder, [capped])
    per_epoch = spec_of(config).streams["hi"].samples_per_epoch
    plan = build_plan(config, {"hi": 4 * per_epoch})
    facts = plan.summary()["phases"][0]["tasks"]["hi"]
    assert [facts["samples"], facts["epochs"], facts["epochs_so_far"]] == [per_epoch, 1, 5]


def test_a_branch_indexes_only_the_epochs_that_it_needs(folder):
    config = run(folder, [TWO])
    per_epoch = {task: s.samples_per_epoch for task, s in spec_of(config).streams.items()}
    used = {"en": 3 * per_epoch["en"] + 1, "hi": 0, "pair": 2 * per_epoch["pair"] + 1}
    spec = spec_of(config, used)
    index = ensure_built(spec, config.output)
    whole = contents(index)
    header = json.loads(whole["index.json"])
    [first, samples], written = header["starts"][0], header["files"]["starts"]["pieces"]
    assert samples > 3 * per_epoch["en"]
    assert written[0][:2] == [first + 8 * 3 * per_epoch["en"], 8 * (samples - 3 * per_epoch["en"])]
    assert not any(whole["starts"][first : written[0][0]])
    assert ensure_built(spec, config.output, say=pytest.fail) == index


def test_a_task_of_which_a_branch_needs_no_more_has_no_index(folder):
    config = run(folder, [phase("joint", 5, {"rates": {"hi": 1.0}})])
    plan = build_plan(config, {"en": 1000, "hi": 3})
    starts = json.loads((plan.folder / "index.json").read_text())["starts"]
    assert [samples > 0 for _, samples in starts] == [False, True, False]
    assert rows_of(plan, 0, 5)


def test_what_was_used_names_the_plan(folder):
    config = run(folder, [TWO])
    plain = spec_of(config)
    assert plain.used == {"en": 0, "hi": 0, "pair": 0}
    for nothing in ({}, {"en": 0}, {"fr": 7}):
        assert spec_of(config, nothing).fingerprint == plain.fingerprint
    others = [spec_of(config, used).fingerprint for used in ({"en": 1}, {"hi": 1}, {"en": 2})]
    assert len({plain.fingerprint, *others}) == 4


@pytest.mark.parametrize(
    ("changes", "changed"),
    [
        ({"phases": [TWO], "batch": {"samples": 6}}, []),
        ({"tasks": {name: TASKS[name] for name in ("pair", "en", "hi")}}, []),
        ({"seed": 8}, NAMES),
        ({"model": {"preset": "gpt-5m", "seq_len": 9}}, NAMES),
        ({"validation": {"fraction": 0.25}}, NAMES),
        ({"tasks": TASKS | {"hi": {"corpus": "en"}}}, ["hi"]),
        ({"tasks": TASKS | {"en": {"corpus": "en", "attend_across_documents": False}}}, ["en"]),
    ],
    ids=lambda value: "-".join(value),
)
def test_streams_are_told_apart_by_what_their_samples_depend_on(folder, changes, changed):
    known = spec_of(run(folder, [ONE])).stream_fingerprints
    found = spec_of(run(folder, **{"phases": [ONE]} | changes)).stream_fingerprints
    assert len(set(known.values())) == 3
    assert sorted(task for task in known if known[task] != found[task]) == sorted(changed)
