"""Tolerances for rounding that follow from the arithmetic.

Other layouts, numbers of threads and instruction sets add the same terms in another order. The
error of a sum is in proportion to the sizes of its terms, not to the sum: if they cancel, as in a
difference of two losses, a gradient or a logit, it is compared on the scale of the terms. Values
without cancellation, such as a mean of losses or a norm, are compared by themselves
(`pytest.approx(…, rel=…)`), and values that are promised bit for bit with ==.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from torch import Tensor

# fp32 after many additions: training steps, or the layers of a model.
FP32 = 1e-5
FP32_ROUNDOFF = 2.0**-24  # of one operation, relative


def approx_sum(expected: float, *terms: float, rel: float) -> Any:
    """Return a value equal to `expected`, a sum of `terms`, within `rel` of their sizes."""
    return pytest.approx(expected, rel=0, abs=rel * sum(map(abs, terms)))


def approx_validation(figures: Mapping[str, float], rel: float) -> dict[str, Any]:
    """Return values equal to a task's validation figures; its gap is a difference of two losses."""
    expected = {name: pytest.approx(each, rel=rel) for name, each in figures.items()}
    if "gap" in figures:
        loss, gap = figures["loss"], figures["gap"]
        expected["gap"] = approx_sum(gap, loss, loss - gap, rel=rel)
    return expected


def deviation(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two entries, relative to the largest expected entry."""
    assert found.shape == expected.shape
    assert expected.any()
    difference = (found.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max())


def assert_close(found: Tensor, expected: Tensor, rel: float = FP32, what: str = "") -> None:
    """Compare entries that are sums of similarly many terms on the scale of the largest one."""
    assert deviation(found, expected) <= rel, (what, deviation(found, expected))
