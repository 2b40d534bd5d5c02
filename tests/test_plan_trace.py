"""`plan trace` says what a step saw: its documents and offsets give the batch's very tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from plan_support import (
    FakeTokenizer,
    build_plan,
    phase,
    random_lengths,
    write_corpus,
    write_run,
)
from typer.testing import CliRunner

from megaphase.errors import InputError
from megaphase.plan.commands import plan_app
from megaphase.plan.dataset import read_step
from megaphase.plan.plan import Plan
from megaphase.plan.trace import TracedSample, find_step, trace_step
from megaphase.targets import IGNORED_TARGET

FILLER = 59_999
NAMES = ["en", "[hi]", "no"]
PHASES = [
    phase("pretrain", 15, {"rates": {"en": 0.9, "no": 0.1}}),
    phase("joint", 40, {"temperature": 3.3}),
]


class NumberTokenizer(FakeTokenizer):
    """Decodes tokens to their numbers."""

    def decode(self, ids) -> str:
        return " ".join(str(token) for token in ids)


@pytest.fixture
def written(tmp_path) -> dict:
    return {
        name: write_corpus(
            tmp_path / name, random_lengths(40, 30, seed), seed=seed, first_token=9000 * seed
        )
        for seed, name in enumerate(NAMES)
    }


@pytest.fixture
def plan(written, tmp_path) -> Plan:
    return build_plan(write_run(tmp_path, NAMES, phases=PHASES))


def tokens_of(sample: TracedSample, written: dict) -> list[int]:
    tokens = [written[sample.task].tokens(piece.document) for piece in sample.pieces]
    ranges = [slice(piece.first, piece.last) for piece in sample.pieces]
    return [t for each, part in zip(tokens, ranges, strict=True) for t in each[part]]


def test_documents_and_offsets_give_the_tokens_of_the_batch(plan, written):
    for number, steps in enumerate((15, 40)):
        for step in range(steps):
            batch = read_step(plan, number, step, 0, 1, FILLER)
            traced = trace_step(plan, number, step + 1)
            assert [sample.row for sample in traced] == [0, 1, 2, 3]
            for sample, inputs, targets in zip(
                traced, batch.inputs.tolist(), batch.targets.tolist(), strict=True
            ):
                tokens = tokens_of(sample, written)
                assert tokens[:8] == inputs[: len(tokens)]
                assert tokens[1:] == [t for t in targets if t != IGNORED_TARGET]
            tasks = [plan.tasks[task] for task in batch.tasks.tolist()]
            assert [sample.task for sample in traced] == tasks


def test_every_sample_of_an_epoch_is_traced_once(plan):
    seen: dict[str, list[tuple[int, int]]] = {name: [] for name in NAMES}
    ordinals: dict[str, list[int]] = {name: [] for name in NAMES}
    for number, steps in enumerate((15, 40)):
        for step in range(1, steps + 1):
            for sample in trace_step(plan, number, step):
                assert 0 <= sample.number < sample.of
                seen[sample.task].append((sample.epoch, sample.number))
                ordinals[sample.task].append(sample.ordinal)
    for name in NAMES:
        assert len(set(seen[name])) == len(seen[name])
        assert ordinals[name] == list(range(len(ordinals[name])))
        epochs = [epoch for epoch, _ in seen[name]]
        assert epochs == sorted(epochs)


def test_steps_count_from_1_over_the_run(plan):
    assert [find_step(plan, step) for step in (1, 15, 16, 55)] == [(0, 1), (0, 15), (1, 1), (1, 40)]
    for step in (0, -1, 56):
        with pytest.raises(IndexError):
            find_step(plan, step)


@pytest.fixture
def command(written, tmp_path, monkeypatch):
    monkeypatch.setattr("megaphase.tokenizer.Tokenizer.load", lambda directory: NumberTokenizer())
    path = write_run(tmp_path, NAMES, phases=PHASES).path
    return lambda *arguments: CliRunner().invoke(
        plan_app, ["trace", str(path), *(str(each) for each in arguments)]
    )


def test_the_table_names_every_sample(command, plan):
    result = command("--step", 17)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "step 17: step 2 of joint, 4 of 4 samples"
    rows = [line.split() for line in lines[3:] if line.strip()]
    for sample, row in zip(trace_step(plan, 1, 2), rows, strict=True):
        documents = [f"{p.document}[{p.first}:{p.last}]" for p in sample.pieces]
        figures = [str(sample.number), "of", str(sample.of)]
        assert row == [str(sample.row), sample.task, str(sample.epoch), *figures, *documents]


def test_the_text_is_that_of_the_documents(command, plan, written):
    wanted = trace_step(plan, 1, 2)[3]
    result = command("--step", 17, "--row", 3, "--text")
    lines = [line for line in result.stdout.splitlines() if line]
    assert lines[1].startswith(f"row 3: {wanted.task}, epoch {wanted.epoch}, sample ")
    text = [line for line in lines[2:] if not line.startswith("document ")]
    assert " ".join(text).split() == [str(token) for token in tokens_of(wanted, written)]


def test_json_is_one_object_a_sample(command, plan, written):
    result = command("--step", 17, "--json", "--text")
    objects = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(objects) == 4
    for sample, found in zip(trace_step(plan, 1, 2), objects, strict=True):
        texts = [document["text"] for document in found["documents"]]
        assert " ".join(texts).split() == [str(t) for t in tokens_of(sample, written)]
        assert [found["task"], found["ordinal"]] == [sample.task, sample.ordinal]
    plain = json.loads(command("--step", 17, "--json", "--row", 0).stdout)
    assert set(plain["documents"][0]) == {"document", "first_token", "last_token"}


def test_samples_of_one_task(command):
    result = command("--step", 20, "--task", "en", "--json")
    assert {json.loads(line)["task"] for line in result.stdout.splitlines()} <= {"en"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--step", 56), "--step: there is no step 56; give 1 to 55"),
        (("--step", 0), "--step: there is no step 0; give 1 to 55"),
        (("--step", 1, "--row", 4), "--row: a step has no row 4; give 0 to 3"),
        (
            ("--step", 1, "--task", "fr"),
            "--task: run.yaml has no task 'fr'; the tasks are en, [hi], no",
        ),
    ],
)
def test_wrong_arguments_are_named(command, tmp_path, arguments, said):
    result = command(*arguments)
    assert isinstance(result.exception, InputError)
    assert str(result.exception).replace(f"{tmp_path}{Path('/')}", "") == said
