"""A tried setting: the values of an arm's axes, which runs of all seeds share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Value = str | float | int | bool | None
"""A tried value; a mapping or list of the run file as one line of YAML."""

# Axes of the short forms, which are columns of a report's tables.
SHARE, RATE, TEMPERATURE, PEAK = "pretrain_share", "rate", "temperature", "peak"


@dataclass(frozen=True)
class Mixture:
    """The mixture of a phase. rate: of the low-resource tasks together; temperature: instead.

    text: the label of a mixture that is given in another way. All are None in a first stage with
    only the high-resource tasks.
    """

    rate: float | None = None
    temperature: float | None = None
    text: str | None = None

    @property
    def label(self) -> str:
        """The label in tables and plots."""
        if self.text is not None:
            return self.text
        if self.temperature is not None:
            return f"T = {self.temperature:g}"
        return "high only" if self.rate is None else _percent(self.rate)

    @property
    def suffix(self) -> str:
        """The suffix in the names of runs."""
        if self.temperature is not None:
            return f"-t{number_in_name(self.temperature)}"
        return "" if self.rate in (None, 1.0) else f"-r{number_in_name(self.rate)}"


@dataclass(frozen=True)
class TriedSetting:
    """One combination of an arm's values; runs that differ only in the seed share it.

    Attributes:
        arm: of the sweep file, or the name of a first part that several arms share.
        model: a name of the sweep file's models; None if there is only one model.
        values: every axis of the arm with its value, in the order of the file. Axes of the short
            forms are `pretrain_share`, `rate`, `temperature` and `peak`, where they apply; those of
            other arms are key paths, such as `phases[1].share`.
        mixture: of the last phase.
        share: of the budget before the last phase; None if there is only one phase.
        peaks: of the learning rate in every phase of the recipe, first to last.
        label: the values that differ between the settings of the arm, without peaks.
        short_label: likewise, without the share of a short form.
        peak_axis: the axis of the last phase's peak.
    """

    arm: str
    model: str | None
    values: tuple[tuple[str, Value], ...]
    mixture: Mixture
    share: float | None
    peaks: tuple[float, ...]
    label: str
    short_label: str
    peak_axis: str = PEAK

    def get(self, axis: str) -> Value:
        """Return the value of an axis; None if the arm has no such axis."""
        return dict(self.values).get(axis)

    @property
    def peak(self) -> float:
        """The peak learning rate of the last phase."""
        return self.peaks[-1]

    @property
    def without_last_peak(self) -> tuple[object, ...]:
        """What settings share that differ at most in the peak of the last phase."""
        kept = tuple(each for each in self.values if each[0] != self.peak_axis)
        return self.arm, self.model, kept, self.mixture, self.share


def number_in_name(value: float) -> str:
    """Format a number in a run's name: as `{:g}`, with more digits only if necessary."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def short_form_setting(
    arm: str,
    model: str | None,
    share: float | None,
    mixture: Mixture,
    peaks: tuple[float, ...],
    tried: tuple[tuple[str, Value], ...] = (),
) -> TriedSetting:
    """Return a setting of an arm that is given in a short form; tried: its values of the run
    file."""
    axes: dict[str, Value] = {
        SHARE: share,
        RATE: mixture.rate,
        TEMPERATURE: mixture.temperature,
        **dict(tried),
        PEAK: peaks[-1],
    }
    after = "" if share is None else f" after {100 * share:g}%"
    return TriedSetting(
        arm=arm,
        model=model,
        values=tuple((axis, value) for axis, value in axes.items() if value is not None),
        mixture=mixture,
        share=share,
        peaks=peaks,
        label=", ".join([f"{mixture.label}{after}", *value_labels(tried)]),
        short_label=", ".join([mixture.label, *value_labels(tried)]),
    )


def phases_setting(
    arm: str,
    model: str | None,
    share: float | None,
    mixture: Mixture,
    peaks: tuple[float, ...],
    tried: tuple[tuple[str, Value], ...],
    peaks_of: Sequence[int],
) -> TriedSetting:
    """Return a setting of an arm that is given phase by phase.

    tried: the values of its axes apart from peaks. peaks_of: the numbers of the phases whose peaks
    are axes, of which the last has the peak of the last phase.
    """
    axes = [f"phases[{number}].learning_rate.peak" for number in peaks_of]
    tried_peaks: list[tuple[str, Value]] = [
        (axis, peaks[number]) for axis, number in zip(axes, peaks_of, strict=True)
    ]
    return TriedSetting(
        arm=arm,
        model=model,
        values=(*tried, *tried_peaks),
        mixture=mixture,
        share=share,
        peaks=peaks,
        label=", ".join(value_labels(tried)) or mixture.label,
        short_label=", ".join(value_labels(tried)) or mixture.label,
        peak_axis=axes[-1],
    )


def value_labels(tried: Sequence[tuple[str, Value]]) -> list[str]:
    """Return a label for each value, such as `dropout 0.1`.

    It has as many keys of the value's axis as are needed to distinguish the axes; a rate is shown
    as `10%`, as in the labels of short forms.
    """
    return [
        _value_label(_short_axis(axis, [each for each, _ in tried]), value) for axis, value in tried
    ]


def _value_label(name: str, value: Value) -> str:
    if isinstance(value, str | bool) or value is None:
        return f"{name} {value}"
    if name == RATE:
        return _percent(value)
    return f"{name} {_percent(value) if name.endswith(f'.{RATE}') else f'{value:g}'}"


def _percent(rate: float) -> str:
    return f"{100 * rate:.3g}%"


def _short_axis(axis: str, axes: Sequence[str]) -> str:
    keys = axis.split(".")
    for count in range(2 if keys[-1] in ("from", "to", "name") else 1, len(keys)):
        end = ".".join(keys[-count:])
        if sum(each.endswith(f".{end}") for each in axes) == 1:
            return end
    return axis
