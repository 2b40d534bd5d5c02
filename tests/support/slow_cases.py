"""Mark those cases of a parametrized test as slow that `make test` leaves out."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def marked(cases: Iterable[Any], slow: Container[Any]) -> list[Any]:
    """Return the cases as parameters, with the mark `slow` on those that are in `slow`."""
    return [pytest.param(it, marks=pytest.mark.slow) if it in slow else it for it in cases]
