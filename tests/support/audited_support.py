"""The final losses of two real sweeps of three seeds, which an audit computed again by hand.

The files hold the runs of `translation-full` and `languages-full` with losses by task in nats per
token and in bits per byte. They were measured on the validation split alone.
"""

from __future__ import annotations

import csv
from pathlib import Path

from sweep_support import sweep_of

from megaphase.sweep.directory import SweepDirectory, SweepRecord
from megaphase.sweep.outcome import Outcome
from megaphase.sweep.trials import known_trials

FOLDER = Path(__file__).parents[1] / "sweep" / "pareto" / "audited"
HIGH = {"translation": ["en-fr"], "languages": ["en", "fr", "de"]}
# First stages whose lowest peak was the best one; of the others it was the highest.
LOWEST_PEAK = {"languages": "restart-first", "translation": ""}


def audited_rows(name: str) -> list[dict[str, str]]:
    with open(FOLDER / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def audited_tasks(name: str) -> list[str]:
    return [column[5:] for column in audited_rows(name)[0] if column.startswith("loss_")]


def audited_record(name: str) -> SweepRecord:
    """Return the sweep with its outcomes, as if it were read from a directory."""
    rows, tasks = audited_rows(name), audited_tasks(name)
    sweep = sweep_of(
        Path("somewhere/sweep"),
        {arm: _arm([row for row in rows if row["arm"] == arm]) for arm in _values(rows, "arm")},
        learning_rate={"peaks": [float(peak) for peak in _values(rows, "peak")]},
        seeds=[1, 2, 3],
    )
    corpora = {task: {"corpus": f"/somewhere/{task}"} for task in tasks}
    sweep = sweep.model_copy(
        update={
            "high": HIGH[name],
            "low": [task for task in tasks if task not in HIGH[name]],
            "tokens": dict.fromkeys(tasks, 1000),
            "base": sweep.base | {"tasks": corpora},
        }
    )
    measured = {row["run"]: row for row in rows}
    outcomes: dict[str, Outcome] = {}
    while new := [t for t in known_trials(sweep, outcomes) if t.name not in outcomes]:
        for trial in new:
            if trial.is_final:
                outcomes[trial.name] = _outcome(measured.pop(trial.name), tasks)
                continue
            sign = 1 if trial.arm == LOWEST_PEAK[name] else -1
            outcomes[trial.name] = Outcome(losses=dict.fromkeys(tasks, 9 + sign * trial.peak))
    assert not measured  # every run of the file belongs to the sweep
    return SweepRecord(SweepDirectory(sweep.output), sweep, known_trials(sweep, outcomes), outcomes)


def _arm(rows: list[dict[str, str]]) -> dict:
    found: dict = {}
    if rows[0]["arm"] != "low-only":
        found["rates"] = [float(rate) for rate in _values(rows, "rate")]
    if rows[0]["pretrain_share"]:
        found["pretrain"] = [float(share) for share in _values(rows, "pretrain_share")]
    if rows[0]["arm"] == "regularized":
        found["settings"] = {"model.dropout": 0.1}
    return found


def _values(rows: list[dict[str, str]], column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


def _outcome(row: dict[str, str], tasks: list[str]) -> Outcome:
    return Outcome(
        step=1,
        losses={task: float(row[f"loss_{task}"]) for task in tasks},
        bits_per_byte={task: float(row[f"bits_per_byte_{task}"]) for task in tasks},
    )
