"""Run directories as written by training, with synthetic losses; a parser of report pages."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path

TASKS = {"en": 40_000, "fr": 30_000, "hi": 500, "eu": 2_000}  # tokens
FLOORS = {"en": 3.0, "fr": 3.3, "hi": 5.1, "eu": 5.7}
LOW = ("hi", "eu")
PHASES = (
    ("pretrain", 60, {"en": 0.6, "fr": 0.4}),
    ("joint", 30, {"en": 0.45, "fr": 0.3, "hi": 0.15, "eu": 0.1}),
)
STATIC = (("static", 90, {"en": 0.5, "fr": 0.3, "hi": 0.1, "eu": 0.1}),)
SWITCH, END, EVERY = 60, 90, 10
SAMPLES, SEQ_LEN = 8, 64


def held_out_loss(task: str, step: int) -> float:
    """A loss that falls; after the switch it rises a little for high-resource tasks, else falls."""
    loss = FLOORS[task] + 4 * math.exp(-step / 15)
    if step <= SWITCH:
        return loss
    return loss - 1.5 * (1 - math.exp((SWITCH - step) / 8)) if task in LOW else loss + 0.2


def plan_of(phases) -> dict:
    first, so_far, planned = 0, dict.fromkeys(TASKS, 0.0), []
    for name, steps, rates in phases:
        tasks = {}
        for task, size in TASKS.items():
            rate = rates.get(task, 0.0)
            samples = round(rate * steps * SAMPLES)
            so_far[task] += samples * SEQ_LEN / size
            tasks[task] = {
                "requested_rate": rate,
                "rate": rate,
                "samples": samples,
                "tokens": samples * SEQ_LEN,
                "epochs": samples * SEQ_LEN / size,
                "epochs_so_far": so_far[task],
            }
        planned.append(
            {
                "name": name,
                "steps": steps,
                "first_step": first,
                "samples": steps * SAMPLES,
                "tokens": steps * SAMPLES * SEQ_LEN,
                "tasks": tasks,
            }
        )
        first += steps
    corpora = {
        task: {
            "documents": size // 100,
            "tokens": size,
            "held_out_documents": 4,
            "text_bytes": 4 * size,
        }
        for task, size in TASKS.items()
    }
    return {"seq_len": SEQ_LEN, "samples_per_step": SAMPLES, "tasks": corpora, "phases": planned}


def rows_of(phases, shift: float, until: int):
    """Return the rows of metrics.jsonl up to the step `until`."""
    start = 0
    for name, steps, rates in phases:
        if start > until:
            return
        yield {"step": start, "event": "phase_start", "phase": name}
        for step in range(start, min(start + steps, until) + 1):
            if step > start:
                losses = {task: held_out_loss(task, step) - 0.1 for task in rates}
                yield {
                    "step": step,
                    "phase": name,
                    "phase_step": step - start,
                    "tokens": step * SAMPLES * SEQ_LEN,
                    "loss": sum(rates[task] * loss for task, loss in losses.items()),
                    "loss_by_task": losses,
                    "learning_rate": 3e-4 * min((step - start) / 8, 1) * (1 - step / 200),
                    "grad_norm": 1.0,
                    "step_seconds": 0.1,
                    "data_wait_seconds": 0.01,
                    "tokens_per_second": 5000.0 + step,
                    "mfu": None,
                }
            if step % EVERY == 0 or step == start + steps:
                values = {
                    task: {"loss": loss + shift, "bits_per_byte": loss / 2}
                    for task in TASKS
                    if (loss := held_out_loss(task, step))
                }
                yield {"step": step, "phase": name, "validation": values}
        start += steps
        if start <= until:
            yield {"step": start, "event": "phase_end", "phase": name}


def write_run(run_dir: Path, phases=PHASES, *, shift: float = 0.0, until: int = END) -> Path:
    run_dir.mkdir(parents=True)
    settings = {"seed": 1234, "model": {"preset": "gpt-tiny"}, "tokenizer": "tok/<b>"}
    (run_dir / "run.json").write_text(json.dumps(settings))
    (run_dir / "plan.json").write_text(json.dumps(plan_of(phases)))
    lines = [json.dumps(row) + "\n" for row in rows_of(phases, shift, until)]
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    return run_dir


class Page(HTMLParser):
    """The text of every table row, and everything that a browser would load."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.open_cell = False
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.open_cell = True
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name == "src" or (tag == "link" and name == "href"):
                self.fetched.append(value)
            if tag == "a" and name == "href":
                self.links.append(value)

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.open_cell = False

    def handle_data(self, data):
        if self.open_cell:
            self.rows[-1][-1] += data
