"""Directories of sweeps as `megaphase sweep` leaves them, with invented losses, without training.

Losses are simple functions of a run's steps and tokens, so that a test can compute what a report
must say. Low-resource losses fall with the tokens seen and rise with their repetition;
high-resource losses fall with the steps; a restart from better weights helps.
"""

import json
import math
from pathlib import Path

from megaphase.sweep.directory import SweepDirectory, SweepRecord
from megaphase.sweep.file import SweepConfig
from megaphase.sweep.outcome import Outcome, Translated
from megaphase.sweep.sweep import Sweep
from megaphase.sweep.trials import Trial, known_trials

HIGH, LOW = ("en", "fr"), ("hi", "eu")
TOKENS = {"en": 40_000, "fr": 30_000, "hi": 900, "eu": 1_200}
FLOORS = {"en": 3.6, "fr": 3.9, "hi": 4.6, "eu": 5.0}
STEPS, EVERY = 60, 5
SAMPLES, SEQ_LEN = 8, 64
PEAKS = {0.001: 0.12, 0.004: 0.0}  # nats that each peak adds

STATIC = {"rates": [0.05, 0.1, 0.25, 0.5]}
TWO_PHASE = {"rates": [0.1, 0.25, 0.5], "pretrain": [0.8]}


def sweep_of(folder: Path, arms: dict, **more) -> Sweep:
    """Return a sweep of these arms with the directory `folder`."""
    config = {
        "run": {"model": {}},
        "output": folder.name,
        "high": list(HIGH),
        "low": list(LOW),
        "steps": STEPS,
        "learning_rate": {"peaks": list(PEAKS)},
        "arms": arms,
    }
    base = {
        "tokenizer": "/somewhere/tok",
        "tasks": {task: {"corpus": f"/somewhere/{task}"} for task in TOKENS},
        "model": {"preset": "gpt-1m", "seq_len": 64},
    }
    return Sweep(
        file=folder.parent / "languages.yaml",
        config=SweepConfig.model_validate(config | more),
        base=base,
        output=folder,
        high=list(HIGH),
        low=list(LOW),
        tokens=TOKENS,
        steps=STEPS,
    )


def write_sweep(
    folder: Path,
    arms: dict,
    *,
    until=None,
    failed=(),
    diverged=(),
    bleu=False,
    test=False,
    seconds=1.5,
    **more,
) -> Path:
    """Write the directory of a sweep; return it.

    until: number of ended runs. test: whether runs are measured on a test split, too.
    failed, diverged: runs by name. seconds: time of each run.
    """
    sweep, directory = sweep_of(folder, arms, **more), SweepDirectory(folder)
    folder.mkdir(parents=True)
    directory.prepare(sweep)
    outcomes: dict[str, Outcome] = {}
    while until is None or len(outcomes) < until:
        trials = {trial.name: trial for trial in known_trials(sweep, outcomes)}
        trial = next((each for each in trials.values() if each.name not in outcomes), None)
        if trial is None:
            break
        if trial.name in failed:
            outcome = Outcome(failed="the loss is not finite 3 times in a row")
        else:
            rows = write_run(directory, trial, trials.get(trial.source))
            outcome = _outcome(trial, rows, trial.name in diverged, bleu)
            outcome = outcome.model_copy(update={"seconds": seconds})
            if test:
                outcome = _on_test_split(outcome)
        directory.write_outcome(trial.name, outcome)
        outcomes[trial.name] = outcome
    return folder


def record_of(arms: dict, losses, *, ended=lambda trial: True, **more) -> SweepRecord:
    """Return a sweep without files, with known outcomes.

    losses: maps a run to (high, low), or None if it failed. ended: whether a run has ended.
    """
    more = {"learning_rate": {"peaks": [0.004]}} | more
    sweep, outcomes = sweep_of(Path("somewhere/sweep"), arms, **more), {}
    while True:
        trials = known_trials(sweep, outcomes)
        new = [trial for trial in trials if trial.name not in outcomes and ended(trial)]
        if not new:
            return SweepRecord(SweepDirectory(sweep.output), sweep, trials, outcomes)
        for trial in new:
            found = losses(trial) if trial.is_final else (5.0, 9.0)
            if found is None:
                outcomes[trial.name] = Outcome(failed="out of memory")
            else:
                by_task = dict.fromkeys(HIGH, found[0]) | dict.fromkeys(LOW, found[1])
                outcomes[trial.name] = Outcome(step=STEPS, losses=by_task)


def _on_test_split(outcome: Outcome) -> Outcome:
    """Other documents are a little harder."""
    losses = {task: loss + 0.02 for task, loss in outcome.losses.items()}
    bits = {task: loss / 2 for task, loss in losses.items()}
    return outcome.model_copy(update={"test": losses, "test_bits_per_byte": bits})


