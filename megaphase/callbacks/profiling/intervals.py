"""Arithmetic of time spans: float64 [n, 2], a start and an end a row, in any order and any unit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Spans = NDArray[np.float64]


def spans(pairs: ArrayLike) -> Spans:
    """Pairs of start and end as an array, also where there are none."""
    return np.asarray(pairs, np.float64).reshape(-1, 2)


def merged(covered: Spans) -> Spans:
    """The same times as disjoint spans in ascending order."""
    covered = covered[np.argsort(covered[:, 0], kind="stable")]
    ends = np.maximum.accumulate(covered[:, 1])
    opens = np.ones(len(covered), bool)
    opens[1:] = covered[1:, 0] > ends[:-1]
    closes = np.append(opens[1:], True)[: len(covered)]
    return np.stack([covered[opens, 0], ends[closes]], axis=1)


def clipped(covered: Spans, windows: Spans) -> Spans:
    """Return the parts of the spans inside the windows, which are disjoint and few."""
    parts = [np.clip(covered, *window) for window in windows]
    inside = np.concatenate([spans([]), *parts])
    return inside[inside[:, 0] < inside[:, 1]]


def length(covered: Spans) -> float:
    """How much time the spans cover; where several overlap, it counts once."""
    disjoint = merged(covered)
    return float((disjoint[:, 1] - disjoint[:, 0]).sum())


def exclusive_lengths(layers: Sequence[Spans]) -> list[float]:
    """Return, for each layer, the time that it covers and no earlier layer does."""
    lengths = [length(np.concatenate(layers[:count])) for count in range(1, len(layers) + 1)]
    exclusive: list[float] = np.maximum(np.diff(lengths, prepend=0.0), 0.0).tolist()
    return exclusive
