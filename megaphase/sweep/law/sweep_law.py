"""The laws of all tasks of one or several sweeps, or why there are none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from megaphase.report.runs import PhasePlan
from megaphase.sweep.directory import SweepRecord
from megaphase.sweep.law.law import TaskLaw, cannot_be_fitted, fit_laws
from megaphase.sweep.law.rows import LawRow, LawRows, law_rows
from megaphase.sweep.law.table import setting_groups
from megaphase.utils.errors import InputError
from megaphase.utils.files import real_path


@dataclass(frozen=True)
class SweepLaw:
    """The laws of sweeps over the same tasks.

    Attributes:
        laws: one per task, the high-resource ones first; empty if there are none.
        reason: why there are none.
    """

    rows: LawRows
    laws: Sequence[TaskLaw]
    reason: str | None

    @classmethod
    def of(
        cls, record: SweepRecord, phases: Mapping[str, Sequence[PhasePlan]] | None = None
    ) -> Self:
        """Fit the laws of a sweep, complete or not.

        phases: of runs that have been read already, by name; see `law_rows`.

        Raises:
            InputError: the directory of a run is damaged.
        """
        return cls.of_rows(law_rows(record, phases))

    @classmethod
    def of_rows(cls, rows: LawRows) -> Self:
        """Fit the laws of all tasks to these rows."""
        reason = cannot_be_fitted(rows.rows)
        return cls(rows, fit_laws(rows.rows, rows.tasks) if reason is None else [], reason)

    @cached_property
    def settings(self) -> int:
        """Number of settings."""
        return len(setting_groups(self.rows.rows))

    @property
    def sizes(self) -> list[int]:
        """The different model sizes, ascending: parameters without embeddings."""
        return sorted({row.parameters for row in self.rows.rows})

    @property
    def left_out_terms(self) -> list[str]:
        """Sentences on what the sweep cannot identify."""
        found = []
        if len(self.sizes) == 1:
            found.append("There is one model size, so the laws have no term for it.")
        elif len(self.sizes) == 2:
            found.append("There are two model sizes, so alpha is not fitted, but 0.34.")
        if len({row.steps for row in self.rows.rows}) == 1:
            found.append(
                "There is one budget: what more tokens do is known only from tasks whose tokens "
                "differ between the settings."
            )
        peaks = {row.phases[-1].peak for row in self.rows.rows}
        if len(peaks) == 1:
            found.append("There is one peak learning rate, so the laws have no term for it.")
        elif len(peaks) == 2:
            found.append("There are two peaks, so the laws know no best peak between them.")
        for reason, count in self.rows.left_out.items():
            found.append(f"Left out: {count} {_settings(count)} with {reason}.")
        return found


def _settings(count: int) -> str:
    return "setting" if count == 1 else "settings"


def combined(folders: Sequence[Path], records: Sequence[SweepRecord]) -> LawRows:
    """Return the rows of several sweeps over the same tasks.

    Raises:
        InputError: their tasks or the temperatures within groups differ, or one is given twice.
    """
    first, within = records[0].sweep, records[0].sweep.config.within
    places = [real_path(folder) for folder in folders]
    names = [record.sweep.output.name for record in records]
    rows: list[LawRow] = []
    left_out: Counter[str] = Counter()
    for i, (folder, record) in enumerate(zip(folders, records, strict=True)):
        if places.index(places[i]) < i:
            raise InputError(folder, "is given twice", "give every sweep once")
        if record.sweep.config.within != within:
            raise InputError(
                folder,
                f"within is {record.sweep.config.within}, but in {folders[0]} {within}",
                "give sweeps with the same",
            )
        for group in ("high", "low"):
            if getattr(record.sweep, group) != getattr(first, group):
                raise InputError(
                    folder,
                    f"{group} is {', '.join(getattr(record.sweep, group))}, but in {folders[0]} "
                    f"{', '.join(getattr(first, group))}",
                    "give sweeps over the same tasks",
                )
        found = law_rows(record, name=names[i] if names.count(names[i]) == 1 else str(folder))
        rows += found.rows
        left_out.update(found.left_out)
    arms = dict.fromkeys(arm for record in records for arm in record.sweep.config.arms)
    return LawRows(rows, first.high, first.low, left_out, (within.high, within.low), list(arms))
