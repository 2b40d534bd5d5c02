"""Benchmarks on a checkpoint against `lm_eval --model hf` on the exported model."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from distributed import check, launch
from harness_support import (
    CHOICE,
    DOCUMENTS,
    LETTERS,
    PERPLEXITY,
    TASKS,
    TEXT,
    results_of,
    results_of_transformers,
    write_tasks,
)
from hf_support import export
from run_support import (
    STEPS,
    make_corpora,
    megaphase,
    read_rows,
    run_settings,
    timeless,
    write_run_file,
)
from warm_commands import run, run_well

from megaphase.convert.source import open_source
from megaphase.distributed.all_ranks import process_group
from megaphase.distributed.control_group import ControlGroup
from megaphase.distributed.process_grid import start_process_grid
from megaphase.generation.model import load_model
from megaphase.harness.benchmarks import BenchmarkChoice, Benchmarks, require_harness
from megaphase.harness.language_model import ServedModel
from megaphase.harness.rank_model import RankModel
from megaphase.harness.service import ComputingError, ModelService
from megaphase.report.benchmarks import benchmark_table
from megaphase.report.load_run import load_run
from megaphase.report.numbers import write_numbers
from megaphase.tokenizer import Tokenizer
from megaphase.training.trainer import Trainer
from megaphase.utils.errors import InputError, RunError

# Of the figures, as the exported model's.
CLOSE = 1e-4
GROUPS = {"alda": ["tiny_ch*"], "all": [CHOICE, LETTERS]}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def tasks(corpora: Path) -> Path:
    lines = (corpora / "text" / "alda.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    return write_tasks(corpora / "tasks", [text for text in texts if len(text.split()) > 40])


@pytest.fixture(scope="module")
def trained(corpora: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run file of a finished run with benchmarks."""
    harness = {"tasks": list(TASKS), "tasks_path": str(tasks), "every_steps": 7, "groups": GROUPS}
    settings = run_settings(corpora)
    settings["validation"]["harness"] = harness
    run_file = write_run_file(tmp_path_factory.mktemp("trained"), settings)
    run_well("train", run_file)
    return run_file


@pytest.fixture(scope="module")
def exported(trained: Path, corpora: Path) -> Path:
    name = f"{trained.parent / 'run'}@joint"
    return export(open_source(name).folder, trained.parent / "exported", corpora / "tok")


@contextmanager
def served(checkpoint: str, tok: Path) -> Iterator[ServedModel]:
    with process_group():
        grid = start_process_grid(1)
        gpt = load_model(open_source(checkpoint), None, grid=grid)
        yield ServedModel(
            ModelService(RankModel(gpt, grid), Tokenizer.load(tok), ControlGroup(), batch=2)
        )


def evaluated(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run_well("evaluate", *arguments, "--json"))
    return found


@pytest.mark.parametrize("shots", [0, 2])
def test_requests_have_the_answers_of_the_exported_model(
    trained: Path, exported: Path, corpora: Path, tasks: Path, shots: int
) -> None:
    expected = results_of_transformers(exported, tasks, num_fewshot=shots)
    with served(f"{trained.parent / 'run'}@joint", corpora / "tok") as model:
        found = results_of(model, tasks, num_fewshot=shots)
    for task in TASKS:
        assert len(found["samples"][task]) == DOCUMENTS
        for own, other in zip(found["samples"][task], expected["samples"][task], strict=True):
            if task == TEXT:
                assert own["resps"] == other["resps"]
            elif task == PERPLEXITY:
                assert own["resps"][0] == pytest.approx(other["resps"][0], abs=CLOSE, rel=1e-6)
            else:
                for mine, theirs in zip(own["resps"], other["resps"], strict=True):
                    assert mine[0][0] == pytest.approx(theirs[0][0], abs=CLOSE)
                    assert mine[0][1] == theirs[0][1]
        for metric, value in expected["results"][task].items():
            if isinstance(value, float):
                assert found["results"][task][metric] == pytest.approx(value, rel=CLOSE)


