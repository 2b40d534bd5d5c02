"""The columns with which every table of a sweep's numbers names a setting."""

from __future__ import annotations

from megaphase.sweep.arms.setting import TriedSetting

SETTING = ("arm", "model", "pretrain_share", "rate", "temperature", "peak")


def setting_cells(setting: TriedSetting) -> list[object]:
    """Return the values of these columns."""
    mixture = setting.mixture
    return [
        setting.arm, setting.model, setting.share, mixture.rate, mixture.temperature, setting.peak
    ]  # fmt: skip
