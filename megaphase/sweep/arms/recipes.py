"""The recipes of an arm: its phases with one value for every key, apart from peaks and seeds.

Short forms become phases like those of any other arm; only the names of their runs differ.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError, create_model

from megaphase.config.load import set_value
from megaphase.config.run import RunConfig
from megaphase.sweep.arms.config import (
    CONTINUE,
    PRETRAIN,
    STAGED,
    Arm,
    ArmPhase,
    PhaseKeys,
    PhaseSchedule,
)
from megaphase.sweep.arms.lengths import spans
from megaphase.sweep.arms.setting import Mixture, number_in_name
from megaphase.sweep.arms.stages import Recipe, Stage, digest, identity
from megaphase.sweep.arms.values import Axes, check_number, combinations
from megaphase.sweep.sweep import Sweep
from megaphase.utils.errors import InputError
from megaphase.utils.validation_errors import as_input_error

JOINT, STATIC, RESTART, LOW_ONLY, KEEP = "joint", "static", "restart", "low-only", "keep"

# `phases[1].order` or `phases[*].average.kind` in an arm's settings.
_OF_PHASE = re.compile(r"phases\[(\d+|\*)\]\.((\w+).*)")
# What a phase may change of the run file: the samples, the model and the validation stay the same.
_OWN_SETTINGS = re.compile(r"(optimizer|faults)(\.|$)|model\.dropout$")

# The schema of a phase's keys, with that of its settings.
_TriedPhase = create_model("_TriedPhase", __base__=ArmPhase, settings=(RunConfig, ...))

RawPhases = Sequence[dict[str, Any]]


class _Alternative(NamedTuple):
    """A phase with one of the values for every key, and all peaks to be tried."""

    axes: Axes
    phase: ArmPhase
    peaks: Sequence[float]


@dataclass(frozen=True)
class _Form:
    """Phases whose values may still be several; of a short form with its share and mixture."""

    phases: RawPhases
    share: float | None = None
    mixture: Mixture = field(default_factory=Mixture)


def arm_recipes(sweep: Sweep, name: str) -> list[Recipe]:
    """Return the recipes of an arm, in the order of the file.

    Raises:
        InputError: a phase is invalid, or its length does not fit the budget.
    """
    return list(_Recipes(sweep, name, sweep.config.arms[name]).all())


@dataclass(frozen=True)
class _Recipes:
    sweep: Sweep
    name: str
    arm: Arm

    @property
    def where(self) -> str:
        return self.sweep.where(f"arms.{self.name}")

    @property
    def is_short(self) -> bool:
        return not self.arm.phases

    def all(self) -> Iterator[Recipe]:
        settings, of_phases = self._split_settings()
        for form in self._forms():
            phases = self._with_settings(form.phases, of_phases)
            by_phase = [self._alternatives(number, raw) for number, raw in enumerate(phases)]
            of_run = combinations(settings, RunConfig, "settings", f"{self.where}.settings")
            check_number(self.where, [*map(len, by_phase), len(of_run)])
            for chosen, (setting_axes, values) in product(product(*by_phase), of_run):
                axes = tuple(each for own in chosen for each in own.axes) + setting_axes
                stages = self._stages(chosen, values)
                yield Recipe(self.name, self._named(form, stages, axes), axes, self.is_short)

    def _forms(self) -> Iterator[_Form]:
        """Yield the phases of the arm; of a short form for each share and mixture."""
        if not self.is_short:
            yield _Form(self.arm.phases)
            return
        kind = self.sweep.kind(self.name)
        for share in self.arm.pretrain if kind in STAGED else [None]:
            for mixture in self._mixtures(kind):
                yield _Form(_short_phases(kind, share, mixture), share, mixture)

    def _mixtures(self, kind: str) -> list[Mixture]:
        if kind == LOW_ONLY:
            return [Mixture(rate=1.0)]
        rates = [Mixture(rate=rate) for rate in self.arm.rates]
        return rates + [Mixture(temperature=each) for each in self.arm.temperatures]

    def _split_settings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the settings of the run file, and those of phases."""
        keys = {key for key in self.arm.settings if _OF_PHASE.fullmatch(key)}
        settings = self.arm.settings
        return (
            {key: value for key, value in settings.items() if key not in keys},
            {key: value for key, value in settings.items() if key in keys},
        )

    def _with_settings(self, phases: RawPhases, settings: Mapping[str, Any]) -> RawPhases:
        phases = copy.deepcopy(list(phases))
        for key, value in settings.items():
            found = _OF_PHASE.fullmatch(key)
            assert found is not None
            which, path, head = found.groups()
            where = f"{self.where}.settings.{key}"
            if head not in PhaseKeys.model_fields:
                raise InputError(where, "the sweep sets this", "leave it out")
            if which != "*" and int(which) >= len(phases):
                raise InputError(
                    where, f"the arm has {len(phases)} phases", "number them from 0, or write *"
                )
            for phase in phases if which == "*" else [phases[int(which)]]:
                set_value(self.sweep.file, phase, path, copy.deepcopy(value), where)
        return phases

    def _alternatives(self, number: int, raw: dict[str, Any]) -> list[_Alternative]:
        """Return every combination of the values of a phase, with the peaks to be tried."""
        where, axis = f"{self.where}.phases[{number}]", f"phases[{number}]"
        raw, peaks = dict(raw), []
        rate = raw.get("learning_rate")
        if isinstance(rate, dict) and rate.get("peak") is not None:
            given = combinations(
                {"peak": rate["peak"]}, PhaseSchedule, "", f"{where}.learning_rate"
            )
            peaks = [value["peak"] for _, value in given]
            if None in peaks:
                raise InputError(
                    f"{where}.learning_rate.peak",
                    "one of the values to try is empty",
                    "write a number, or leave it out",
                )
            raw["learning_rate"] = {key: rate[key] for key in rate if key != "peak"}
        found = []
        for axes, values in combinations(raw, _TriedPhase, axis, where):
            for peak in peaks:
                rate = values["learning_rate"] | {"peak": peak}
                self._checked(where, values | {"learning_rate": rate})
            phase = self._checked(where, values)
            found.append(_Alternative(axes, phase, peaks or self._peaks(phase)))
        return found

    def _peaks(self, phase: ArmPhase) -> Sequence[float]:
        rate = phase.learning_rate
        if isinstance(rate, PhaseSchedule) and rate.peak is not None:  # one of several schedules
            return [rate.peak]
        return self.sweep.config.learning_rate.peaks

    def _checked(self, where: str, values: dict[str, Any]) -> ArmPhase:
        try:
            phase = ArmPhase.model_validate(values)
            if isinstance(phase.learning_rate, PhaseSchedule):
                phase.learning_rate.over(self.sweep.config.learning_rate)
        except ValidationError as error:
            found = as_input_error(Path("?"), error)
            key = found.where.removeprefix("?").removeprefix(": ")
            where = f"{where}.{key}" if key else where
            raise InputError(where, found.problem, found.remedy) from None
        except ValueError as error:
            raise InputError(f"{where}.learning_rate", str(error)) from None
        for key in phase.settings:
            if not _OWN_SETTINGS.match(key):
                raise InputError(
                    f"{where}.settings.{key}",
                    "a phase has settings of optimizer, faults and model.dropout alone",
                    "write it under the arm's settings, for all of its phases",
                )
        return phase

    def _stages(self, chosen: Sequence[_Alternative], settings: dict[str, Any]) -> list[Stage]:
        phases = [each.phase for each in chosen]
        self._check_sequence(phases)
        lengths = spans(self.sweep, self.where, self.arm, phases, is_short=self.is_short)
        stages: list[Stage] = []
        for number, phase in enumerate(phases):
            first = number
            while phases[first].learning_rate == CONTINUE:
                first -= 1
            end = number
            while end + 1 < len(phases) and phases[end + 1].learning_rate == CONTINUE:
                end += 1
            schedule = phases[first].learning_rate
            assert isinstance(schedule, PhaseSchedule)
            stages.append(
                Stage(
                    number=number,
                    name=self._phase_name(number, phase),
                    phase=phase,
                    peaks=chosen[first].peaks,
                    span=lengths[number],
                    schedule_span=lengths[first].joined(lengths[end]),
                    grid=schedule.over(self.sweep.config.learning_rate),
                    scale_with_batch=schedule.scale_with_batch,
                    settings=settings | phase.settings,
                )
            )
        return stages

    def _phase_name(self, number: int, phase: ArmPhase) -> str:
        if phase.name is not None:
            return phase.name
        is_first = number == 0 and phase.rate == 0
        return PRETRAIN if is_first else f"phase-{number + 1}"

    def _check_sequence(self, phases: Sequence[ArmPhase]) -> None:
        """Refuse what a phase could not begin with after the one before it."""
        names = [self._phase_name(*each) for each in enumerate(phases)]
        for number, phase in enumerate(phases):
            where = f"{self.where}.phases[{number}]"
            before = phases[number - 1] if number else None
            if names[number] in names[:number]:
                raise InputError(
                    f"{where}.name", f"{names[number]!r} occurs twice", "rename one of them"
                )
            if before is None:
                for key, asks in (
                    ("learning_rate", phase.learning_rate == CONTINUE),
                    ("optimizer_state", phase.optimizer_state == KEEP),
                    ("begin_from", phase.begin_from == "average"),
                ):
                    if asks:
                        raise InputError(
                            f"{where}.{key}", "there is no phase before this one", "leave it out"
                        )
                continue
            if phase.begin_from == "average" and before.average is None:
                raise InputError(
                    f"{where}.begin_from",
                    "is average, but the phase before has none",
                    f"set phases[{number - 1}].average, or leave it out",
                )
            changed = before.model.given if before.model is not None else ()
            own = phase.model.given if phase.model is not None else ()
            if lost := next((key for key in changed if key not in own), None):
                raise InputError(
                    f"{where}.model.{lost}",
                    "this key is missing, and the phase before has its own",
                    "write the value of this phase",
                )
        if phases[-1].average is not None and self.arm.early_stopping is not None:
            raise InputError(
                f"{self.where}.early_stopping",
                "the best weights have no average, which the last phase asks for",
                "leave one of them out",
            )

    def _named(self, form: _Form, stages: list[Stage], axes: Axes) -> list[Stage]:
        """Give the stages the names of their runs.

        Those of a first part depend on its phases alone, and not on the arm, so that all arms that
        begin with it share it.
        """
        named = []
        for stage in stages:
            stem, owner = (
                self._short_stem(form, stage, len(stages), axes)
                if self.is_short
                else self._stem(stages, stage)
            )
            named.append(Stage(**{**stage.__dict__, "stem": stem, "owner": owner}))
        return named

    def _stem(self, stages: Sequence[Stage], stage: Stage) -> tuple[str, str]:
        is_last = stage is stages[-1]
        if stage.is_short_pretraining and not is_last:
            assert stage.phase.share is not None
            return f"{PRETRAIN}-{number_in_name(stage.phase.share)}", PRETRAIN
        grid = self.sweep.config.learning_rate
        content = [identity(each, grid) for each in stages[: stage.number + 1]]
        stem = f"{self.name if is_last else stage.name}-{digest(content)}"
        return stem, stem

    def _short_stem(self, form: _Form, stage: Stage, count: int, axes: Axes) -> tuple[str, str]:
        """Return the names that these runs have had since before there were other arms."""
        mixture, share = stage.mixture, form.share
        shares = "" if share is None else f"-{number_in_name(share)}"
        is_last = stage.number == count - 1
        if is_last:
            owner = self.name
        elif self.sweep.kind(self.name) == KEEP:
            owner = f"{self.name}-{PRETRAIN}"
        elif stage.is_short_pretraining:
            return f"{PRETRAIN}{shares}", PRETRAIN
        else:
            owner = f"{self.name}-first"
        if axes:
            owner += f"-{digest(axes)}"
        return f"{owner}{shares}{mixture.suffix}", owner


def _short_phases(kind: str, share: float | None, mixture: Mixture) -> RawPhases:
    """Return the phases of a short form."""
    last = (
        {"mixture": {"temperature": mixture.temperature}}
        if mixture.temperature is not None
        else {"rate": mixture.rate}
    )
    if kind not in STAGED:
        return [{"name": STATIC, **last}]
    if kind == RESTART:
        return [{"name": STATIC, "share": share, **last}, {"name": RESTART, **last}]
    first = {"name": PRETRAIN, "share": share, "rate": 0.0}
    if kind == KEEP:
        return [first, {"name": JOINT, **last, "learning_rate": CONTINUE}]
    return [first, {"name": LOW_ONLY if kind == LOW_ONLY else JOINT, **last}]
