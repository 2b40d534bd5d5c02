"""From a run file and overrides to a checked RunConfig; every error names file and key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from megaphase.callbacks.early_stopping import MONITORED_MEAN
from megaphase.config.run import RunConfig
from megaphase.utils.decimals import as_written
from megaphase.utils.errors import InputError
from megaphase.utils.files import real_path
from megaphase.utils.names import shown
from megaphase.utils.run_files import RUN_FILE
from megaphase.utils.validation_errors import as_input_error, hint
from megaphase.utils.yaml_file import parse_scalar, read_yaml

MOST_DIGITS = 9  # of an entry's number
MOST_PARTS = 100  # of a key's path
SMALLEST_LOSS_WEIGHT = 1e-6  # above 0, as a fraction of the largest weight of the phase


def _check_references(config: RunConfig) -> None:
    """Names that point from one section to another: tasks in mixtures, phases by name."""
    names = [phase.name for phase in config.phases]
    for i, phase in enumerate(config.phases):
        if names.index(phase.name) != i:
            raise InputError(
                config.where(f"phases[{i}].name"),
                f"{phase.name!r} occurs twice",
                "give every phase its own name",
            )
    _check_splits(config)
    _check_apex(config)
    _check_unfreezing(config)
    _check_phase_models(config)
    _check_averages(config)
    for i in range(len(config.phases)):
        config.phase_batch(i)
    for key, mentioned in _mentioned_tasks(config):
        if isinstance(mentioned, str):
            _check_role(config, config.where(key), mentioned)
            continue
        for task in mentioned:
            if task not in config.tasks:
                raise InputError(
                    config.where(key),
                    f"no task {shown(task)} with a corpus under tasks",
                    hint(task, config.tasks, "the tasks are"),
                )
    _check_loss_weights(config)


def _check_splits(config: RunConfig) -> None:
    """Held-out documents and the test split must leave something to train on."""
    for task in config.tasks:
        held_out, test = config.held_out_fraction(task), config.test_fraction(task)
        if as_written(held_out) + as_written(test) >= 1:
            raise InputError(
                config.where(config.test_key(task)),
                f"is {test:g}, and {config.held_out_key(task)} is {held_out:g}: nothing of {task} "
                "is left to train on",
                "lower one of them",
            )


def _check_loss_weights(config: RunConfig) -> None:
    """In every phase, some task that it samples has a weight above 0, and no other weight above 0
    is so much smaller that its losses would be lost in rounding. No other task is given one."""
    for i, phase in enumerate(config.phases):
        weights, sampled = config.loss_weights(i), config.sampled_tasks(i)
        for task in phase.loss_weights or {}:
            if task not in sampled:
                raise InputError(
                    config.where(f"phases[{i}].loss_weights"),
                    f"{phase.name} has {shown(task)} at rate 0, so a weight has no effect",
                    "leave it out, or give the task a rate in the phase's mixture",
                )
        if not any(weights[task] for task in sampled):
            raise InputError(
                config.where(f"phases[{i}].loss_weights"),
                f"the tasks that {phase.name} samples, {', '.join(sampled)}, all have the weight 0",
                "give one of them a weight above 0, here or as tasks.NAME.loss_weight",
            )
        heaviest = max(sampled, key=weights.__getitem__)
        for task in sampled:
            if 0 < weights[task] < SMALLEST_LOSS_WEIGHT * weights[heaviest]:
                own = task in (phase.loss_weights or {})
                raise InputError(
                    config.where(
                        f"phases[{i}].loss_weights.{task}" if own else f"tasks.{task}.loss_weight"
                    ),
                    f"{weights[task]:g} is less than {SMALLEST_LOSS_WEIGHT:g} times the largest "
                    f"weight in {phase.name}, {weights[heaviest]:g} of {heaviest}",
                    "write a larger one, or 0, with which the task trains nothing",
                )


def _check_apex(config: RunConfig) -> None:
    """What `parts.optimizer: apex` cannot do on any machine."""
    if config.parts.optimizer == "apex" and config.optimizer.name != "adamw":
        raise InputError(
            config.where("parts.optimizer"),
            f"apex has adamw alone, and optimizer.name is {config.optimizer.name}",
            "write auto or torch",
        )


def _check_unfreezing(config: RunConfig) -> None:
    """A phase after one that trained some rows alone begins with fresh optimizer state."""
    for i, (before, phase) in enumerate(pairwise(config.phases), 1):
        if before.trained == "new_embeddings" and phase.optimizer_state == "keep":
            raise InputError(
                config.where(f"phases[{i}].optimizer_state"),
                f"is keep, but {before.name} has trained new_embeddings alone",
                "write reset",
            )


def _check_phase_models(config: RunConfig) -> None:
    """A phase's own keys of the model go with those of the model section."""
    model = config.model
    for i, phase in enumerate(config.phases):
        if phase.model is None:
            continue
        if phase.model.sliding_rotary is not None and model.sliding_window is None:
            raise InputError(
                config.where(f"phases[{i}].model.sliding_rotary"),
                "needs model.sliding_window",
                "give that, or leave this out",
            )
        if model.position != "learned":
            continue
        for key in ("rotary_base", "rotary_scaling", "sliding_rotary"):
            if getattr(phase.model, key) is not None:
                where = config.where(f"phases[{i}].model.{key}")
                raise InputError(where, "positions are learned", "leave it out")
        if (phase.model.seq_len or 0) > model.seq_len:
            raise InputError(
                config.where(f"phases[{i}].model.seq_len"),
                f"is {phase.model.seq_len:,}, but there are learned positions for model.seq_len "
                f"{model.seq_len:,} alone",
                "lower it, or use rotary positions",
            )


