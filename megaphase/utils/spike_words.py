"""Why a step was left out as a loss spike, in words."""

from __future__ import annotations

from collections.abc import Mapping

# "loss" (nats a token) and "grad_norm", if above their limit: `value`, and before the step its
# running `mean` and `standard_deviation`.
Exceeded = Mapping[str, Mapping[str, float]]

_NAMES = {"loss": "loss", "grad_norm": "gradient norm"}


def spike_in_words(exceeded: Exceeded) -> str:
    """Return for example `gradient norm 1.17 is 9.3 deviations above its mean 0.41`; empty if
    nothing is known, as of the runs of earlier versions."""
    return " and ".join(
        f"{name} {_above(exceeded[key])}" for key, name in _NAMES.items() if key in exceeded
    )


def _above(figures: Mapping[str, float]) -> str:
    value, mean = figures["value"], figures["mean"]
    deviation = figures["standard_deviation"]
    if not deviation:
        return f"{value:.4g} is above its mean {mean:.4g}, from which no step before deviated"
    return f"{value:.4g} is {(value - mean) / deviation:.1f} deviations above its mean {mean:.4g}"
