"""`megaphase evaluate` on the test split and on training documents, recomputed in plain torch."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import check, launch
from plain_gpt import PlainGPT, PlainShape
from plan_support import derived_key, member_key, permutation
from rounding import FP32
from run_support import (
    HELD_OUT,
    STEPS,
    copy_run,
    make_corpora,
    megaphase,
    run_settings,
    write_run_file,
)
from warm_commands import run, run_well

from megaphase.checkpoint.parameters import WEIGHT, StoredParameters
from megaphase.checkpoint.state import full_name
from megaphase.convert.source import open_source
from megaphase.corpus import Corpus
from megaphase.plan.dataset import Batch
from megaphase.tokenizer import Tokenizer
from megaphase.training.engine import Engine

TASKS = ("alda", "boreth", "cimri")
TEST, VALIDATION = 0.25, 0.1
SAMPLES, SEQ_LEN = 9, 32


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpora"))


def settings_of(corpora: Path, **changes: Any) -> dict[str, Any]:
    settings = run_settings(corpora, test={"fraction": TEST, "samples": SAMPLES}, **changes)
    settings["phases"][1]["average"] = {"kind": "uniform"}
    return settings


@pytest.fixture(scope="module")
def trained(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run file of a finished run with a test split."""
    run_file = write_run_file(tmp_path_factory.mktemp("trained"), settings_of(corpora))
    run_well("train", run_file)
    return run_file


def evaluated(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run_well("evaluate", *arguments, "--json"))
    return found


def plain_model(checkpoint: str, *, average: bool = False) -> PlainGPT:
    source = open_source(checkpoint, average=average)
    weights = {name: source.weights.whole(name, WEIGHT) for name in source.weights.layouts}
    return PlainGPT(weights, PlainShape(layers=2, heads=4, kv_heads=2))


def first_samples(corpus: Corpus, task: str, split: str, first: float, last: float) -> list[Any]:
    """Return the tokens of the first samples of the documents with hashes in this part of all
    hashes, in the order of seed 0."""
    family = derived_key(0, "documents", split, task)
    joined: list[int] = []
    for document in permutation(len(corpus.lengths), member_key(family, 0)):
        if first <= int(corpus.hashes[document]) / 2**64 < last:
            joined += corpus.document(document).tolist()
    starts = range(0, SAMPLES * SEQ_LEN, SEQ_LEN)
    return [joined[start : start + SEQ_LEN + 1] for start in starts]


def plain_figures(model: PlainGPT, rows: list[Any], tokenizer: Tokenizer) -> list[float]:
    """Return nats a token and bits a byte."""
    tokens = torch.tensor(rows)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    nats = float(model.losses(inputs, targets).sum().detach())
    # A byte of a character that is written as several tokens is one byte.
    texts = [tokenizer.decode([token]) for token in targets.flatten().tolist()]
    size = sum(1 if "\ufffd" in text else len(text.encode()) for text in texts)
    return [nats / targets.numel(), nats / size / math.log(2)]


PARTS = {
    "test": ("test", 1 - TEST, 1.0),
    "training": ("training sample", VALIDATION, 1 - TEST),
    "validation": ("held out", 0.0, VALIDATION),
}


def test_losses_are_those_of_plain_torch(trained: Path, corpora: Path) -> None:
    """The samples are cut anew from the documents that have the right hashes."""
    splits = [word for split in PARTS for word in ("--split", split)]
    found = evaluated(trained.parent / "run@pretrain", *splits, "--samples", SAMPLES)
    assert list(found) == ["step", *PARTS, "samples"]
    assert found["step"] == STEPS[0]
    assert found["samples"] == dict.fromkeys(PARTS, dict.fromkeys(TASKS, SAMPLES))
    tokenizer = Tokenizer.load(corpora / "tok")
    model = plain_model(f"{trained.parent / 'run'}@pretrain")
    for split, (side, first, last) in PARTS.items():
        for task in TASKS:
            corpus = Corpus.open(corpora / "data" / task)
            rows = first_samples(corpus, task, side, first, last)
            loss, bits = plain_figures(model, rows, tokenizer)
            assert found[split][task]["loss"] == pytest.approx(loss, rel=FP32)
            assert found[split][task]["bits_per_byte"] == pytest.approx(bits, rel=FP32)


