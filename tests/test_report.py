"""The report on real files: run directories as training writes them, with synthetic losses."""

import csv
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from megaphase.errors import InputError
from megaphase.experiments.losses import describe_change, phase_speeds
from megaphase.experiments.plot_style import LABEL_GAP_POINTS, spread
from megaphase.experiments.report import final_losses, summary_table, verdicts, write_report
from megaphase.experiments.runs import load_run

HIGH = {"en": 0.6, "fr": 0.4}
LOW = {"hi": 0.15, "eu": 0.1}
PHASE_STEPS = (60, 30)
EVERY = 10
SAMPLES, SEQ_LEN = 8, 64


def _loss(task: str, step: int, switch: int, offset: float) -> float:
    """High-resource: falls, then rises a little. Low-resource: high until the switch, then falls."""
    if task in HIGH:
        return 3.0 + offset + 5 * math.exp(-step / 20) + (0.05 if step > switch else 0)
    after = max(0, step - switch)
    return 5.0 + offset + 4 * math.exp(-step / 15) - 1.5 * (1 - math.exp(-after / 8))


def write_run(
    run_dir: Path,
    *,
    rates: tuple[dict[str, float], ...] = (HIGH, {"en": 0.45, "fr": 0.3, **LOW}),
    phase_steps: tuple[int, ...] = PHASE_STEPS,
    until: int = 10**9,
    every: int = EVERY,
    rename: dict[str, str] | None = None,
    shift: float = 0.0,
) -> Path:
    """Write a run directory in the formats of `megaphase train`; it stops after step `until`."""
    rename = rename or {}
    names = ("pretrain", "joint")[: len(rates)]
    offsets = {"en": 0.0, "fr": 0.3, "hi": 0.1 + shift, "eu": 0.7 + shift}
    corpus = {"en": 40_000, "fr": 30_000, "hi": 500, "eu": 2_000}
    phases, first, epochs = [], 0, dict.fromkeys(corpus, 0.0)
    for name, mixture, steps in zip(names, rates, phase_steps, strict=True):
        tasks = {}
        for task, rate in mixture.items():
            tokens = round(rate * steps * SAMPLES) * SEQ_LEN
            epochs[task] += tokens / corpus[task]
            tasks[rename.get(task, task)] = {
                "rate": rate, "samples": tokens // SEQ_LEN, "tokens": tokens,
                "epochs": tokens / corpus[task], "epochs_so_far": epochs[task],
            }  # fmt: skip
        phases.append({
            "name": name, "steps": steps, "first_step": first, "samples": steps * SAMPLES,
            "tokens": steps * SAMPLES * SEQ_LEN, "optimizer_state": "reset", "tasks": tasks,
        })  # fmt: skip
        first += steps
    plan = {
        "seq_len": SEQ_LEN, "samples_per_step": SAMPLES, "phases": phases,
        "tasks": {
            rename.get(task, task): {"documents": tokens // 100, "tokens": tokens,
                                     "held_out_documents": 4, "text_bytes": tokens * 4}
            for task, tokens in corpus.items()
        },
    }  # fmt: skip
    settings = {
        "seed": 1234,
        "model": {"preset": "gpt-tiny", "layers": 4, "hidden": 128, "parameters": 1_900_000},
        "parallel": {"tensor": 2, "zero": 3, "sequence": True, "offload": None},
        "optimizer": {"name": "adamw", "betas": [0.9, 0.95]},
        "phases": [{"name": n, "learning_rate": {"schedule": "cosine", "peak": 3e-4}}
                   for n in names],
    }  # fmt: skip
    rows: list[dict] = []
    tokens = 0
    switch = phase_steps[0]

    def validate(step: int, phase: str) -> None:
        values = {}
        for task in corpus:
            loss = _loss(task, step, switch, offsets[task])
            values[rename.get(task, task)] = {"loss": loss, "bits_per_byte": loss / 2}
        rows.append({"step": step, "phase": phase, "validation": values})

    for phase in phases:
        start, steps = phase["first_step"], phase["steps"]
        if start > until:
            break
        rows.append({"step": start, "event": "phase_start", "phase": phase["name"]})
        validate(start, phase["name"])
        for step in range(start + 1, min(start + steps, until) + 1):
            tokens += SAMPLES * SEQ_LEN
            noise = 0.1 * math.sin(step * 12.9)
            by_task = {
                task: _loss(key, step, switch, offsets[key]) + noise
                - (0.2 if key in LOW else 0.02)
                for key in corpus if (task := rename.get(key, key)) in phase["tasks"]
            }  # fmt: skip
            rows.append({
                "step": step, "phase": phase["name"], "phase_step": step - start,
                "tokens": tokens, "loss": sum(by_task.values()) / len(by_task),
                "loss_by_task": by_task,
                "learning_rate": 3e-4 * min((step - start) / 8, 1)
                * (0.55 + 0.45 * math.cos(math.pi * (step - start) / steps)),
                "grad_norm": 1.0, "step_seconds": 0.1 + 0.01 * (step % 3),
                "tokens_per_second": 5000.0 - step % 7, "mfu": None,
            })  # fmt: skip
            if step % every == 0 or step == start + steps:
                validate(step, phase["name"])
        if until >= start + steps:
            rows.append({"step": start + steps, "event": "phase_end", "phase": phase["name"]})
    run_dir.mkdir(parents=True)
    (run_dir / "run.json").write_text(json.dumps(settings))
    (run_dir / "plan.json").write_text(json.dumps(plan))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_dir


class _Tables(HTMLParser):
    """The text of every table row of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        if self.in_cell:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run_dir = write_run(folder / "two-phase")
    return run_dir, write_report([run_dir], folder / "report")


def test_final_losses_are_those_of_the_rows(report):
    run = load_run(report[0])
    found = {(row.phase, row.task): row for row in final_losses(run)}
    assert len(found) == 8
    hi = found["joint", "hi"]
    assert hi.low_resource
    assert hi.complete
    assert hi.start == pytest.approx(_loss("hi", 60, 60, 0.1))
    assert hi.end == pytest.approx(_loss("hi", 90, 60, 0.1))
    assert hi.end_bits_per_byte == pytest.approx(hi.end / 2)
    en = found["joint", "en"]
    assert not en.low_resource
    assert (en.best_step, en.best) == (60, pytest.approx(_loss("en", 60, 60, 0.0)))


def test_tables_of_the_page(report):
    rows = {r[0]: r for r in _Tables(report[1].read_text()).rows if len(r) == 10}
    hi = [_loss("hi", step, 60, 0.1) for step in (0, 60, 60, 90)]
    assert rows["hilow"][1:7] == [
        f"{hi[0]:.3f}", f"{hi[1]:.3f}", f"{hi[1]:.3f} 60",
        f"{hi[2]:.3f}", f"{hi[3]:.3f}", f"{hi[3]:.3f} 90",
    ]  # fmt: skip
    assert rows["hilow"][-1] == f"{hi[3] / 2:.3f}"
    data = {r[0]: r for r in _Tables(report[1].read_text()).rows if r and "of" in r[2:3][0:1][0]
            } if False else {r[0]: r for r in _Tables(report[1].read_text()).rows if len(r) == 10}
    assert data
