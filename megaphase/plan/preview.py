"""The table that `megaphase plan` prints."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from megaphase.config.phases import PhaseConfig
from megaphase.config.run import RunConfig
from megaphase.plan.origin import RunOrigin
from megaphase.plan.plan import REPEATED_TOO_OFTEN
from megaphase.tokenizer import Tokenizer

# Of a ramp, in one sentence.
MOST_STAGES_SHOWN = 12


def plan_table(summary: dict[str, Any]) -> Table:
    """Return tokens, sampling rate and epochs per phase and task, from `Plan.summary()`.

    requested: the mixture's rate; effective: the rate with max_epochs; both at the phase's start →
    at its end where they change within it; so far: epochs since the run's start, marked if the task
    is repeated too often; seq_len: if phases have one of their own; padding: the share of positions
    that packed documents leave empty.
    """
    table = _table("Plan")
    table.add_column("phase", overflow="fold")
    table.add_column("task", overflow="fold")
    # plan.json states a phase's length where not all phases have that of the model section.
    lengths = any("seq_len" in phase for phase in summary["phases"])
    padded = any("padding" in facts for p in summary["phases"] for facts in p["tasks"].values())
    columns = [
        "steps",
        *(["seq_len"] if lengths else []),
        "tokens",
        "requested",
        "effective",
        "epochs",
        "so far",
    ]
    for column in [*columns, *(["padding"] if padded else [])]:
        table.add_column(column, justify="right", overflow="fold")
    for phase in summary["phases"]:
        name, steps = phase["name"], f"{phase['steps']:,}"
        seq_len = f"{phase.get('seq_len', summary['seq_len']):,}"
        if phase["order"] == "random":
            name += " (random order)"
        if "seq_len" in phase:
            name += f" (seq_len {phase['seq_len']:,})"
        for task, facts in phase["tasks"].items():
            if facts["samples"] == 0 and facts["requested_rate"] == 0:
                continue
            table.add_row(
                Text(name),
                Text(task),
                steps,
                *([seq_len] if lengths else []),
                f"{facts['tokens']:,}",
                _rates(facts, "requested_rate", "requested_from_to"),
                _rates(facts, "rate", "rate_from_to"),
                f"{facts['epochs']:.2f}",
                _epochs_so_far(facts["epochs_so_far"]),
                *([_share(facts.get("padding"))] if padded else []),
            )
            name = steps = seq_len = ""
        table.add_section()
    return table


def origin_summary(origin: RunOrigin, summary: dict[str, Any]) -> dict[str, Any]:
    """Return where a branch begins: the checkpoint, and for every task the number of its first
    sample and the epochs before it; summary: from `Plan.summary()`."""
    first = summary["phases"][0]["tasks"]
    return {
        "source": origin.source,
        "checkpoint": str(origin.checkpoint),
        "step": origin.step,
        "tokens": origin.tokens,
        "tasks": {
            task: {
                "ordinal": origin.used.get(task, 0),
                "epochs": facts["epochs_so_far"] - facts["epochs"],
            }
            for task, facts in first.items()
        },
    }


def origin_sentence(origin: dict[str, Any]) -> str:
    """Return what a branch continues, from `origin_summary`."""
    return f"Branch of {origin['source']}: step {origin['step']:,}, {origin['tokens']:,} tokens"


def origin_table(origin: dict[str, Any]) -> Table:
    """Return from where the streams of a branch continue, from `origin_summary`."""
    table = _table("Streams continue")
    table.add_column("task", overflow="fold")
    for column in ("first sample", "epochs before"):
        table.add_column(column, justify="right", overflow="fold")
    for task, facts in origin["tasks"].items():
        table.add_row(Text(task), f"{facts['ordinal']:,}", f"{facts['epochs']:.2f}")
    return table


def _table(title: str) -> Table:
    return Table(
        title=Text(title),
        title_justify="left",
        box=box.SIMPLE,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )


def plan_warnings(summary: dict[str, Any]) -> list[str]:
    """Return one sentence for every task that the run repeats too often."""
    last = summary["phases"][-1]["tasks"]
    return [
        f"{task} is repeated {facts['epochs_so_far']:.1f} times over the run (more than "
        f"{REPEATED_TOO_OFTEN:g}); lower its rate or set mixture.max_epochs"
        for task, facts in last.items()
        if facts["epochs_so_far"] > REPEATED_TOO_OFTEN
    ]


def bos_sentences(bos: int | None, tokenizer: Tokenizer) -> list[str]:
    """Return what precedes the documents, if that is BOS."""
    if bos is None:
        return []
    return [f"Documents begin with the BOS token {tokenizer.piece(bos)}."]


def subsample_sentences(config: RunConfig, summary: dict[str, Any]) -> list[str]:
    """Return one sentence for every task of which only a subsample is trained on."""
    return [
        f"{name} is trained on {facts['documents']:,} documents of {facts['tokens']:,} tokens, a "
        f"subsample of {config.tasks[name].subsample:g} of what is not {_kept_apart(config, name)}"
        for name, facts in summary["tasks"].items()
        if config.tasks[name].trained_on != 1
    ]


def _kept_apart(config: RunConfig, task: str) -> str:
    return "held out or in the test split" if config.test_fraction(task) else "held out"


def batch_sentences(config: RunConfig, summary: dict[str, Any]) -> list[str]:
    """Return one sentence on the batch of every phase, if it changes within the run."""
    phases = summary["phases"]
    if len({stage["samples"] for phase in phases for stage in phase["batch"]}) <= 1:
        return []
    sentences = []
    for number, phase in enumerate(phases):
        seq_len, name = config.phase_batch(number).seq_len, phase["name"]
        parts = [
            f"{stage['samples']:,} sample{'s' * (stage['samples'] != 1)} "
            f"({stage['samples'] * seq_len:,} tokens)" + _from_step(stage["first_step"])
            for stage in phase["batch"]
        ]
        if len(parts) > MOST_STAGES_SHOWN:
            half = MOST_STAGES_SHOWN // 2
            left_out = f"… ({len(parts) - 2 * half:,} more stages, see --json)"
            parts = [*parts[:half], left_out, *parts[-half:]]
        sentences.append(f"Batch of {name}: {', '.join(parts)}")
    return sentences


def loss_weight_sentences(config: RunConfig) -> list[str]:
    """Return one sentence for every phase in which losses have weights other than 1."""
    sentences = []
    for number, phase in enumerate(config.phases):
        weights = config.loss_weights(number)
        if any(weights[task] != 1 for task in config.sampled_tasks(number)):
            parts = (f"{task} {weights[task]:g}" for task in config.sampled_tasks(number))
            sentences.append(f"Weights of losses in {phase.name}: {', '.join(parts)}")
    return sentences


def stop_sentences(config: RunConfig) -> list[str]:
    """Return one sentence for every phase that may end early."""
    sentences = []
    for phase in config.phases:
        reasons = []
        if phase.stop.overfit is not None:
            reasons.append(_overfit(phase, config))
        if phase.stop.loss is not None:
            goals = " and ".join(f"{task} at {loss:g}" for task, loss in phase.stop.loss.items())
            reasons.append(f"loss of {goals}")
        if reasons:
            sentences.append(f"{phase.name} may end earlier: {', or '.join(reasons)}")
    return sentences


def trained_sentences(config: RunConfig) -> list[str]:
    """Return one sentence for every phase that trains the rows of new tokens alone."""
    return [
        f"{phase.name} trains the rows of new tokens alone; memory and time are estimated as if it "
        "trained all weights, which is what they are at most"
        for phase in config.phases
        if phase.trained == "new_embeddings"
    ]


def _from_step(first: int) -> str:
    return f" from step {first + 1:,} of the phase on" if first else ""


def _overfit(phase: PhaseConfig, config: RunConfig) -> str:
    stop = phase.stop.overfit
    assert stop is not None
    tasks = config.selected_tasks(stop.tasks)
    any_of = "any of " if stop.when == "any" and len(tasks) > 1 else ""
    return f"overfit of {any_of}{', '.join(tasks)} (patience {stop.patience})"


def _rates(facts: dict[str, Any], mean: str, from_to: str) -> str:
    if from_to not in facts:
        return _rate(facts[mean])
    start, end = map(_rate, facts[from_to])
    return start if start == end else f"{start} → {end}"


def _rate(rate: float) -> str:
    return f"{rate:.4f}" if rate >= 0.001 or rate == 0 else f"{rate:.1e}"


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def _epochs_so_far(epochs: float) -> Text:
    if epochs > REPEATED_TOO_OFTEN:
        return Text(f"{epochs:.2f} !", style="bold yellow")
    return Text(f"{epochs:.2f}")