@pytest.mark.slow
def test_the_command_gives_the_figures_of_the_exported_model(
    trained: Path, exported: Path, tasks: Path
) -> None:
    expected = results_of_transformers(exported, tasks, limit=5)
    out = trained.parent / "figures.json"
    found = evaluated(
        *(trained.parent / "run@joint", "--harness", "tiny_choice,tiny_text", "--harness"),
        *("tiny_[lp]*", "--tasks-path", tasks, "--limit", 5, "--out", out, "--batch", 3),
    )
    assert json.loads(out.read_text()) == found
    assert found["step"] == sum(STEPS)
    assert set(found["tasks"]) == set(TASKS)
    for task, result in found["tasks"].items():
        assert (result["samples"], result["fewshot"]) == (5, 0)
        for metric, value in result["figures"].items():
            theirs = expected["results"][task][f"{metric},none"]
            assert value == pytest.approx(theirs, rel=CLOSE)
    accuracies = [found["tasks"][task]["figures"]["acc"] for task in (CHOICE, LETTERS)]
    assert found["groups"]["all"]["figures"]["acc"] == pytest.approx(sum(accuracies) / 2)
    assert found["groups"]["alda"]["tasks"] == [CHOICE]


@pytest.mark.slow
def test_training_measures_its_own_weights(trained: Path, tasks: Path) -> None:
    """Before the first step, every 7 steps and at the ends of phases."""
    rows = [row for row in read_rows(trained.parent / "run") if "benchmarks" in row]
    at = [(row["step"], row["phase"]) for row in rows]
    assert at == [(0, "pretrain"), (7, "pretrain"), (12, "pretrain"), (14, "joint"), (21, "joint")]
    options = ("--harness", ",".join(TASKS), "--tasks-path", tasks)
    found = evaluated(trained.parent / "run@pretrain", *options)
    for task, figures in rows[2]["benchmarks"].items():
        assert figures == pytest.approx(found["tasks"][task]["figures"], rel=CLOSE)
    for name, figures in rows[2]["benchmark_groups"].items():
        assert figures == pytest.approx(found["groups"][name]["figures"], rel=CLOSE)


def test_benchmarks_change_nothing_in_training(trained: Path, corpora: Path) -> None:
    plain = write_run_file(trained.parent / "plain", run_settings(corpora))
    run_well("train", plain)
    rows = timeless(read_rows(trained.parent / "run"))
    assert [row for row in rows if "benchmarks" not in row] == timeless(
        read_rows(plain.parent / "run")
    )


@pytest.mark.slow
@pytest.mark.parametrize("call", [2, 3])
def test_a_run_that_is_killed_while_it_measures_has_the_same_rows(
    trained: Path, tmp_path: Path, call: int
) -> None:
    """SIGKILL in the middle of the benchmarks after steps 7 and 12, of which some are done."""
    run_file = write_run_file(tmp_path, yaml.safe_load(trained.read_text()))
    killed = run("train", run_file, prepare=partial(kill_in_benchmarks, call))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run_well("train", run_file)
    assert timeless(read_rows(tmp_path / "run")) == timeless(read_rows(trained.parent / "run"))


def kill_in_benchmarks(call: int) -> None:
    """Kill this process when a text is generated for the call-th time."""
    from megaphase.harness.language_model import ServedModel

    generate, calls = ServedModel.generate_until, []

    def generate_or_die(self: ServedModel, *arguments: Any, **options: Any) -> list[str]:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return generate(self, *arguments, **options)  # type: ignore[no-any-return]

    ServedModel.generate_until = generate_or_die  # type: ignore[method-assign]


@pytest.mark.slow
def test_tensor_parallel_ranks_give_the_same_figures(trained: Path, tasks: Path) -> None:
    names = ",".join((LETTERS, TEXT, PERPLEXITY))
    arguments = ("evaluate", trained.parent / "run@pretrain", "--harness", names)
    options = ("--tasks-path", tasks, "--json")
    results = launch(megaphase(*arguments, *options, "--tensor", 2), 2)
    check(results)
    [row] = [r for r in read_rows(trained.parent / "run") if "benchmarks" in r and r["step"] == 12]
    found = json.loads(results[0].stdout)["tasks"]
    for task, result in found.items():
        assert result["figures"] == pytest.approx(row["benchmarks"][task], rel=CLOSE)