def test_the_average_is_measured_on_the_test_split(trained: Path, corpora: Path) -> None:
    name = f"{trained.parent / 'run'}@joint"
    found = evaluated(name, "--average", "--split", "test")
    rows = first_samples(Corpus.open(corpora / "data" / "cimri"), "cimri", *PARTS["test"])
    expected = plain_figures(plain_model(name, average=True), rows, Tokenizer.load(corpora / "tok"))
    assert list(found["test"]["cimri"].values()) == pytest.approx(expected, rel=FP32)
    assert found != evaluated(name, "--split", "test")


def fail_to_read() -> None:
    """Prepare a process: rank 1 cannot read what is stored of a parameter."""

    def read(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error", "/nfs/shard-00001.safetensors")

    if os.environ["RANK"] == "1":
        StoredParameters.read = read  # type: ignore[method-assign,assignment]


@pytest.mark.distributed
@pytest.mark.parametrize("zero", [1, 3])
def test_a_checkpoint_that_one_rank_cannot_read_ends_all(trained: Path, zero: int) -> None:
    command = megaphase("evaluate", trained, f"parallel.zero={zero}")
    results = launch(command, 2, prepare=fail_to_read, timeout=200)
    assert [result.returncode for result in results] == [1, 1]
    fault = "/nfs/shard-00001.safetensors: cannot be read or written (Input/output error)"
    assert results[0].stderr == f"megaphase: {fault}\n"


def test_the_layout_does_not_change_the_samples(trained: Path) -> None:
    splits = ["--split", "test", "--split", "training", "--json"]
    one = evaluated(trained, *splits[:4])
    results = launch(megaphase("evaluate", trained, "parallel.tensor=2", *splits), 4)
    check(results)
    four = json.loads(results[0].stdout)
    assert four["samples"] == one["samples"]
    for split in ("test", "training"):
        for task in TASKS:
            expected = pytest.approx(list(one[split][task].values()), rel=FP32)
            assert list(four[split][task].values()) == expected


def test_any_number_of_processes_measures_an_unfinished_run(trained: Path, tmp_path: Path) -> None:
    run_file = copy_run(trained.parent, tmp_path / "unfinished")
    for path in (tmp_path / "unfinished/run/checkpoints").iterdir():
        if path.name != full_name(STEPS[0]):
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
    one = evaluated(run_file)
    results = launch(megaphase("evaluate", run_file, "--json"), 3)  # of a batch of 8
    check(results)
    three = json.loads(results[0].stdout)
    assert three["step"] == one["step"] == STEPS[0]
    for task in TASKS:
        assert three["validation"][task]["loss"] == pytest.approx(
            one["validation"][task]["loss"], rel=FP32
        )


def record_rows(path: Path) -> None:
    """In the process of a command: append the number of rows of every forward pass to a file."""
    evaluate_rows = Engine._evaluate

    def recorded(self: Engine, micro: Batch) -> torch.Tensor:
        with path.open("a") as file:
            file.write(f"{len(micro)}\n")
        return evaluate_rows(self, micro)

    Engine._evaluate = recorded  # type: ignore[method-assign]


@pytest.mark.parametrize(("phase", "micro"), [("pretrain", 2), ("joint", 1)])
def test_the_micro_batch_is_that_of_the_phase(
    trained: Path, tmp_path: Path, phase: str, micro: int
) -> None:
    path = tmp_path / "rows"
    arguments = ("evaluate", trained, "phases.1.batch.micro=1", "--checkpoint", phase)
    run_well(*arguments, prepare=partial(record_rows, path))
    assert HELD_OUT % micro == 0
    assert path.read_text() == f"{micro}\n" * (len(TASKS) * HELD_OUT // micro)


def files_in(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return content and time of change of every file, by its path."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in paths
    }


def test_the_record_of_the_run_is_not_changed(trained: Path, tmp_path: Path) -> None:
    run_file = copy_run(trained.parent, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "run" / "plan")  # which may be built again from the run file
    before = files_in(tmp_path / "copy")
    changes = ("logging.every_steps=3", "checkpoint.keep=9", "phases.1.batch.micro=1")
    found = evaluated(run_file, *changes)
    assert found == evaluated(trained)
    assert files_in(tmp_path / "copy") == before


def test_the_run_file_is_enough_for_a_checkpoint_from_elsewhere(
    corpora: Path, trained: Path, tmp_path: Path
) -> None:
    run_file = write_run_file(tmp_path / "here", settings_of(corpora))
    source = trained.parent / "run"
    assert evaluated(run_file, "--checkpoint", f"{source}@joint") == evaluated(f"{source}@joint")
    assert files_in(tmp_path / "here").keys() == {"run.yaml"}
    for name in ("joint", "latest"):
        refused = run("evaluate", run_file, "--checkpoint", name)
        assert refused.returncode == 2
        assert "checkpoints: there is no checkpoint yet; train first" in refused.stderr


def test_a_refused_measurement_leaves_nothing(corpora: Path, trained: Path, tmp_path: Path) -> None:
    run_file = write_run_file(tmp_path, settings_of(corpora))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    refused = run("evaluate", run_file)
    assert refused.returncode == 2
    assert "checkpoints: there is no whole checkpoint; train first" in refused.stderr
    other = write_run_file(tmp_path, settings_of(corpora, seed=12))
    refused = run("evaluate", other, "--checkpoint", f"{trained.parent / 'run'}@joint")
    assert refused.returncode == 2
    assert "was written with another plan than that of this run file" in refused.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]


def test_the_number_of_samples(trained: Path) -> None:
    options = ["--split", "test", "--samples", 4, "--split", "training", "--samples", 10**6]
    counts = evaluated(trained, *options)["samples"]
    assert counts["test"] == dict.fromkeys(TASKS, 4)
    assert counts["training"]["alda"] > counts["training"]["cimri"] > SAMPLES  # all that there are
    assert "samples" not in evaluated(trained)
    out = trained.parent / "new" / "figures.json"
    text = run_well("evaluate", trained, "--split", "test", "--out", out)
    assert "Losses of the test split at step" in text
    assert json.loads(out.read_text())["samples"] == {"test": dict.fromkeys(TASKS, SAMPLES)}


def test_training_goes_on_with_another_number_of_samples(trained: Path) -> None:
    assert "nothing to do" in run_well("train", trained, "test.samples=3")
    refused = run("train", trained, "test.fraction=0.2")
    assert refused.returncode == 2
    assert "test.fraction: is 0.2, but the run" in refused.stderr


def test_a_run_without_a_test_split_is_as_before_and_says_what_to_add(
    corpora: Path, tmp_path: Path
) -> None:
    run_file = write_run_file(tmp_path, run_settings(corpora))
    run_well("train", run_file)
    refused = run("evaluate", run_file, "--split", "test")
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == [
        f"megaphase: {run_file}: test.fraction: is missing: the run has no test split; add, for "
        "example, test: {fraction: 0.05}; it takes documents from training, so for a new run"
    ]
    other = run("evaluate", run_file, "test.fraction=0.05", "--split", "test")
    assert other.returncode == 2
    assert "test" in other.stderr
    assert len(evaluated(tmp_path / "run", "--split", "training")["training"]) == len(TASKS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}@joint", "--checkpoint", "joint"], "--checkpoint: {run}@joint names one, too;"),
        (
            ["s3://bucket/run@joint"],
            "s3://bucket/run@joint: is in a store, where no run file is; give the run file or the "
            "run directory, and --checkpoint s3://bucket/run@joint",
        ),
        (["nowhere@joint"], "nowhere@joint: there is no run directory nowhere; give a run file"),
        (["{file}", "--split", "test", "--split", "test"], "--split: names a split twice;"),
        (["{file}", "--samples", "1", "--samples", "2"], "--samples: is given 2 times for 1"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(trained: Path, arguments: list[str], message: str) -> None:
    names = {"run": trained.parent / "run", "file": trained}
    refused = run("evaluate", *(each.format(**names) for each in arguments))
    assert refused.returncode == 2
    [line] = refused.stderr.splitlines()
    assert line.startswith(f"megaphase: {message.format(**names)}")
