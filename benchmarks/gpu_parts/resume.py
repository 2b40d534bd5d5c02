"""A run of `megaphase train` that is killed and resumed, beside one that is not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from gpu_parts.serving import Results
from gpu_parts.setups import TINY
from megaphase.config.run import RunConfig
from megaphase.data_tools.synthetic.languages import write_languages
from megaphase.data_tools.tokenization.tokenize import tokenize
from megaphase.data_tools.tokenizers.train import train_tokenizer

LANGUAGES = {"alda": 200_000, "boreth": 100_000}
EVERY = 20  # steps between checkpoints, 4 in a rehearsal
TIMES = ("step_seconds", "data_wait_seconds", "save_seconds", "tokens_per_second", "mfu")


def resume(results: Results) -> None:
    folder = results.folder / "resume"
    corpora(folder)
    whole, killed = run_file(folder, "whole", results), run_file(folder, "killed", results)
    finish(whole)
    results.record("killed_after_step", kill_after_save(killed, folder / "killed"))
    began = time.monotonic()
    finish(killed)
    results.record("resumed_run_seconds", round(time.monotonic() - began, 1))
    one, other = (rows(folder / name / "metrics.jsonl") for name in ("whole", "killed"))
    results.record("steps", len(one))
    unlike = [a["step"] for a, b in zip(one, other, strict=False) if a != b]
    same = len(one) == len(other) and not unlike
    results.record("same_metrics", same)
    results.record("first_step_that_differs", unlike[0] if unlike else None)
    if "deterministic" in RunConfig.model_fields:
        results.expect(same, "the metrics of the resumed run differ")


def corpora(folder: Path) -> None:
    texts = write_languages(folder / "text", seed=5, languages=LANGUAGES)
    train_tokenizer({name: [path] for name, path in texts.items()}, folder / "tok", vocab_size=500)
    for name, path in texts.items():
        tokenize([path], folder / "tok", folder / "data" / name, workers=1)


def run_file(folder: Path, output: str, results: Results) -> Path:
    """Two phases with a reset between them; everything of a real run, but small."""

    def phase(name: str, mixture: dict[str, Any], steps: int) -> dict[str, Any]:
        rate = {"schedule": "cosine", "peak": 1e-3, "final": 1e-4, "warmup_steps": 2}
        return {"name": name, "steps": steps, "mixture": mixture, "learning_rate": rate}

    tiny = results.rehearse
    every = 4 if tiny else EVERY
    run: dict[str, Any] = {
        "seed": 11,
        "output": str(folder / output),
        "tokenizer": str(folder / "tok"),
        "tasks": {name: {"corpus": str(folder / "data" / name)} for name in LANGUAGES},
        "model": {**TINY, "seq_len": 32} if tiny else {"preset": "gpt-30m", "seq_len": 512},
        "parallel": {"zero": 1},
        "parts": {"kernels": "eager" if tiny else "auto"},
        "batch": {"samples": 8, "micro": 4},
        "phases": [
            phase("pretrain", {"rates": {"alda": 1.0}}, 3 * every),
            phase("joint", {"temperature": 3.0}, 2 * every),
        ],
        "validation": {"every_steps": every, "samples": 8, "fraction": 0.1},
        "checkpoint": {"every_steps": every, "keep": 3},
        "logging": {"every_steps": every, "tensorboard": False},
    }
    if "deterministic" in RunConfig.model_fields:
        run["deterministic"] = True
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def start(path: Path) -> subprocess.Popen[bytes]:
    # `-m` would find sources in the folder that it is started in before what is installed.
    command = [sys.executable, "-m", "megaphase", "train", str(path)]
    return subprocess.Popen(command, cwd=path.parent)


def finish(path: Path) -> None:
    if (code := start(path).wait()) != 0:
        raise SystemExit(f"megaphase train {path.name} ended with exit code {code}; see above")


def kill_after_save(path: Path, run: Path) -> int:
    """Kill it by SIGKILL after its first whole checkpoint; returns the steps it had recorded."""
    process = start(path)
    while process.poll() is None and not list((run / "checkpoints").glob("step-*")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise SystemExit("the run ended before it could be killed")
    return max((row["step"] for row in rows(run / "metrics.jsonl")), default=0)


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of steps without their times; a row that is not whole is left out."""
    lines = path.read_text().splitlines(keepends=True)
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    steps = [row for row in found if "grad_norm" in row]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in steps]
