"""Whole runs on a text task and a translation task: losses, layouts, resume, and their output."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from distributed import check, launch, run_ranks
from engine_support import TASKS, build_engine, global_batch, model_weights, share
from engine_support import run_config as engine_config
from plan_support import read_held_out
from rounding import FP32, approx_validation
from run_support import (
    make_corpora,
    megaphase,
    read_rows,
    run_settings,
    timeless,
    without_gap,
    write_run_file,
)
from translation_support import random_hashes, write_documents

from megaphase.config.load import load_run_file
from megaphase.distributed.all_ranks import process_group
from megaphase.plan.dataset import Batch
from megaphase.plan.spec import plan_spec
from megaphase.tokenizer import Tokenizer
from megaphase.utils.targets import IGNORED_TARGET

PAIR_TASK = "alda-boreth"
STEPS = 10  # of each of two phases
PAIRS = 400


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    """Make the corpora of three languages, and pairs of sentences from two of them."""
    folder = make_corpora(tmp_path_factory.mktemp("corpora"))
    tokenizer = Tokenizer.load(folder / "tok")
    sources, targets = (sentences(folder / "text" / f"{name}.jsonl") for name in ("alda", "boreth"))
    tag = tokenizer.reserved_tags[0]
    documents = [
        [*tokenizer.encode(source), tag, *tokenizer.encode(target), tokenizer.eod]
        for source, target in zip(sources, targets, strict=False)
    ]
    write_documents(
        folder / "data" / PAIR_TASK,
        documents,
        random_hashes(len(documents), 6),
        tag=tag,
        tokenizer_hash=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
    )
    return folder


def sentences(path: Path) -> list[str]:
    """Return short sentences, so that several pairs fit into a sample."""
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    words = " ".join(texts).split()
    return [" ".join(words[i : i + 1 + i % 3]) for i in range(0, 2 * PAIRS, 2)]


def settings_of(corpora: Path, **changes: Any) -> dict[str, Any]:
    settings = run_settings(corpora, **changes)
    settings["tasks"][PAIR_TASK] = {
        "kind": "translation", "corpus": str(corpora / "data" / PAIR_TASK),
    }  # fmt: skip
    mixtures = [{"rates": {"alda": 0.5, PAIR_TASK: 0.5}}, {"temperature": 3.0}]
    for phase, mixture in zip(settings["phases"], mixtures, strict=True):
        phase |= {"steps": STEPS, "mixture": mixture}
    return settings


def train(run_file: Path, processes: int = 1) -> str:
    results = launch(megaphase("train", run_file), processes)
    check(results)
    return results[0].stdout


@pytest.fixture(scope="module")
def single(corpora, tmp_path_factory) -> Path:
    """Return the folder of a finished run of one process."""
    folder = tmp_path_factory.mktemp("single") / "a"
    train(write_run_file(folder, settings_of(corpora)))
    return folder


def test_pairs_are_learned_beside_texts(single):
    rows = [row for row in read_rows(single / "run") if "loss" in row]
    assert len(rows) == 2 * STEPS
    assert all({"alda", PAIR_TASK} == row["loss_by_task"].keys() for row in rows[:STEPS])
    first, *_, last = (
        row["validation"] for row in read_rows(single / "run") if "validation" in row
    )
    assert first[PAIR_TASK]["loss"] == pytest.approx(math.log(500), rel=0.01)
    assert all(last[task]["loss"] < first[task]["loss"] for task in first)


def test_bits_per_byte_are_those_of_the_targets(single):
    """Compared with a count that decodes the targets of the pairs that are scored."""
    config = load_run_file(single / "run.yaml")
    tokenizer = Tokenizer.load(config.tokenizer)
    stream = plan_spec(config, tokenizer).held_out[PAIR_TASK]
    held_out = read_held_out(stream, 0, config.validation.samples, tokenizer.eod)
    assert held_out.documents is not None
    scored, scored_bytes = 0, 0
    for start in stream.first_starts(len(held_out)).tolist():
        for document, _, _ in stream.pieces(0, *start):
            tokens = stream.corpus.document(document).tolist()
            target = tokens[tokens.index(stream.corpus.manifest.tag) + 1 :]
            scored += len(target)
            scored_bytes += len(tokenizer.decode(target).encode())
    assert scored == int((held_out.targets != IGNORED_TARGET).sum())
    last = [row for row in read_rows(single / "run") if "validation" in row][-1]["validation"]
    expected = last[PAIR_TASK]["loss"] * scored / scored_bytes / math.log(2)
    assert last[PAIR_TASK]["bits_per_byte"] == pytest.approx(expected)


def test_losses_do_not_depend_on_the_layout(single, corpora, tmp_path):
    """Two data-parallel ranks: one evaluates a batch that is padded with empty rows."""
    train(write_run_file(tmp_path, settings_of(corpora, parallel={"zero": 3})), 2)
    one, two = timeless(read_rows(single / "run")), timeless(read_rows(tmp_path / "run"))
    for a, b in zip(one, two, strict=True):
        if "loss" in a:
            assert a["loss_by_task"] == pytest.approx(b["loss_by_task"], rel=FP32)
        for task, figures in a.get("validation", {}).items():
            assert figures == approx_validation(b["validation"][task], FP32)


def test_a_run_goes_on_bit_for_bit(single, tmp_path):
    folder = shutil.copytree(single, tmp_path / "again")
    checkpoints = sorted((folder / "run" / "checkpoints").iterdir())
    shutil.rmtree(checkpoints[-1])
    shutil.rmtree(checkpoints[-2])
    assert "resuming from" in train(folder / "run.yaml")
    assert timeless(read_rows(folder / "run")) == timeless(read_rows(single / "run"))


def said(*arguments: object) -> str:
    results = launch(megaphase(*arguments), 1)
    check(results)
    return results[0].stdout


def test_every_command_knows_pairs(single, tmp_path):
    run_file = single / "run.yaml"
    last = [row for row in read_rows(single / "run") if "validation" in row][-1]
    found = json.loads(said("evaluate", run_file, "--json"))
    assert found["validation"] == {t: without_gap(each) for t, each in last["validation"].items()}
    assert PAIR_TASK in said("plan", run_file)
    traced = said("plan", "trace", run_file, "--step", "1", "--task", PAIR_TASK, "--json", "--text")
    samples = [json.loads(line) for line in traced.splitlines()]
    assert len(samples) == 4
    assert max(len(sample["documents"]) for sample in samples) > 1
    assert all(each["first_token"] == 0 for sample in samples for each in sample["documents"][1:])
    assert any(" → " in each["text"] for sample in samples for each in sample["documents"])
    said("report", single / "run", "--out", tmp_path / "report")
    assert any(PAIR_TASK in p.read_text() for p in (tmp_path / "report").rglob("*.csv"))


def train_with_a_step_without_targets(
    zero: int,
) -> tuple[list[tuple[float, float]], float, bool]:
    """Return losses and gradient norms of three steps, the second without any target; the held-out
    loss of a batch without any; whether all weights are numbers."""
    engine = build_engine(engine_config(zero=zero))
    steps = []
    for step in range(3):
        batch = global_batch(step, packed=True)
        if step == 1:
            batch.targets.fill_(IGNORED_TARGET)
        result = engine.train_step(share(batch, engine.grid), 1e-2)
        steps.append((result.losses.mean, result.grad_norm))
    nothing = Batch(batch.inputs, batch.targets * 0 + IGNORED_TARGET, batch.tasks)
    found = engine.evaluate(share(nothing, engine.grid))
    assert found.by_task(TASKS) == {}
    finite = all(bool(each.isfinite().all()) for each in model_weights(engine).values())
    return steps, found.mean, finite


def train_with_every_zero() -> list[tuple[list[tuple[float, float]], float, bool]]:
    """Run on a rank."""
    with process_group():
        return [train_with_a_step_without_targets(zero) for zero in (0, 1, 3)]


@pytest.mark.distributed
def test_a_step_without_any_target_changes_no_number_to_nan():
    for of_rank in run_ranks(train_with_every_zero, 2):
        for steps, held_out, finite in of_rank:
            assert [loss > 0 for loss, _ in steps] == [True, False, True]
            assert all(math.isfinite(norm) for _, norm in steps)
            assert steps[1] == (0, 0)
            assert held_out == 0
            assert finite