def _outcome(trial: Trial, rows: list[dict], diverged: bool, bleu: bool) -> Outcome:
    row = rows[-1]
    if trial.takes_best:
        row = min(rows, key=lambda row: sum(row["validation"][task]["loss"] for task in LOW))
    losses = {task: measured["loss"] for task, measured in row["validation"].items()}
    if diverged:
        return Outcome(step=row["step"], losses=losses | {"eu": math.nan})
    scores = {"hi": 8.0, "eu": 9.0, "en": 30.0, "fr": 28.0} if bleu and trial.is_final else {}
    return Outcome(
        step=row["step"],
        losses=losses,
        bits_per_byte={task: loss / 2 for task, loss in losses.items()},
        translation={
            task: Translated(bleu=score / losses[task] * 4, chrf=20 + score)
            for task, score in scores.items()
        },
    )


def write_run(directory: SweepDirectory, trial: Trial, source: Trial | None) -> list[dict]:
    """Write a run directory; return its validation rows."""
    phase = trial.run["phases"][0]
    earlier = [] if source is None else source.phases
    begin = sum(phase["steps"] for phase in earlier)
    rates, steps, samples = _rates(trial), phase["steps"], SAMPLES * SEQ_LEN
    before = {
        task: sum(_phase_rates(each).get(task, 0.0) * each["steps"] for each in earlier) * samples
        for task in TOKENS
    }
    tasks = {}
    for task, rate in rates.items():
        tokens = round(rate * steps * samples)
        tasks[task] = {
            "rate": rate,
            "samples": tokens // SEQ_LEN,
            "tokens": tokens,
            "epochs": tokens / TOKENS[task],
            "epochs_so_far": (before[task] + tokens) / TOKENS[task],
        }
    plan = {
        "tasks": {
            task: {"documents": 9, "tokens": size, "held_out_documents": 4, "text_bytes": 4 * size}
            for task, size in TOKENS.items()
        },
        "phases": [
            {"name": phase["name"], "steps": steps, "tokens": steps * samples, "tasks": tasks}
        ],
    }
    folder = directory.run(trial.name)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"seed": trial.seed}))
    (folder / "plan.json").write_text(json.dumps(plan))
    if begin:
        used = {task: round(n / SEQ_LEN) for task, n in before.items()}
        (folder / "origin.json").write_text(json.dumps({"step": begin, "used": used}))

    def loss(task: str, step: int) -> float:
        seen = before[task] + rates.get(task, 0.0) * (step - begin) * samples
        fresh = 0.0 if not begin else 0.25 * (1 - math.exp((begin - step) / 4))
        return _loss(trial, task, step, seen, fresh, begin)

    rows = []
    for step in range(begin, begin + steps + 1):
        if step > begin:
            training = {task: loss(task, step) - _learnt_by_heart(tasks[task], task, step, begin)
                        for task in rates}  # fmt: skip
            rows.append(_training_row(phase["name"], step, step - begin, training))
        if (step - begin) % EVERY == 0 or step == begin + steps:
            measured = {
                task: {"loss": loss(task, step), "bits_per_byte": loss(task, step) / 2}
                for task in TOKENS
            }
            rows.append({"step": step, "phase": phase["name"], "validation": measured})
    rows.append({"step": begin + steps, "event": "phase_end", "phase": phase["name"]})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text)
    return [row for row in rows if "validation" in row]


def _rates(trial: Trial) -> dict[str, float]:
    return _phase_rates(trial.run["phases"][0])


def _phase_rates(phase: dict) -> dict[str, float]:
    mixture = phase["mixture"]
    if "rates" in mixture:
        return mixture["rates"]
    weights = {
        task: size ** (1 / mixture["temperature"])
        for task, size in TOKENS.items()
        if task in mixture.get("over", TOKENS)
    }
    return {task: each / sum(weights.values()) for task, each in weights.items()}


def _loss(trial: Trial, task: str, step: int, seen: float, fresh: float, begin: int) -> float:
    """Return a task's loss after `step` steps and `seen` tokens; `fresh`: gain of the restart."""
    noise = 0.01 * math.sin(1 + 7 * trial.seed + len(task + trial.name))
    size = {"large": -0.3}.get(trial.model or "", 0.0)
    base = FLOORS[task] + size + PEAKS[trial.peak] + noise - fresh
    if task in HIGH:
        forgotten = 0.0 if trial.mixture.rate != 1.0 else 1 - math.exp((begin - step) / 6)
        learnt = 4 * math.exp(-step / 9) + 0.9 * math.exp(-seen / 9000)
        return base + 0.3 * fresh + forgotten + learnt
    epochs = seen / TOKENS[task]
    repeated = 0.0 if begin or trial.takes_best else 0.12 * max(0.0, epochs - 2) ** 1.3
    return base + 2.5 * math.exp(-step / 12) + 1.8 * math.exp(-seen / 2500) + repeated


def _learnt_by_heart(share: dict, task: str, step: int, begin: int) -> float:
    epochs = share["tokens"] * (step - begin) / 60 / TOKENS[task]
    return 0.05 + (0.12 * epochs if task in LOW else 0.0)


def _training_row(phase: str, step: int, phase_step: int, losses: dict[str, float]) -> dict:
    return {
        "step": step,
        "phase": phase,
        "phase_step": phase_step,
        "tokens": step * SAMPLES * SEQ_LEN,
        "loss": sum(losses.values()) / len(losses),
        "loss_by_task": losses,
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
        "step_seconds": 0.1,
        "data_wait_seconds": 0.01,
        "tokens_per_second": 5000.0,
    }
