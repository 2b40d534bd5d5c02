"""The order of the samples of one phase: from its mixture to the files of the index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import numpy as np

from megaphase.plan import _builder
from megaphase.plan.build_pool import BuildPool
from megaphase.plan.hashed_chunks import HashedChunkWriter
from megaphase.plan.index import PhaseIndex, block_size, task_dtype
from megaphase.plan.mixture import (
    effective_rates,
    integer_weights,
    pieces_means,
    rate_pieces,
    requested_rates,
)
from megaphase.plan.position import StreamPosition
from megaphase.plan.rate_curves import RatePieces
from megaphase.plan.spec import PhaseSpec, PlanSpec

# Samples per call, between which an interruption is noticed; a blend's block may be larger.
SAMPLES_PER_CALL = 1 << 19

Blend = (
    _builder.DeadlineBlend
    | _builder.RandomBlend
    | _builder.PiecewiseDeadlineBlend
    | _builder.PiecewiseRandomBlend
)


@dataclass(frozen=True)
class PhaseBlend:
    """The blend of a phase, at its beginning.

    Attributes:
        number: the phase's, from 0 on.
        requested, rates: the requested and the effective rates of the tasks.
        turns: the expected number of samples of every task; of `order: deadline`, the true one
            differs from it by less than 1.
    """

    number: int
    phase: PhaseSpec
    blend: Blend
    requested: Sequence[Fraction]
    rates: Sequence[Fraction]
    turns: Sequence[Fraction]
    pieces: RatePieces | None

    @classmethod
    def of(cls, number: int, spec: PlanSpec, used: list[StreamPosition]) -> Self:
        """Return the blend of a phase.

        used: where the tasks' streams are at its beginning; only `max_epochs` depends on it.

        Raises:
            InputError: it needs more samples than `max_epochs` allows.
        """
        phase, names, samples = spec.phases[number], list(spec.streams), spec.phases[number].samples
        supply = spec.supply(number, used)
        requested = requested_rates(phase.mixture, supply)
        if phase.mixture.changes:
            pieces = rate_pieces(phase.mixture, supply, samples, phase.where)
            rates = pieces_means(pieces, names)
            turns = [Fraction(total, pieces.unit) for total in pieces.totals()]
            blend = make_piecewise_blend(phase, pieces)
        else:
            pieces = None
            rates = effective_rates(phase.mixture, supply, samples, phase.where, requested)
            in_order = [rates[task] for task in names]
            weights = integer_weights(in_order, samples, _builder.LARGEST_TOTAL_WEIGHT)
            total = sum(weights)
            turns = [Fraction(weight * samples, total) for weight in weights]
            blend = _make_blend(phase, weights)
        return cls(
            number,
            phase,
            blend,
            [requested[task] for task in names],
            [rates[task] for task in names],
            turns,
            pieces,
        )

    def write(self, folder: Path, pool: BuildPool) -> dict[str, Any]:
        """Write its files to the folder of an index, and return their entries in the header."""
        tasks, samples = len(self.rates), self.phase.samples
        block = block_size(tasks)
        stride = max(SAMPLES_PER_CALL // block, 1) * block
        order = np.empty(min(stride, samples), task_dtype(tasks))
        counts = np.empty((-(-len(order) // block), tasks), np.int64)
        order_name, counts_name = f"blend-{self.number}.tasks", f"blend-{self.number}.counts"
        with (
            open(folder / order_name, "wb", buffering=0) as order_file,
            open(folder / counts_name, "wb", buffering=0) as counts_file,
        ):
            order_writer = HashedChunkWriter(order_file.fileno(), 0, pool.flusher)
            counts_writer = HashedChunkWriter(counts_file.fileno(), 0, pool.flusher)
            for first in range(0, samples, stride):
                part = order[: min(stride, samples - first)]
                rows = counts[: -(-len(part) // block)]
                self.blend.fill(part, rows, block)
                order_writer.write(part)
                counts_writer.write(rows)
                pool.advance(len(part))
            return {
                order_name: _described(order_writer.finish()),
                counts_name: _described(counts_writer.finish()),
            }

    def index(self, used: list[StreamPosition]) -> PhaseIndex:
        """Return the phase's entry in the header after it has been written.

        used: where the tasks' streams are at its beginning.
        """
        return PhaseIndex(
            self.phase.name,
            self.phase.steps,
            self.phase.samples,
            [float(rate) for rate in self.requested],
            [float(rate) for rate in self.rates],
            [at.samples for at in used],
            list(self.blend.counts),
            None if self.pieces is None else self.pieces.requested.tolist(),
            None if self.pieces is None else self.pieces.ends.tolist(),
        )


def _make_blend(phase: PhaseSpec, weights: list[int]) -> Blend:
    if phase.order == "random":
        return _builder.RandomBlend(weights, phase.order_key)
    return _builder.DeadlineBlend(weights)


def make_piecewise_blend(phase: PhaseSpec, pieces: RatePieces) -> Blend:
    """Return the order of a phase's samples, at its beginning, where rates change within it."""
    if phase.order == "random":
        return _builder.PiecewiseRandomBlend(pieces.bounds, pieces.weights, phase.order_key)
    return _builder.PiecewiseDeadlineBlend(pieces.bounds, pieces.weights)


def _described(pieces: list[list[Any]]) -> dict[str, Any]:
    return {"bytes": sum(size for _, size, _ in pieces), "pieces": pieces}
