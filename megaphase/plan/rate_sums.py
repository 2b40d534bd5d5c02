"""Check that the rates of a run file sum to 1, and say which ones in the same proportions do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from megaphase.plan.rate_curves import RateCurve
from megaphase.utils.decimals import as_written

RATE_SUM_TOLERANCE = 1e-6

# Of proposed rates: decimals, significant digits of the smallest one, and most tasks.
_LEAST_DECIMALS, _MOST_DECIMALS, _DIGITS, _MOST_TASKS = 6, 12, 3, 20


def ends(rates: Iterable[float | RateCurve]) -> tuple[list[float], list[float]]:
    """Return the rates at the phase's start, and those at its end."""
    pairs = [(r.from_, r.to) if isinstance(r, RateCurve) else (r, r) for r in rates]
    return [start for start, _ in pairs], [end for _, end in pairs]


def check_sums(rates: Mapping[str, float | RateCurve]) -> None:
    """Raise ValueError if the rates do not sum to 1 at the phase's start and at its end."""
    start, end = (math.fsum(each) for each in ends(rates.values()))
    if max(abs(start - 1), abs(end - 1)) <= RATE_SUM_TOLERANCE:
        return
    if any(isinstance(rate, RateCurve) for rate in rates.values()):
        sums = f"to {start:.9g} at the phase's start and to {end:.9g} at its end; make both sums 1"
    else:
        sums = f"to {start:.9g}; make them sum to 1"
    raise ValueError(f"the rates sum {sums}{_proposal(rates)}")


def constant_rates(value: Any) -> dict[str, float] | None:
    """Return the value of `rates` in a run file if it holds nothing but numbers from 0 on: rates,
    or weights that are meant as such."""
    if not isinstance(value, dict) or not all(isinstance(task, str) for task in value):
        return None
    numbers = all(type(rate) in (int, float) and 0 <= rate < math.inf for rate in value.values())
    return value if numbers else None


def _proposal(rates: Mapping[str, float | RateCurve]) -> str:
    """Return rates in the same proportions that sum to 1, to be pasted into the run file."""
    if len(rates) > _MOST_TASKS or not all(map(any, ends(rates.values()))):
        return ""
    first, last = (_decimals([as_written(rate) for rate in each]) for each in ends(rates.values()))
    shapes = [rate.shape if isinstance(rate, RateCurve) else "linear" for rate in rates.values()]
    written = (
        f"{task}: {_rate(start, end, shape)}"
        for task, start, end, shape in zip(rates, first, last, shapes, strict=True)
    )
    return f"; in the same proportions: {{{', '.join(written)}}}"


def _rate(start: Fraction, end: Fraction, shape: str) -> str:
    if start == end:
        return _decimal(start)
    other = "" if shape == "linear" else f", shape: {shape}"
    return f"{{from: {_decimal(start)}, to: {_decimal(end)}{other}}}"


def _decimals(weights: Sequence[Fraction]) -> list[Fraction]:
    """Return the weights over their sum, as decimals that sum to exactly 1: by largest
    remainders."""
    rates = [weight / sum(weights) for weight in weights]
    smallest = min(rate for rate in rates if rate)
    digits = max(_LEAST_DECIMALS, _DIGITS - math.floor(math.log10(smallest)))
    unit: int = 10 ** min(_MOST_DECIMALS, digits)
    whole = [math.floor(rate * unit) for rate in rates]
    by_remainder = sorted(range(len(rates)), key=lambda task: whole[task] - rates[task] * unit)
    for task in by_remainder[: unit - sum(whole)]:
        whole[task] += 1
    return [Fraction(each, unit) for each in whole]


def _decimal(rate: Fraction) -> str:
    return f"{float(rate):.{_MOST_DECIMALS}f}".rstrip("0").rstrip(".")