def _check_averages(config: RunConfig) -> None:
    """A phase that begins from an average follows one that has it, which is not on a disk."""
    for i, (before, phase) in enumerate(pairwise(config.phases), 1):
        if phase.begin_from == "average" and before.average is None:
            raise InputError(
                config.where(f"phases[{i}].begin_from"),
                f"is average, but {before.name} has none",
                f"set phases[{i - 1}].average, or write weights",
            )
    for i, phase in enumerate(config.phases):
        if phase.average is None:
            continue
        if config.parallel.offload == "nvme":
            raise InputError(
                config.where(f"phases[{i}].average"),
                "does not go with parallel.offload: nvme, where it would read all weights from "
                "the disk",
                "offload to cpu, or average checkpoints with `megaphase convert average`",
            )


def _mentioned_tasks(config: RunConfig) -> Iterator[tuple[str, str | list[str]]]:
    """Every place that names tasks, by a role or one by one."""
    for i, phase in enumerate(config.phases):
        place = f"phases[{i}]"
        yield f"{place}.mixture.rates", list(phase.mixture.rates or {})
        yield f"{place}.mixture.over", phase.mixture.over or []
        yield f"{place}.epochs", list(phase.epochs or {})
        yield f"{place}.loss_weights", list(phase.loss_weights or {})
        yield f"{place}.stop.loss", list(phase.stop.loss or {})
        if phase.stop.overfit is not None:
            yield f"{place}.stop.overfit.tasks", phase.stop.overfit.tasks
    yield "monitor.tasks", config.monitor.tasks or []
    yield "monitor.weights", list(config.monitor.weights or {})


def _check_monitor(config: RunConfig) -> None:
    """Weights are of the monitor's tasks, and no task is called as their mean is."""
    tasks = config.selected_tasks(config.monitor.tasks or [])
    if MONITORED_MEAN in tasks:
        raise InputError(
            config.where("monitor.tasks"),
            f"{MONITORED_MEAN!r} is also what the best weighted mean is kept as",
            "rename the task",
        )
    if config.monitor.weights and not tasks:
        raise InputError(
            config.where("monitor.weights"), "there are no monitor.tasks", "name them, too"
        )
    for task in config.monitor.weights or {}:
        if task not in tasks:
            raise InputError(
                config.where(f"monitor.weights.{task}"),
                f"{task} is none of monitor.tasks, which are {', '.join(tasks)}",
                "add it to them, or leave it out here",
            )


