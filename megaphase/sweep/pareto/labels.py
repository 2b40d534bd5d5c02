"""The names of settings in plots: mixture, pre-training length and peaks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from megaphase.sweep.arms.setting import (
    PEAK,
    RATE,
    SHARE,
    TEMPERATURE,
    TriedSetting,
    value_labels,
)
from megaphase.sweep.pareto.points import Point
from megaphase.sweep.sweep import Sweep

SHORT_FORM = frozenset({SHARE, RATE, TEMPERATURE, PEAK})


@dataclass(frozen=True)
class SettingLabels:
    """Names the settings of a sweep.

    Attributes:
        peak: the peak of all phases of all settings; None if there are several.
        several_lengths: arms whose settings differ in the pre-training length.
    """

    sweep: Sweep
    peak: float | None
    several_lengths: frozenset[str]

    @classmethod
    def of(cls, sweep: Sweep, points: Iterable[Point]) -> Self:
        """Return the labels for these points."""
        settings = [point.setting for point in points]
        peaks = {peak for setting in settings for peak in setting.peaks}
        shares: dict[str, set[float | None]] = {}
        for setting in settings:
            shares.setdefault(setting.arm, set()).add(setting.share)
        return cls(
            sweep,
            peaks.pop() if len(peaks) == 1 else None,
            frozenset(arm for arm, each in shares.items() if len(each) > 1),
        )

    def mixture(self, setting: TriedSetting) -> str:
        """Return the mixture of the last phase; for a temperature also the low-resource rate."""
        temperature = setting.mixture.temperature
        if temperature is None:
            return setting.mixture.label
        rate = low_resource_rate(self.sweep, temperature)
        return f"{setting.mixture.label} ({100 * rate:.2g}%)"

    def without_peaks(self, setting: TriedSetting) -> str:
        """Return what distinguishes the setting from others of its arm, apart from peaks."""
        if not {axis for axis, _ in setting.values} <= SHORT_FORM:
            return setting.label or self.mixture(setting)
        label = self.mixture(setting)
        if setting.share is not None and setting.arm in self.several_lengths:
            label += f" after {100 * setting.share:g}%"
        return label

    def peaks(self, setting: TriedSetting) -> str:
        """Return the peaks of all phases; empty if all settings have the same one."""
        return "" if self.peak is not None else peaks_label(setting.peaks)

    def __call__(self, setting: TriedSetting) -> str:
        """Return the label beside a point or line."""
        return ", ".join(filter(None, (self.without_peaks(setting), self.peaks(setting))))

    def without_length(self, setting: TriedSetting) -> str:
        """Return the label of a line along which the pre-training length changes."""
        kept = [
            each
            for each in setting.values
            if each[0] not in SHORT_FORM and not is_length(each[0]) and not is_peak(each[0])
        ]
        parts = (self.mixture(setting), *value_labels(kept), self.peaks(setting))
        return ", ".join(filter(None, parts))

    @property
    def sentence(self) -> str:
        """What a caption says about the peaks in the labels."""
        if self.peak is not None:
            return f"Peak learning rate: {peak_label(self.peak)} everywhere. "
        return "Beside each mixture: the peak learning rates of its phases, or the one of all. "


def peaks_label(peaks: Sequence[float]) -> str:
    """Return the peaks of the phases, first to last; a single one if they are equal."""
    kept = peaks[:1] if len(set(peaks)) == 1 else peaks
    return " → ".join(map(peak_label, kept))


def peak_label(peak: float) -> str:
    """Return a peak as 4e-3; without an exponent from 0.1 on."""
    if peak >= 0.1:
        return f"{peak:g}"
    mantissa, exponent = f"{peak:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def is_length(axis: str) -> bool:
    """Return whether an axis is the length of a phase."""
    return axis == SHARE or axis.endswith((".share", ".steps"))


def is_peak(axis: str) -> bool:
    """Return whether an axis is the peak of a phase."""
    return axis == PEAK or axis.endswith(".peak")


def low_resource_rate(sweep: Sweep, temperature: float) -> float:
    """Return the rate of the low-resource tasks together in the mixture of all tasks."""
    most = max(sweep.tokens.values())
    weights = {task: (n / most) ** (1 / temperature) for task, n in sweep.tokens.items()}
    return float(sum(weights[task] for task in sweep.low) / sum(weights.values()))
