"""Benchmarks on a checkpoint against `lm_eval --model hf` on the exported model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
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
from run_support import STEPS, make_corpora, read_rows, run_settings, write_run_file
from warm_commands import run, run_well

from megaphase.convert.source import open_source
from megaphase.distributed.all_ranks import process_group
from megaphase.distributed.control_group import ControlGroup
from megaphase.distributed.process_grid import start_process_grid
from megaphase.generation.model import load_model
from megaphase.harness.language_model import ServedModel
from megaphase.harness.rank_model import RankModel
from megaphase.harness.service import ModelService
from megaphase.tokenizer import Tokenizer

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
