"""The stored index: equal specs give equal bytes; published atomically; one order on any layout."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from plan_support import (
    PLAN_PHASES,
    Documents,
    ReferenceStream,
    as_rows,
    build_plan,
    contents,
    phase,
    random_lengths,
    spec_of,
    write_corpus,
    write_run,
    write_three_tasks,
)

from megaphase.config.run import RunConfig
from megaphase.plan.build import ensure_built, plan_folder
from megaphase.plan.dataset import StepReader, read_step
from megaphase.plan.plan import Plan

SEQ_LEN = 8
FILLER = 59_999


@pytest.fixture
def run(tmp_path) -> tuple[RunConfig, dict[str, Documents]]:
    return write_three_tasks(tmp_path)


def test_the_same_spec_gives_the_same_bytes(run, tmp_path):
    config, _ = run
    first = ensure_built(spec_of(config), tmp_path / "a")
    second = ensure_built(spec_of(config), tmp_path / "b")
    assert first.name == second.name
    assert contents(first) == contents(second)
    assert sorted(contents(first)) == [
        *(f"blend-{p}.{kind}" for p in range(2) for kind in ("counts", "tasks")),
        "index.json",
        "starts",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 8},
        {"model": {"preset": "gpt-5m", "seq_len": 9}},
        {"batch": {"samples": 6}},
        {"phases": [PLAN_PHASES[0], PLAN_PHASES[1] | {"order": "random"}]},
        {"validation": {"fraction": 0.25}},
        {"phases": PLAN_PHASES[:1]},
        {"phases": [PLAN_PHASES[0], PLAN_PHASES[1] | {"steps": 9}]},
        {"phases": [PLAN_PHASES[0], PLAN_PHASES[1] | {"name": "renamed"}]},
        {"phases": [PLAN_PHASES[0], PLAN_PHASES[1] | {"mixture": {"temperature": 3.4}}]},
        {"tasks": {name: {"corpus": name} for name in ("hi", "en", "no")}},
        {"tasks": {"en": {"corpus": "hi"}, "hi": {"corpus": "hi"}, "no": {"corpus": "no"}}},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_whatever_changes_the_plan_changes_its_name(run, tmp_path, changes):
    config, written = run
    changed = write_run(tmp_path, list(written), **({"phases": PLAN_PHASES} | changes))
    assert spec_of(changed).fingerprint != spec_of(config).fingerprint


def test_what_does_not_matter_to_the_plan_keeps_its_name(run, tmp_path):
    config, written = run
    same = write_run(
        tmp_path,
        list(written),
        phases=[PLAN_PHASES[0], PLAN_PHASES[1] | {"learning_rate": {"peak": 0.5}}],
        output="elsewhere",
        batch={"samples": 4, "micro": 2},
        precision="fp32",
    )
    assert spec_of(same).fingerprint == spec_of(config).fingerprint


def test_a_replaced_corpus_is_not_read_through_the_old_index(run, tmp_path):
    config, _ = run
    before = build_plan(config)
    for path in tmp_path.glob("hi.*"):
        path.unlink()
    write_corpus(tmp_path / "hi", random_lengths(30, 30, 99), seed=99)
    after = build_plan(config)
    assert before.spec.fingerprint != after.spec.fingerprint


def expected_samples(config: RunConfig, written: dict[str, Documents], plan: Plan, number: int):
    """Return (task, tokens) of every sample of a phase: blend turns over the reference's
    streams."""
    streams = []
    for i, (name, documents) in enumerate(written.items()):
        used = plan.phases[number].starts[i] + plan.phases[number].counts[i]
        reference = ReferenceStream(name, documents, SEQ_LEN, 0.2)
        streams.append(reference.first(used))
    next_ordinal = list(plan.phases[number].starts)
    samples = plan.phases[number].samples
    for task in plan.samples(number, 0, samples).tasks.tolist():
        yield task, streams[task][next_ordinal[task]]
        next_ordinal[task] += 1


@pytest.mark.parametrize("number", [0, 1])
def test_steps_hold_the_samples_of_the_reference(run, number):
    config, written = run
    plan = build_plan(config)
    rows = [
        row
        for step in range(PLAN_PHASES[number]["steps"])
        for row in as_rows(read_step(plan, number, step, 0, 1, FILLER))
    ]
    expected = []
    for task, tokens in expected_samples(config, written, plan, number):
        missing = SEQ_LEN + 1 - len(tokens)
        inputs = (tokens + [FILLER] * missing)[:SEQ_LEN]
        expected.append((task, *inputs, *tokens[1:], *[-100] * missing))
    assert rows == expected
    assert len(rows) == PLAN_PHASES[number]["steps"] * 4


def test_a_step_is_the_same_for_every_number_of_ranks(run):
    config, _ = run
    plan = build_plan(config)
    for number, step in [(0, 0), (0, 7), (1, 3)]:
        whole = as_rows(read_step(plan, number, step, 0, 1, FILLER))
        for ranks in (2, 4):
            parts = [
                row
                for rank in range(ranks)
                for row in as_rows(read_step(plan, number, step, rank, ranks, FILLER))
            ]
            assert parts == whole
    with pytest.raises(ValueError, match="3 ranks do not divide"):
        read_step(plan, 0, 0, 0, 3, FILLER)
    with pytest.raises(ValueError, match="outside the phase"):
        read_step(plan, 0, 12, 0, 1, FILLER)


def test_random_access_equals_sequential_access(run):
    config, _ = run
    plan = build_plan(config)
    whole = plan.samples(0, 0, 48)
    for first, count in [(0, 48), (47, 1), (13, 9), (0, 0), (20, 28)]:
        part = plan.samples(0, first, count)
        assert np.array_equal(part.tasks, whole.tasks[first : first + count])
        assert np.array_equal(part.ordinals, whole.ordinals[first : first + count])
    sequential = [as_rows(read_step(plan, 0, step, 0, 1, FILLER)) for step in range(12)]
    for step in (11, 0, 5, 5, 3):
        assert as_rows(read_step(plan, 0, step, 0, 1, FILLER)) == sequential[step]


def test_a_step_reader_reads_the_steps(run):
    config, _ = run
    plan = build_plan(config)
    reader = StepReader(plan, 0, rank=1, ranks=2, pad_token_id=FILLER)
    expected = [as_rows(read_step(plan, 0, step, 1, 2, FILLER)) for step in range(12)]
    assert [as_rows(batch) for batch in reader.steps(0, 12)] == expected
    assert [as_rows(batch) for batch in reader.steps(5, 7)] == expected[5:7]
    assert list(reader.steps(3, 3)) == []
    steps = reader.steps(0, 12)
    next(steps)
    steps.close()


def test_a_batch_splits_into_micro_batches(run):
    config, _ = run
    batch = read_step(build_plan(config), 0, 0, 0, 1, FILLER)
    pieces = list(batch.split(2))
    assert [len(piece) for piece in pieces] == [2, 2]
    assert torch.equal(torch.cat([piece.inputs for piece in pieces]), batch.inputs)
    assert [row for piece in pieces for row in as_rows(piece)] == as_rows(batch)


def test_a_branch_shares_its_first_phase(run, tmp_path):
    """Runs that differ in phase 2 only see the same samples in phase 1."""
    config, written = run
    other = write_run(
        tmp_path,
        list(written),
        output="branch",
        phases=[PLAN_PHASES[0], phase("other", 5, {"rates": {"no": 1.0}})],
    )
    plans = build_plan(config), build_plan(other)
    for step in range(12):
        one, two = (as_rows(read_step(plan, 0, step, 0, 1, FILLER)) for plan in plans)
        assert one == two
    assert plans[0].phases[1].starts == plans[1].phases[1].starts == plans[0].phases[0].counts


def test_an_index_may_have_fewer_tasks_than_streams_and_empty_ones(run, tmp_path):
    config, written = run
    plan = build_plan(write_run(tmp_path, list(written)))
    assert plan.phases[0].counts == [40, 0, 0]
    assert plan_folder(config.output, plan.spec).is_dir()


def test_summary_figures(run):
    config, written = run
    plan = build_plan(config)
    summary = plan.summary()
    assert json.loads(json.dumps(summary)) == summary
    assert [summary["seq_len"], summary["samples_per_step"]] == [SEQ_LEN, 4]
    per_epoch = {}
    for name, documents in written.items():
        held_out = documents.held_out(0.2)
        tokens = sum(n for n, held in zip(documents.lengths, held_out, strict=True) if not held)
        per_epoch[name] = -(-(tokens - 1) // SEQ_LEN)
        assert summary["tasks"][name] == {
            "documents": held_out.count(False),
            "tokens": tokens,
            "held_out_documents": held_out.count(True),
            "text_bytes": 3 * tokens,
        }
    one, two = summary["phases"]
    assert [one["name"], one["first_step"], one["steps"], one["samples"]] == ["one", 0, 12, 48]
    assert [two["name"], two["first_step"], two["steps"], two["tokens"]] == ["two", 12, 8, 256]
    assert one["tasks"]["en"]["samples"] == 36
    assert one["tasks"]["en"]["rate"] == one["tasks"]["en"]["requested_rate"] == 0.75
    for name in written:
        first, second = one["tasks"][name], two["tasks"][name]
        assert first["tokens"] == first["samples"] * SEQ_LEN
        assert second["epochs"] == second["samples"] / per_epoch[name]
        together = first["samples"] + second["samples"]
        assert second["epochs_so_far"] == together / per_epoch[name]
    assert sum(facts["samples"] for facts in two["tasks"].values()) == 32


def test_a_role_stands_for_its_tasks(run, tmp_path):
    _, written = run
    tasks = {"en": {"corpus": "en", "role": "high"}}
    tasks |= {name: {"corpus": name, "role": "low"} for name in ("hi", "no")}
    by_role, by_name = (
        build_plan(
            write_run(
                tmp_path,
                list(written),
                tasks=tasks,
                phases=[PLAN_PHASES[0], phase("two", 8, {"temperature": 2, "over": over})],
            )
        )
        for over in ("low", ["hi", "no"])
    )
    assert by_role.spec.fingerprint == by_name.spec.fingerprint
    assert by_role.phases[1].counts[0] == 0
    assert by_role.phases[1].requested_rates == by_name.phases[1].requested_rates
    mixture = {"unimax": True, "max_epochs": 3, "over": "high"}
    high = build_plan(write_run(tmp_path, ["en"], tasks=tasks, phases=[phase("a", 20, mixture)]))
    assert high.phases[0].counts == [80, 0, 0]


def test_a_random_order_reads_the_same_streams(run, tmp_path):
    config, written = run
    phases = [each | {"order": "random"} for each in PLAN_PHASES]
    plan = build_plan(write_run(tmp_path, list(written), phases=phases))
    assert [phase["order"] for phase in plan.summary()["phases"]] == ["random", "random"]
    for number, samples in enumerate((48, 32)):
        planned = plan.samples(number, 0, samples)
        assert plan.phases[number].counts == np.bincount(planned.tasks, minlength=3).tolist()
        rows = [
            row
            for step in range(samples // 4)
            for row in as_rows(read_step(plan, number, step, 0, 1, FILLER))
        ]
        for row, (task, tokens) in zip(
            rows, expected_samples(config, written, plan, number), strict=True
        ):
            assert row[0] == task
            assert list(row[1 : 1 + min(len(tokens), 8)]) == tokens[:8]