@pytest.mark.slow
def test_every_layout_gives_the_same_figures(trained: Path, tasks: Path) -> None:
    """Four processes; in training with ZeRO-3, whose ranks join each other's forward passes, and
    with sequence parallelism."""
    run = trained.parent / "run@pretrain"
    options = ("--harness", ",".join(TASKS), "--tasks-path", tasks, "--json")
    results = launch(megaphase("evaluate", run, *options, "--tensor", 2), 4)
    check(results)
    rows = [row for row in read_rows(trained.parent / "run") if "benchmarks" in row]
    four = json.loads(results[0].stdout)
    for task in TASKS:
        expected = pytest.approx(rows[2]["benchmarks"][task], rel=CLOSE)
        assert four["tasks"][task]["figures"] == expected
    layout = ("parallel.tensor=2", "parallel.zero=3", "parallel.sequence=true")
    end = ("checkpoint.end_after=7", "parts.kernels=eager")
    output = trained.parent / "four"
    check(launch(megaphase("train", trained, f"output={output}", *layout, *end), 4))
    partitioned = [row for row in read_rows(output) if "benchmarks" in row]
    for own, expected in zip(partitioned, rows[:2], strict=True):
        for task in TASKS:
            figures = expected["benchmarks"][task]
            assert own["benchmarks"][task] == pytest.approx(figures, rel=CLOSE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}@joint", "--limit", "3"], "--limit: is for benchmarks; give --harness, too"),
        (["{run}@joint", "--harness", "tiny_text", "--split", "test"],
         "--split: is for losses, not for benchmarks; leave out it or --harness"),
        (["{run}@joint", "--harness", "tiny_text", "--group", "en"],
         "--group: 'en' is not GROUP=TASKS; give, for example, en=belebele_eng_Latn"),
        (["{run}@joint", "--harness", "far", "--tasks-path", "{tasks}"],
         "--harness: a data set is not on this machine and cannot be fetched ("),
        (["{run}@joint", "--harness", "tiny_text", "--tensor", "3"],
         "--tensor: 3 does not divide the 1 processes; "),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(
    trained: Path, tasks: Path, arguments: list[str], message: str
) -> None:
    names = {"run": trained.parent / "run", "tasks": tasks}
    refused = run("evaluate", *(each.format(**names) for each in arguments))
    assert refused.returncode == 2
    [line] = refused.stderr.splitlines()
    assert line.startswith(f"megaphase: {message.format(**names)}")


def test_the_report_shows_the_ends_of_phases(trained: Path, tmp_path: Path) -> None:
    run = load_run(trained.parent / "run")
    assert run.hole is None
    table = benchmark_table(run)
    assert table is not None
    steps = ["pretrain, step 0", "pretrain, step 12", "joint, step 21"]
    assert table.columns == ["benchmark", "metric", *steps]
    rows = {(str(row[0].text), row[1]): row[2:] for row in table.rows}
    measured = [row for row in read_rows(run.directory) if "benchmarks" in row]
    shown = [measured[number] for number in (0, 2, 4)]
    assert rows["all", "acc"] == [f"{row['benchmark_groups']['all']['acc']:.4f}" for row in shown]
    assert rows[TEXT, "chrf"] == [f"{row['benchmarks'][TEXT]['chrf']:.4f}" for row in shown]
    assert "benchmarks.csv" in write_numbers([run], tmp_path / "numbers")
    lines = (tmp_path / "numbers" / "benchmarks.csv").read_text().splitlines()
    assert len(lines) == 1 + sum(
        len(figures)
        for row in measured
        for key in ("benchmarks", "benchmark_groups")
        for figures in row[key].values()
    )


def test_training_continues_where_benchmarks_fail() -> None:
    def fail() -> None:
        raise RunError("lm-evaluation-harness has failed: KeyError: 'answer'")

    events, said = [], []
    trainer = SimpleNamespace(
        state=SimpleNamespace(step=7),
        phase=SimpleNamespace(name="joint"),
        benchmarks=SimpleNamespace(are_due=lambda step, ends_phase: True),
        finish_step=lambda: None,
        measure_benchmarks=fail,
        callbacks=SimpleNamespace(event=lambda *args, **facts: events.append((*args, facts))),
        say=said.append,
    )
    Trainer.measure_benchmarks_if_due(trainer, ends_phase=False)
    reason = "lm-evaluation-harness has failed: KeyError: 'answer'"
    assert events == [(7, "benchmarks_failed", {"phase": "joint", "reason": reason})]
    assert said == [f"joint step 7  benchmarks failed: {reason}"]


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ([TEXT], {"tasks_path": Path("nowhere")}, "nowhere: is not a directory; give a folder"),
        ([TEXT], {"groups": {"en": ["x"]}}, "--harness: group en: x is none of the tasks; "),
    ],
)
def test_a_choice_that_cannot_be_loaded_is_refused(
    tasks: Path, names: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as refused:
        Benchmarks(BenchmarkChoice(names, "--harness", **{"tasks_path": tasks} | options))
    assert str(refused.value).startswith(message)


def test_a_task_that_generates_too_much_is_refused(
    trained: Path, corpora: Path, tasks: Path
) -> None:
    message = "long: generates up to 40 tokens, the model's seq_len is 32; set max_gen_toks in "
    benchmarks = Benchmarks(BenchmarkChoice(["long"], "--harness", tasks))
    with (
        served(f"{trained.parent / 'run'}@joint", corpora / "tok") as model,
        pytest.raises(InputError, match=message),
    ):
        benchmarks.run(model.service)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("max_gen_toks", 0, "a whole number from 1"),
        ("max_gen_toks", -3, "a whole number from 1"),
        ("max_new_tokens", "x", "a whole number from 1"),
        ("temperature", -1.0, "0 or a positive number"),
        ("top_k", 0.5, "0 or a positive whole number"),
        ("top_p", 2.0, "a number above 0, at most 1"),
    ],
)
def test_a_task_whose_numbers_make_no_sense_is_refused(
    corpora: Path, key: str, value: object, rule: str
) -> None:
    model = without_weights(corpora)
    given = {"until": ["a"], "max_gen_toks": 4, "do_sample": True, "temperature": 1.0, key: value}
    with pytest.raises(InputError) as refused:
        model.generate_until([SimpleNamespace(args=("alda", given), task_name="mine")])
    problem = f"mine: generation_kwargs.{key} is {value!r}"
    assert str(refused.value) == f"{problem}; write {rule} in its file"


