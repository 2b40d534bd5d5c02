"""`plan trace`: the documents and offsets that it shows give exactly the batch's tokens."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
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

from megaphase.corpus import Corpus, CorpusWriter
from megaphase.corpus.batch import batches_of
from megaphase.corpus.origins import Origins
from megaphase.plan.commands import plan_app
from megaphase.plan.dataset import read_step
from megaphase.plan.plan import Plan
from megaphase.plan.trace import TracedSample, find_step, sample_as_json, trace_step
from megaphase.training.run_directory import RunDirectory
from megaphase.utils.errors import InputError
from megaphase.utils.targets import IGNORED_TARGET

FILLER = 59_999
NAMES = ["en", "hi", "no"]
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


def test_steps_count_from_1_over_the_run():
    found = [find_step([15, 40], step) for step in (1, 15, 16, 55)]
    assert found == [(0, 1), (0, 15), (1, 1), (1, 40)]
    assert find_step([15, 0, 40], 16) == (2, 1)
    for step in (0, -1, 56):
        with pytest.raises(IndexError):
            find_step([15, 40], step)


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


def ordinals_of(result) -> list[tuple[str, int]]:
    assert result.exit_code == 0, result.output
    objects = [json.loads(line) for line in result.stdout.splitlines()]
    return [(each["task"], each["ordinal"]) for each in objects]


def metrics_rows(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_phase_that_ended_early_is_where_it_ended(command, plan, tmp_path):
    """What follows it in the plan has the steps, and the samples, that it actually had."""
    metrics = tmp_path / "run" / "metrics.jsonl"
    ended = metrics_rows(
        {"step": 1, "phase": "phase_end", "loss": 2.5},
        {"step": 9, "event": "phase_end", "phase": "pretrain", "reason": "overfit"},
    )
    metrics.write_text(ended + '{"step": 20, "event": "phase_end", "phase": "joi')
    assert command("--step", 9).stdout.startswith("step 9: step 9 of pretrain, ")
    assert command("--step", 10).stdout.startswith("step 10: step 1 of joint, ")
    for joint_step in (1, 2, 40):
        expected = trace_step(plan, 1, joint_step, plan.counts(0, 9))
        found = ordinals_of(command("--step", 9 + joint_step, "--json"))
        assert found == [(sample.task, sample.ordinal) for sample in expected]
    assert str(command("--step", 50).exception) == "--step: there is no step 50; give 1 to 49"
    metrics.write_text(ended + metrics_rows({"step": 20, "event": "phase_end", "phase": "joint"}))
    assert str(command("--step", 21).exception) == "--step: there is no step 21; give 1 to 20"


def test_metrics_of_another_run_are_named(command, plan, tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics_rows({"step": 16, "event": "phase_end", "phase": "pretrain"}))
    assert str(command("--step", 1).exception) == (
        f"{metrics}: pretrain ended with step 16 of the run, but by its plan it has the steps 1 to "
        "15; use the run file with which the run began"
    )


def test_a_branch_counts_on_from_its_base(command, tmp_path):
    (tmp_path / "run").mkdir()
    used = {"en": 30, "no": 2}
    origin = tmp_path / "run" / "origin.json"
    origin.write_text(json.dumps({"step": 100, "used": used, "base": "elsewhere"}))
    branch = build_plan(write_run(tmp_path, NAMES, phases=PHASES), used)
    expected = trace_step(branch, 0, 3)
    found = ordinals_of(command("--step", 103, "--json"))
    assert found == [(sample.task, sample.ordinal) for sample in expected]
    assert min(ordinal for task, ordinal in found if task == "en") >= 30
    for step in (100, 156):
        said = f"--step: there is no step {step}; give 101 to 155"
        assert str(command("--step", step).exception) == said
    for damaged in ("[]", "{", '{"step": 1}', '{"step": 1, "used": [1]}'):
        origin.write_text(damaged)
        assert str(command("--step", 103).exception) == (
            f"{origin}: is damaged or cannot be read; restore it or branch into another output"
        )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--step", 56), "--step: there is no step 56; give 1 to 55"),
        (("--step", 1, "--row", 4), "--row: a step has no row 4; give 0 to 3"),
        (
            ("--step", 1, "--task", "fr"),
            "--task: run.yaml has no task 'fr'; the tasks are en, hi, no",
        ),
    ],
)
def test_wrong_arguments_are_named(command, tmp_path, arguments, said):
    result = command(*arguments)
    assert isinstance(result.exception, InputError)
    assert str(result.exception).replace(f"{tmp_path}{Path('/')}", "") == said


@pytest.fixture
def trained(written, tmp_path, monkeypatch):
    """Make a run that has started, with its files; return its directory."""
    monkeypatch.setattr("megaphase.tokenizer.Tokenizer.load", lambda directory: NumberTokenizer())
    config = write_run(tmp_path, NAMES, phases=PHASES)
    RunDirectory(config.output).claim(config, build_plan(config).summary())
    rows = [{"step": step, "phase": "pretrain", "loss": 1.0} for step in range(1, 12)]
    skipped = {"step": 7, "event": "step_skipped", "phase": "pretrain", "tasks": [], "trace": ""}
    lines = [json.dumps(row) + "\n" for row in (*rows, skipped)]
    (config.output / "metrics.jsonl").write_text("".join(lines))
    return config.output


def trace(*arguments):
    return CliRunner().invoke(plan_app, ["trace", *(str(each) for each in arguments)])


def files_below(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_run_directory_is_traced_as_its_run_file_is(trained, plan, tmp_path):
    before = files_below(trained)
    for step in (3, 17):
        by_file = trace(tmp_path / "run.yaml", "--step", step)
        moved = trace(trained, "--step", step)
        assert by_file.exit_code == moved.exit_code == 0
        assert by_file.output == moved.output
    assert files_below(trained) == before
    # Its current location, not the one where it started.
    elsewhere = tmp_path / "moved"
    trained.rename(elsewhere)
    assert trace(elsewhere, "--step", 3, "--json").stdout == "".join(
        json.dumps(sample_as_json(sample, None), ensure_ascii=False) + "\n"
        for sample in trace_step(plan, 0, 3)
    )
    assert not trained.exists()


def test_steps_that_were_skipped_or_not_trained_are_called_so(trained):
    assert trace(trained, "--step", 6).stderr == ""
    assert trace(trained, "--step", 7).stderr == (
        "step 7 was skipped: its gradient was not finite, it changed nothing\n"
    )
    assert trace(trained, "--step", 12).stderr == (
        "step 12 has not been trained yet: 11 steps are done\n"
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=8", "seed: is 8, but the run in {run} began with 7"),
        ("phases.0.steps=14", "phases[0].steps: is 14, but the run in {run} began with 15"),
    ],
)
def test_another_run_file_than_that_of_the_run_is_refused(trained, tmp_path, override, said):
    before = files_below(trained)
    for run in (tmp_path / "run.yaml", trained):
        result = trace(run, override, "--step", 3)
        assert isinstance(result.exception, InputError)
        assert said.format(run=trained) in str(result.exception)
    assert files_below(trained) == before


def test_other_corpora_than_those_of_the_run_are_refused(trained, tmp_path):
    before = files_below(trained)
    write_corpus(tmp_path / "new" / "no", random_lengths(9, 30, 1), seed=9)
    result = trace(trained, f"tasks.no.corpus={tmp_path / 'new' / 'no'}", "--step", 3)
    assert isinstance(result.exception, InputError)
    assert "the corpora are not those with which the run" in str(result.exception)
    assert files_below(trained) == before


@pytest.mark.parametrize("harm", [shutil.rmtree, lambda folder: (folder / "starts").unlink()])
def test_an_index_that_is_lost_is_built_in_a_temporary_folder(trained, harm, tmp_path, monkeypatch):
    whole = trace(trained, "--step", 20).stdout
    [folder] = (trained / "plan").iterdir()
    harm(folder)
    before = files_below(trained)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    found = trace(trained, "--step", 20)
    assert found.stdout == whole
    assert "the same index is built in a temporary folder" in found.stderr
    assert files_below(trained) == before
    assert not list(scratch.iterdir())


def test_what_nobody_has_trained_is_called_so(command):
    said = command("--step", 3).stderr
    assert "no run has been trained in" in said


def test_what_is_no_run_directory_is_named(tmp_path):
    result = trace(tmp_path, "--step", 3)
    assert isinstance(result.exception, InputError)
    assert "is not a run directory: it has no run.json" in str(result.exception)


def test_ids_and_files_of_documents_are_shown(command, plan, tmp_path):
    for number, name in enumerate(NAMES[:2]):
        give_origins(tmp_path / name, f"{name}.jsonl", number)
    samples = trace_step(plan, 1, 2)
    shown = [json.loads(line) for line in command("--step", 17, "--json").stdout.splitlines()]
    for sample, each in zip(samples, shown, strict=True):
        for piece, document in zip(sample.pieces, each["documents"], strict=True):
            expected = {
                "document": piece.document,
                "first_token": piece.first,
                "last_token": piece.last,
            }
            if sample.task != "no":
                expected["source"] = f"{sample.task}.jsonl"
                if piece.document % 3:
                    expected["id"] = f"{sample.task}/{piece.document}"
            assert document == expected
    assert {sample.task for sample in samples} > {"no"}
    table, text = command("--step", 17).stdout, command("--step", 17, "--text").stdout
    for sample in samples:
        for piece in sample.pieces:
            words = f"{sample.task}/{piece.document} in " if piece.document % 3 else ""
            words += f"{sample.task}.jsonl"
            heading = f"document {piece.document} ({words}), tokens {piece.first}"
            assert (heading in text) == (sample.task != "no")
    assert ".jsonl" in table


def give_origins(prefix, source, number):
    """Write a corpus again with the origins of its documents."""
    corpus = Corpus.open(prefix)
    manifest = corpus.manifest
    ids = [f"{prefix.name}/{i}".encode() if i % 3 else b"" for i in range(manifest.documents)]
    batches = list(batches_of(corpus))
    origins = Origins.of(ids, number)
    with CorpusWriter(
        prefix,
        tokenizer_hash=manifest.tokenizer_hash,
        vocab_size=manifest.vocab_size,
        eod=manifest.eod,
        sources=["other"] * number + [source],
        with_origins=True,
        overwrite=True,
    ) as writer:
        [batch] = batches
        writer.add_batch(replace(batch, origins=origins))
