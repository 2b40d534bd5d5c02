"""Benchmarks of lm-evaluation-harness: found by name, loaded, run on a served model."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megaphase.harness.results import BenchmarkResults, Groups, results_of
from megaphase.harness.service import ComputingError, ModelService
from megaphase.utils.errors import InputError, RunError
from megaphase.utils.validation_errors import hint

# Of lm-evaluation-harness, for the choice of the examples in contexts.
_SEED = 1234
_RESAMPLES = 100_000  # for the standard errors that have no formula; lm-evaluation-harness's number
_NETWORK_ERRORS = (
    "ConnectionError",
    "ConnectError",
    "ConnectTimeout",
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
    "MaxRetryError",
    "ReadTimeout",
)
INSTALL = 'pip install "megaphase[lm-eval]"'


@dataclass(frozen=True)
class BenchmarkChoice:
    """Which benchmarks, and how.

    Attributes:
        tasks: names of tasks, groups or tags of lm-evaluation-harness, or patterns of them.
        where: what names them for messages, such as --harness.
        tasks_path: a folder with more task files; None: only those of lm-evaluation-harness.
        limit: most documents of each task; None: all.
        fewshot: examples in the context; None: as each task says.
        groups: of tasks, whose mean figures are wanted.
        standard_errors: whether to compute them where that takes resampling.
        all_groups_needed: whether a group without a task is a mistake.
    """

    tasks: Sequence[str]
    where: str
    tasks_path: Path | None = None
    limit: int | None = None
    fewshot: int | None = None
    groups: Groups = field(default_factory=dict)
    standard_errors: bool = True
    all_groups_needed: bool = True


class Benchmarks:
    """The tasks of a choice, loaded; exists on rank 0 alone.

    Attributes:
        tasks: the names of the tasks.
    """

    def __init__(self, choice: BenchmarkChoice) -> None:
        """Find and load the tasks and their documents.

        Raises:
            InputError: lm-evaluation-harness is not installed, there is no such task, a group has
                none of the tasks, or a data set is neither here nor can be fetched.
        """
        self._choice = choice
        require_harness(choice.where)
        with _quiet():
            manager = _manager(choice)
            names = _names(choice, manager.all_subtasks, manager.all_tasks)
            self._loaded = _loaded(choice, manager, names)
        self.tasks: list[str] = list(self._loaded["tasks"])
        for group, patterns in choice.groups.items() if choice.all_groups_needed else ():
            if not any(fnmatchcase(task, each) for task in self.tasks for each in patterns):
                raise InputError(
                    choice.where,
                    f"group {group}: {', '.join(patterns)} is none of the tasks",
                    hint(patterns[0], self.tasks, "the tasks are"),
                )

    def run(self, service: ModelService) -> BenchmarkResults:
        """Return the model's results; on rank 0 within `ModelService.serve`.

        Raises:
            InputError: a task asks for something that is not supported.
            RunError: a task fails.
        """
        from lm_eval import __version__
        from lm_eval.evaluator import evaluate

        from megaphase.harness.language_model import ServedModel

        choice = self._choice
        with _quiet(), _random_states_kept():
            _seed()
            for task in self._loaded["tasks"].values():
                task.set_fewshot_seed(seed=_SEED)
            try:
                found = evaluate(
                    lm=ServedModel(service),
                    task_dict=self._loaded,
                    limit=choice.limit,
                    bootstrap_iters=_RESAMPLES if choice.standard_errors else 0,
                    log_samples=False,
                )
            except (InputError, RunError, ComputingError):
                raise
            except Exception as error:  # whatever a task's own code raises
                raise RunError(f"lm-evaluation-harness has failed: {_in_a_line(error)}") from error
        return results_of(found, choice.groups, __version__)


def require_harness(where: str) -> None:
    """Raise InputError if lm-evaluation-harness is not installed; where: what asks for it."""
    try:
        import_module("lm_eval.evaluator")
    except ImportError as error:
        missing = error.name or "lm_eval"
        raise InputError(
            where, f"needs lm-evaluation-harness ({missing} is not installed)", INSTALL
        ) from None


def _manager(choice: BenchmarkChoice) -> Any:
    """The index of tasks: those of the folder alone if it has all, which takes no time."""
    from lm_eval.tasks import TaskManager

    if choice.tasks_path is None:
        return TaskManager()
    if not choice.tasks_path.is_dir():
        raise InputError(choice.tasks_path, "is not a directory", "give a folder of task files")
    own = TaskManager(include_path=str(choice.tasks_path), include_defaults=False)
    if set(choice.tasks) <= set(own.all_subtasks):
        return own
    return TaskManager(include_path=str(choice.tasks_path))


def _names(choice: BenchmarkChoice, tasks: Sequence[str], known: Sequence[str]) -> list[str]:
    """The chosen names; a pattern stands for tasks or, if it matches none, for groups and tags.

    known: names of tasks, groups and tags.
    """
    found: dict[str, None] = {}
    for name in choice.tasks:
        matching = [name] if name in known else [each for each in tasks if fnmatchcase(each, name)]
        matching = matching or [each for each in known if fnmatchcase(each, name)]
        if not matching:
            remedy = hint(name, known, "see `lm-eval ls tasks`; there are") if known else ""
            if len(remedy) > 200:
                remedy = "see `lm-eval ls tasks`"
            if choice.tasks_path is None:
                option = "--tasks-path" if choice.where.startswith("--") else "tasks_path"
                remedy += f"{', or ' if remedy else ''}give {option} DIR, the folder of its file"
            raise InputError(choice.where, f"there is no task {name!r}", remedy)
        found |= dict.fromkeys(matching)
    return list(found)


def _loaded(choice: BenchmarkChoice, manager: Any, names: Sequence[str]) -> Any:
    try:
        loaded = manager.load(list(names))
    except InputError:
        raise
    except Exception as error:  # of many libraries, and of a task's own code
        raise _not_loaded(choice, error) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            problem = f"{name} executes code that the model writes"
            raise InputError(choice.where, problem, "leave it out")
        if choice.fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=choice.fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def _not_loaded(choice: BenchmarkChoice, error: Exception) -> InputError:
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    names = {kind.__name__ for each in causes for kind in type(each).__mro__}
    offline = any(
        os.environ.get(name, "0").upper() in ("1", "TRUE", "YES", "ON")
        for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE")
    )
    is_missing = isinstance(error, OSError) or "Couldn't find cache" in str(error)
    if names & set(_NETWORK_ERRORS) or (offline and is_missing):
        return InputError(
            choice.where,
            f"a data set is not on this machine and cannot be fetched ({_in_a_line(error)})",
            "fetch it where there is network, with the same HF_HOME: see docs/benchmarks.md",
        )
    return InputError(
        choice.where,
        f"a task cannot be loaded: {_in_a_line(error)}",
        "see its file, or leave it out",
    )


def _in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the messages and progress bars of lm_eval and datasets out of the run's output."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "evaluate")]
    levels = [logger.level for logger in loggers]
    nowhere = io.StringIO()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _seed() -> None:
    """Seed the generators as `lm_eval` does."""
    random.seed(0)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    """Leave the random generators of the process as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