def test_a_choice_that_is_too_long_names_its_task(corpora: Path) -> None:
    requests = [
        SimpleNamespace(args=("alda", text), task_name=name)
        for name, text in (("short", " boreth"), ("mine", " alda" * 100))
    ]
    with pytest.raises(InputError, match=r"^mine: has a continuation of \d+ tokens"):
        without_weights(corpora).loglikelihood(requests, disable_tqdm=True)


def without_weights(corpora: Path) -> ServedModel:
    shape = SimpleNamespace(seq_len=32)
    service = SimpleNamespace(
        tokenizer=Tokenizer.load(corpora / "tok"), model=SimpleNamespace(shape=shape)
    )
    return ServedModel(service)  # type: ignore[arg-type]


def test_a_task_of_no_known_kind_is_not_taken_for_a_missing_data_set(
    tasks: Path, tmp_path: Path
) -> None:
    text = (tasks / f"{CHOICE}.yaml").read_text()
    changed = text.replace(f"task: {CHOICE}", "task: odd").replace("multiple_choice", "nonsense")
    (tmp_path / "odd.yaml").write_text(changed)
    with pytest.raises(InputError, match=r"a task cannot be loaded: .*nonsense"):
        Benchmarks(BenchmarkChoice(["odd"], "--harness", tmp_path))


def test_an_unknown_task_is_named(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks_of_lm_eval = import_module("lm_eval.tasks")
    own = partial(tasks_of_lm_eval.TaskManager, include_defaults=False)  # without 14,000 files
    monkeypatch.setattr(tasks_of_lm_eval, "TaskManager", own)
    with pytest.raises(InputError, match="there is no task 'tiny_choise'; did you mean 'tiny_cho"):
        Benchmarks(BenchmarkChoice(["tiny_choise"], "--harness", tasks))
    for where, option in (("--harness", "--tasks-path"), ("a.yaml: validation", "tasks_path")):
        with pytest.raises(InputError, match=f"give {option} DIR, the folder of its file$"):
            Benchmarks(BenchmarkChoice(["my_choice"], where))
    chosen = Benchmarks(BenchmarkChoice(["tiny_[cl]*", TEXT, CHOICE], "--harness", tasks))
    assert chosen.tasks == [CHOICE, LETTERS, TEXT]


def test_an_extra_that_is_missing_is_named(
    trained: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(InputError, match=r'pip install "megaphase\[lm-eval\]"'):
        require_harness("--harness")


class _Alone:
    """A control group of one rank."""

    rank = 0

    def from_first_rank(self, fact: Any) -> Any:
        return fact

    def gather(self, fact: Any) -> list[Any]:
        return [fact]


@pytest.mark.parametrize(("tensor", "expected"), [(1, RunError), (2, ComputingError)])
def test_what_a_rank_raises_reaches_all_ranks_or_ends_them(
    tensor: int, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a model of several ranks the others wait in the middle of its forward pass."""

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(ModelService, "_own_part", fail)
    model: Any = SimpleNamespace(
        grid=SimpleNamespace(is_first=True, tensor_rank=0),
        waits_for_others=tensor > 1,
        join_others=lambda: None,
    )
    nothing: Any = None
    control: Any = _Alone()
    service = ModelService(model, nothing, control, batch=2)
    with pytest.raises(expected, match=r"rank 0 has failed: CUDA out of memory\. .*; a smaller"):
        service.serve(lambda: service.score([nothing]))
