"""The settings of a sweep that were stopped early by successive halving."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megaphase.sweep.arms.setting import TriedSetting
from megaphase.sweep.directory import SweepRecord


class PrunedSetting(NamedTuple):
    """step: after which all of its runs were stopped. is_final: whether it is no first stage."""

    setting: TriedSetting
    step: int
    is_final: bool

    @property
    def words(self) -> str:
        """Its arm, values and peak, for a list."""
        setting = self.setting
        model = "" if setting.model is None else f"{setting.model}, "
        return f"{model}{setting.arm}, {setting.label}, peak {setting.peak:g}"


def pruned_settings(record: SweepRecord) -> list[PrunedSetting]:
    """Return the pruned settings in the sweep's order."""
    found: dict[TriedSetting, PrunedSetting] = {}
    for trial in record.trials:
        outcome = record.outcomes.get(trial.name)
        if outcome is not None and outcome.pruned is not None:
            pruned = PrunedSetting(trial.setting, outcome.step, trial.is_final)
            found.setdefault(trial.setting, pruned)
    return list(found.values())


def pruned_of_arm(pruned: Sequence[PrunedSetting], arm: str, model: str | None) -> int:
    """Return the number of an arm's own settings that were pruned, without first stages."""
    own = (each.setting for each in pruned if each.is_final)
    return sum(setting.arm == arm and setting.model == model for setting in own)


def pruned_sentence(pruned: Sequence[PrunedSetting]) -> str:
    """Return how many settings were pruned, and what that means for a comparison."""
    final = sum(each.is_final for each in pruned)
    return (
        f"{final:,} settings, and {len(pruned) - final:,} of first stages, were pruned by their "
        "validation losses: they have no points, but count as tried where arms are compared at "
        "equal numbers of settings."
    )