def _check_role(config: RunConfig, where: str, role: str) -> None:
    if config.tasks_with_role(role):
        return
    roles = sorted({task.role for task in config.tasks.values() if task.role is not None})
    if role in config.tasks:
        remedy = f"for the task write [{role}]"
    elif roles:
        remedy = hint(role, roles, "the roles are")
    else:
        remedy = "set tasks.NAME.role, or give a list of tasks"
    raise InputError(where, f"no task has the role {shown(role)}", remedy)


def _apply_override(path: Path, data: dict[str, Any], override: str) -> None:
    """Set `phases.0.learning_rate.peak=1e-3` in the parsed file, before it is checked."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"override {shown(override)}", "this is not key.path=value")
    set_value(path, data, key, parse_scalar(text), f"override {shown(override)}")


def set_value(path: Path, data: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set the value at a key's path, such as `phases.0.learning_rate.peak`, in a parsed run file.

    where: what asks for it, for messages.

    Raises:
        InputError: the path leads through something that has no such key.
    """
    parts = key.replace("[", ".").replace("]", "").split(".")
    if len(parts) > MOST_PARTS:
        raise InputError(where, f"a key has at most {MOST_PARTS} parts, this has {len(parts)}")
    node: Any = data
    depth = 0
    while True:
        here = ".".join(parts[:depth])
        taken = 1
        if isinstance(node, list):
            number = _index(parts[depth])
            if number is None or number >= len(node):
                raise InputError(
                    where,
                    f"{here} in {path} is a list of {len(node)}",
                    "name an entry by its number, from 0",
                )
            index: Any = number
        elif isinstance(node, dict):
            index, taken = _known_key(node, parts[depth:])
        else:
            raise InputError(where, f"{here} in {path} holds no keys")
        depth += taken
        if depth == len(parts):
            node[index] = value
            return
        if isinstance(node, dict) and node.get(index) is None:
            node[index] = {}  # a section that is not there yet, or has nothing below it
        node = node[index]


def _known_key(node: dict[str, Any], parts: list[str]) -> tuple[str, int]:
    """Return a path's next key and its number of parts: a task's name may contain dots."""
    for taken in range(len(parts), 1, -1):
        if (key := ".".join(parts[:taken])) in node:
            return key, taken
    return parts[0], 1


def _index(part: str) -> int | None:
    """The number of an entry of a list."""
    return int(part) if part.isascii() and part.isdigit() and len(part) <= MOST_DIGITS else None


def load_run_file(path: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read, override and check a run file.

    Raises:
        InputError: naming the file, the key's path and the remedy.
    """
    data = read_yaml(path)
    for override in overrides:
        _apply_override(path, data, override)
    return run_config(path, data)


def load_run(run: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the run file of a run directory, whose `output` is then this directory, or a run file.

    Raises:
        InputError: naming the file, the key's path and the remedy.
    """
    if not run.is_dir():
        return load_run_file(run, tuple(overrides))
    if not (run / RUN_FILE).is_file():
        raise InputError(run, f"is not a run directory: it has no {RUN_FILE}", "give a run file")
    config = load_run_file(run / RUN_FILE, tuple(overrides))
    moved = config.model_copy(update={"output": real_path(run)})
    moved._path = config._path
    return moved


def with_absolute_paths(data: Mapping[str, Any], config: BaseModel) -> dict[str, Any]:
    """Return the content of a run file, or of a section, with absolute paths; config: the same,
    checked."""

    def absolute(value: Any, checked: Any) -> Any:
        if isinstance(checked, Path) and isinstance(value, str):
            return str(checked)
        if isinstance(value, dict) and isinstance(checked, BaseModel):
            return with_absolute_paths(value, checked)
        if isinstance(value, dict) and isinstance(checked, dict):
            return {key: absolute(each, checked.get(key)) for key, each in value.items()}
        return value

    return {key: absolute(value, getattr(config, key, None)) for key, value in data.items()}


def run_config(path: Path, data: dict[str, Any]) -> RunConfig:
    """Check the content of a run file; `path`: its file, which may not exist yet.

    Raises:
        InputError: naming the file, the key's path and the remedy.
    """
    try:
        config = RunConfig.model_validate(data, context=real_path(path.parent))
    except ValidationError as error:
        raise as_input_error(path, error) from None
    config._path = path
    _check_references(config)
    _check_monitor(config)
    return config
