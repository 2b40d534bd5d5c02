"""A small run on synthetic languages, for the tests that start the real command."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from megaphase.data_tools.synthetic.languages import write_languages
from megaphase.data_tools.tokenization.tokenize import tokenize
from megaphase.data_tools.tokenizers.train import train_tokenizer

HIGH, LOW = ("alda", "boreth"), ("cimri",)
TEXT_BYTES = {"alda": 90_000, "boreth": 60_000, "cimri": 12_000}
STEPS = (12, 9)
HELD_OUT = 6  # samples of each task
TIMES = ("step_seconds", "data_wait_seconds", "save_seconds", "tokens_per_second", "mfu")


def megaphase(*arguments: object) -> list[str]:
    """Return the command line of a megaphase command in this Python."""
    return [sys.executable, "-m", "megaphase", *(str(each) for each in arguments)]


def make_corpora(folder: Path) -> Path:
    """Make a tokenizer and three tokenized languages: `tok` and `data/NAME` in `folder`."""
    shutil.copytree(_made_once().name, folder, dirs_exist_ok=True)
    return folder


@cache
def _made_once() -> TemporaryDirectory[str]:
    """Make the folder of which every test module of this process gets a copy."""
    made = TemporaryDirectory(prefix="megaphase-corpora-")
    folder = Path(made.name)
    texts = write_languages(folder / "text", seed=5, languages=TEXT_BYTES)
    train_tokenizer({n: [path] for n, path in texts.items()}, folder / "tok", vocab_size=500)
    for name, path in texts.items():
        tokenize([path], folder / "tok", folder / "data" / name, workers=1)
    return made


def run_settings(corpora: Path, **changes: Any) -> dict[str, Any]:
    """Return a run file of two short phases; `changes` replace top-level keys."""

    def phase(name: str, steps: int, mixture: dict[str, Any], peak: float) -> dict[str, Any]:
        rate = {"schedule": "cosine", "peak": peak, "final": peak / 10, "warmup_steps": 2}
        return {"name": name, "steps": steps, "mixture": mixture, "learning_rate": rate}

    return {
        "seed": 11,
        "output": "run",
        "tokenizer": str(corpora / "tok"),
        "tasks": {name: {"corpus": str(corpora / "data" / name)} for name in TEXT_BYTES},
        "model": {
            "layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 64, "seq_len": 32,
        },
        "parallel": {"tensor": 1, "zero": 0},
        "precision": "fp32",
        "batch": {"samples": 8, "micro": 2},
        "phases": [
            phase("pretrain", STEPS[0], {"proportional": True, "over": list(HIGH)}, 1e-2),
            phase("joint", STEPS[1], {"temperature": 3.0}, 5e-3),
        ],
        "validation": {"every_steps": 5, "samples": HELD_OUT, "fraction": 0.1},
        "checkpoint": {"every_steps": 4, "keep": 2},
        "logging": {"every_steps": 5, "tensorboard": False},
        **changes,
    }  # fmt: skip


def write_run_file(folder: Path, settings: dict[str, Any]) -> Path:
    """Write a run file with its output in the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Return all rows of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def rows_so_far(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl that is being written, if it exists."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def save_begins(checkpoints: Path) -> Callable[[], bool]:
    """Return a function that tells whether a save has started since this call.

    A save may finish between two calls, so a complete new checkpoint counts too.
    """

    def begun() -> set[str]:
        return {path.name for path in checkpoints.glob("*step-*")}

    before = begun()
    return lambda: not begun() <= before


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows without times and resumptions: the reproducible part."""
    return [
        {key: value for key, value in row.items() if key not in TIMES}
        for row in rows
        if row.get("event") != "resume"
    ]


def without_gap(figures: dict[str, float]) -> dict[str, float]:
    """Return a task's validation figures without the gap to the training loss."""
    return {key: value for key, value in figures.items() if key != "gap"}


def copy_run(source: Path, target: Path) -> Path:
    """Copy a folder made by write_run_file with its run; return the run file."""
    shutil.copytree(source, target)
    return target / "run.yaml"
