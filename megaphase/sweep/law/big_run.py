"""The run for which phases are recommended: its size, its budget and its corpora."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaphase.config.load import run_config
from megaphase.config.run import RunConfig
from megaphase.corpus.manifest import corpus_file
from megaphase.plan.corpus_counts import CorpusCounts
from megaphase.plan.spec import verified_corpora
from megaphase.plan.task_corpora import bos_token, check_task, check_task_corpus, open_streams
from megaphase.sweep.law.model_size import parameters_without_vocabulary
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError
from megaphase.utils.validation_errors import hint
from megaphase.utils.yaml_file import read_yaml

EPOCH_TOKENS = "--epoch-tokens"
# The keys of a phase that a recommendation has instead.
REPLACED = {
    *("name", "steps", "tokens", "epochs"),
    *("mixture", "learning_rate", "optimizer_state"),
}


@dataclass(frozen=True)
class BigRun:
    """A run file whose phases are to be chosen.

    Attributes:
        data: its content as it is written.
        steps: the budget in optimizer steps, over all phases.
        step_tokens: tokens of one step.
        unique: training tokens of one epoch, by task, with the padding of packed samples.
    """

    path: Path
    data: Mapping[str, Any]
    config: RunConfig
    steps: int
    step_tokens: int
    unique: Mapping[str, int]

    @property
    def model(self) -> Mapping[str, Any]:
        """The section `model`."""
        model: Mapping[str, Any] = self.data["model"]
        return model

    @property
    def parameters(self) -> int:
        """Of the model, without embeddings and output projection."""
        return parameters_without_vocabulary(self.model)


def read_big_run(
    path: Path,
    tasks: Sequence[str],
    *,
    steps: int | None,
    tokens: int | None,
    epoch_tokens: Sequence[str],
) -> BigRun:
    """Read the run file.

    tasks: of the sweep. steps, tokens: the budget, in place of that of the file's phases.
    epoch_tokens: NAME=N, for corpora that do not exist yet.

    Raises:
        InputError: names the key and the remedy.
    """
    data = read_yaml(path)
    if not data.get("phases"):
        # The rest is checked with a phase of which nothing but the budget is used.
        data["phases"] = [_any_phase(steps or 1)]
        if steps is None and tokens is None:
            raise InputError(f"{path}: phases", "there are none", "add --steps or --tokens")
    config = run_config(path, data)
    _check_tasks(config, tasks)
    _check_phases(config)
    batch = config.phase_batch(0)
    step_tokens = batch.samples * batch.seq_len
    given = _given_tokens(epoch_tokens, tasks)
    unique = {task: given.get(task, 0) for task in tasks}
    if missing := [task for task in tasks if task not in given]:
        unique |= _of_corpora(config, missing)
    if steps is None:
        steps = -(-tokens // step_tokens) if tokens is not None else _planned_steps(config)
    if steps < 2:
        raise InputError(path, f"the budget is {steps} step", "give a longer one with --steps")
    return BigRun(path, data, config, steps, step_tokens, unique)


def _any_phase(steps: int) -> dict[str, Any]:
    return {
        "name": "any",
        "steps": steps,
        "mixture": {"proportional": True},
        "learning_rate": {"peak": 1e-3},
    }


def _check_tasks(config: RunConfig, tasks: Sequence[str]) -> None:
    for task in tasks:
        if task not in config.tasks:
            raise InputError(
                config.where(f"tasks.{task}"),
                "the sweep has this task, the run has not",
                "add it; the law holds for the same tasks",
            )
    for task in config.tasks:
        if task not in tasks:
            raise InputError(
                config.where(f"tasks.{task}"),
                "the sweep has no such task, so the law knows nothing of it",
                "leave it out, or add it to the sweep",
            )


def _check_phases(config: RunConfig) -> None:
    """Reject keys of phases that the recommended phases, which replace them, would lack."""
    for number, phase in enumerate(config.phases):
        own = phase.model_dump(exclude_unset=True, exclude_defaults=True)
        if lost := next((key for key in own if key not in REPLACED), None):
            raise InputError(
                config.where(f"phases[{number}].{lost}"),
                "the recommended phases replace this one, without it",
                "leave it out, and add it to them",
            )
    if config.phase_batch(0).ramp is not None:
        raise InputError(
            config.where("batch"),
            "the batch changes over the run, which the law does not know",
            "give it one size",
        )


def _given_tokens(texts: Sequence[str], tasks: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for text in texts:
        name, separator, number = text.rpartition("=")
        digits = number.replace("_", "")
        if not separator or not (digits.isascii() and digits.isdigit()) or len(digits) > 18:
            raise InputError(f"{EPOCH_TOKENS} {text}", "this is not NAME=N", "write hi=2000000")
        if name not in tasks:
            raise InputError(
                f"{EPOCH_TOKENS} {text}", f"no task {name!r}", hint(name, tasks, "the tasks are")
            )
        if int(digits) < 1:
            raise InputError(f"{EPOCH_TOKENS} {text}", "is below 1", "give the tokens of an epoch")
        found[name] = int(digits)
    return found


def _of_corpora(config: RunConfig, missing: Sequence[str]) -> dict[str, int]:
    """Return the training tokens of one epoch of the tasks' corpora, with the padding of packed
    samples."""
    for task in missing:
        if not corpus_file(config.corpus(task), ".bin").exists():
            raise InputError(
                config.where(f"tasks.{task}.corpus"),
                f"{config.corpus(task)} does not exist yet",
                f"make it, or add {EPOCH_TOKENS} {task}=N with the training tokens of an epoch",
            )
    # The corpora of the others need not exist.
    asked = config.model_copy(update={"tasks": {task: config.tasks[task] for task in missing}})
    corpora = verified_corpora(asked)
    of_tasks = {task: corpora[asked.corpus(task)] for task in missing}
    tokenizer = Tokenizer.load(config.tokenizer)
    for task, corpus in of_tasks.items():
        check_task_corpus(asked, task, tokenizer, corpus)
    bos, known = bos_token(asked, tokenizer), CorpusCounts()
    streams = open_streams(asked, of_tasks, bos, "training", known)
    held_out = open_streams(asked, of_tasks, bos, "validation", known)
    test = open_streams(asked, of_tasks, bos, "test", known)
    for task in missing:
        check_task(asked, task, streams[task], held_out[task], test.get(task), known)
    return {task: each.samples_per_epoch * each.seq_len for task, each in streams.items()}


def _planned_steps(config: RunConfig) -> int:
    """Return the steps of the file's phases."""
    total = 0
    for number, phase in enumerate(config.phases):
        if phase.steps is not None:
            total += phase.steps
        elif phase.tokens is not None:
            batch = config.phase_batch(number)
            total += -(-phase.tokens // (batch.samples * batch.seq_len))
        else:
            raise InputError(
                config.where(f"phases[{number}].epochs"),
                "the budget is not given in steps or tokens",
                "add --steps or --tokens",
            )
    return total
