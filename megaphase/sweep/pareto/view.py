"""Everything that a sweep's report shows, computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from megaphase.report.runs import PhasePlan
from megaphase.sweep.changes import SweepChanges, read_changes
from megaphase.sweep.directory import SweepRecord, load_sweep_record
from megaphase.sweep.pareto.arm_styles import ArmStyles, style_of_arms
from megaphase.sweep.pareto.contrasts import Contrast, contrasts_of
from megaphase.sweep.pareto.curves import RunCurves, read_runs
from megaphase.sweep.pareto.fronts import ArmFront, ModelFronts, fronts_of
from megaphase.sweep.pareto.points import Failure, Point, Split, best_of, failures, reported_split
from megaphase.sweep.pareto.pruned import PrunedSetting, pruned_settings
from megaphase.sweep.pareto.verdict import SweepProgress, Verdict, progress_of, verdicts_of


@dataclass(frozen=True)
class SweepView:
    """A sweep's fronts, verdicts and curves.

    Attributes:
        split: the one on which losses are reported.
        changes: of the sweep file after runs had ended.
        phases: of every run that was read, by name, as they were trained.
        styles: colour and marker of each arm.
    """

    record: SweepRecord
    split: Split
    changes: SweepChanges
    fronts: Sequence[ModelFronts]
    contrasts: Sequence[Contrast]
    verdicts: Sequence[Verdict]
    failures: Sequence[Failure]
    pruned: Sequence[PrunedSetting]
    progress: SweepProgress
    curves: Mapping[str, RunCurves]
    phases: Mapping[str, Sequence[PhasePlan]]
    styles: ArmStyles

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Read the directory of a sweep.

        Raises:
            InputError: a file in it is missing or invalid.
        """
        record = load_sweep_record(folder)
        fronts = fronts_of(record)
        contrasts = contrasts_of(record, fronts)
        runs = read_runs(record)
        progress = progress_of(record)
        return cls(
            record=record,
            split=reported_split(record),
            changes=read_changes(folder),
            fronts=fronts,
            contrasts=contrasts,
            verdicts=verdicts_of(record, fronts, contrasts, progress),
            failures=failures(record),
            pruned=pruned_settings(record),
            progress=progress,
            curves=runs.curves,
            phases=runs.phases,
            styles=style_of_arms(list(record.sweep.config.arms)),
        )

    @property
    def name(self) -> str:
        """The name of the sweep file, independent of the directory's location."""
        return self.record.sweep.file.stem

    @property
    def tasks(self) -> list[str]:
        """All tasks, the high-resource ones first."""
        return [*self.record.sweep.high, *self.record.sweep.low]

    def best(self, arm: ArmFront) -> Point | None:
        """Return the best point of an arm; see `best_of`."""
        return best_of(arm.points)

    def best_points(self, fronts: ModelFronts) -> list[Point]:
        """Return the best point of every arm that has one."""
        return [point for arm in fronts.arms if (point := self.best(arm)) is not None]
