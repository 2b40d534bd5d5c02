"""Checks of all runs of a sweep before one is started: their run files, and whether the text
suffices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from megaphase.config.load import run_config
from megaphase.config.run import RunConfig
from megaphase.optim.parameter_state import stored_by
from megaphase.plan.mixture import effective_rates
from megaphase.plan.spec import plan_spec
from megaphase.sweep.arms.config import PHASES
from megaphase.sweep.sweep import END_AFTER, Sweep, blamed_setting
from megaphase.sweep.trials import Trial
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError


def check_run_files(sweep: Sweep, trials: Sequence[Trial]) -> None:
    """Check the run files of all runs, that all have the same test split, and that a phase can keep
    the state of its optimizer.

    Raises:
        InputError: names the run, or the phase of the arm.
    """
    configs: dict[str, RunConfig] = {}
    for trial in trials:
        where = f"{sweep.file}: run {trial.name}"
        try:
            config = run_config(Path(where), dict(trial.run))
        except InputError as error:
            key = error.where.removeprefix(f"{where}: ")
            arm = _arm_of(sweep, trial, trials)
            if arm is None or not key.startswith("phases[0]"):
                raise _blamed(sweep, trial, error, key) from None
            raise InputError(
                f"{_phase_of(sweep, arm, trial)}{key.removeprefix('phases[0]')}",
                error.problem,
                error.remedy,
            ) from None
        if config.checkpoint.end_after is not None:
            key = "checkpoint.end_after"
            found = InputError(f"{where}: {key}", END_AFTER, "leave it out")
            raise _blamed(sweep, trial, found, key)
        configs[trial.name] = config
        _check_comparable(sweep, trial, trials, config, configs[trials[0].name])
        if trial.source is None or config.phases[0].optimizer_state != "keep":
            continue
        before, own = (stored_by(each.optimizer) for each in (configs[trial.source], config))
        if before != own:
            arm = _arm_of(sweep, trial, trials) or trial.arm
            raise InputError(
                f"{_phase_of(sweep, arm, trial)}.optimizer_state",
                f"is keep, but the phase before has the state of {before}, and this one of {own}",
                "write reset, or take the same optimizer",
            )


def _blamed(sweep: Sweep, trial: Trial, error: InputError, key: str) -> InputError:
    """Return the error at the key of the sweep file from which the run has the value."""
    models = sweep.config.models
    arm = sweep.config.arms.get(trial.arm)  # none for first stages that arms share
    own = None if arm is None else blamed_setting(arm.settings, key, error.problem)
    if own is not None:
        where = f"arms.{trial.arm}.settings.{own}"
    elif trial.model is not None and key.split(".")[0] == "model":
        keys = [f"model.{each}" for each in models[trial.model]]
        name = blamed_setting(keys, key, error.problem)
        if name is None:
            return error
        where = f"models.{trial.model}.{name.removeprefix('model.')}"
    else:
        return error
    return InputError(sweep.where(where), error.problem, error.remedy)


def _check_comparable(
    sweep: Sweep, trial: Trial, trials: Sequence[Trial], config: RunConfig, first: RunConfig
) -> None:
    """Reject arms and models that are measured on other text than others, or trained on more."""

    def refuse(what: str, remedy: str) -> InputError:
        models = (name for name, keys in sweep.config.models.items() if "seq_len" in keys)
        model = next(models, None) if what == "model.seq_len" else None
        arm = _final_arm(trial, trials) or trial.arm
        return InputError(
            sweep.where(f"arms.{arm}" if model is None else f"models.{model}"),
            f"changes {what}, which must be the same in all arms and models",
            remedy,
        )

    same = "set it in the run file, or under settings of the sweep file"
    phase, other_phase = config.phase_batch(0), first.phase_batch(0)
    if phase.ramp is not None:
        # It would begin again in every stage, since each is a run of its own.
        raise refuse("the tokens of a step by a ramp", "leave the ramp out")
    for what, value, other in (
        ("the tokenizer", config.tokenizer, first.tokenizer),
        ("bos", config.bos, first.bos),
        ("model.seq_len", config.model.seq_len, first.model.seq_len),
        ("batch.samples", config.batch.samples, first.batch.samples),
        (
            "the tokens of a step",
            phase.samples * phase.seq_len,
            other_phase.samples * other_phase.seq_len,
        ),
        # Losses are of samples of the last phase's length.
        (
            "model.seq_len",
            phase.seq_len if trial.is_final else config.model.seq_len,
            first.model.seq_len,
        ),
        ("validation.samples", config.validation.samples, first.validation.samples),
        ("validation.harness", config.validation.harness, first.validation.harness),
        # A relative path under an arm's settings has no file that it could be relative to.
        (
            "parallel.offload_folder",
            config.parallel.offload_folder,
            first.parallel.offload_folder,
        ),
    ):
        if value != other:
            raise refuse(what, same)
    for task in config.tasks:
        if config.tasks[task].corpus != first.tasks[task].corpus:
            raise refuse(f"the corpus of {task}", same)
        attends, attended = (each.tasks[task].attends_across_documents for each in (config, first))
        if attends != attended:
            # Where they do not, the first token of a document is not measured.
            raise refuse(f"tasks.{task}.attend_across_documents", same)
        if _splits(config, task) != _splits(first, task):
            raise refuse(
                f"the held-out documents or the test split of {task}",
                "set them in the run file, or under settings or test of the sweep file",
            )


def _splits(config: RunConfig, task: str) -> tuple[float, float, int]:
    """Return what determines the held-out and test documents of a task."""
    return config.held_out_fraction(task), config.test_fraction(task), config.test.samples


def _arm_of(sweep: Sweep, trial: Trial, trials: Sequence[Trial]) -> str | None:
    """Return an arm of phases to which a run belongs; None if it is of a short form."""
    arm = _final_arm(trial, trials)
    return arm if arm is not None and sweep.kind(arm) == PHASES else None


def _final_arm(trial: Trial, trials: Sequence[Trial]) -> str | None:
    """Return an arm to which a run belongs; None if no run starts from it."""
    while not trial.is_final:
        branch = next((each for each in trials if each.source == trial.name), None)
        if branch is None:  # of a peak that was not taken for the best one
            return None
        trial = branch
    return trial.arm


def _phase_of(sweep: Sweep, arm: str, trial: Trial) -> str:
    return sweep.where(f"arms.{arm}.phases[{len(trial.phases) - 1}]")


def check_demands(sweep: Sweep, trials: Iterable[Trial]) -> None:
    """Check that no phase wants more samples than `max_epochs` leaves of its tasks.

    Raises:
        InputError: names the arm and the phase.
    """
    tokenizer = None
    checked = set()
    for trial in trials:
        # The learning rate changes nothing, so one peak stands for all.
        phases = [phase | {"learning_rate": {"peak": 1.0}} for phase in trial.phases]
        key = str((trial.arm, trial.run["model"], phases))
        capped = any("max_epochs" in phase["mixture"] for phase in phases)
        if not trial.is_final or not capped or key in checked:
            continue
        checked.add(key)
        tokenizer = tokenizer or Tokenizer.load(Path(sweep.base["tokenizer"]))
        spec = plan_spec(run_config(sweep.file, dict(trial.run) | {"phases": phases}), tokenizer)
        places = list(spec.starts)
        for number, phase in enumerate(spec.phases):
            where = sweep.where(f"arms.{trial.arm}.phases[{number}].mixture")
            supply = spec.supply(number, places)
            rates = effective_rates(phase.mixture, supply, phase.samples, where)
            places = [
                place.after(stream.kind_of(phase.kind), int(rates[task] * phase.samples))
                for (task, stream), place in zip(spec.task_streams.items(), places, strict=True)
            ]
