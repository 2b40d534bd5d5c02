"""The settings of a sweep as arrays, from which the forms of a law compute a task's loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Self

import numpy as np

from megaphase.sweep.law.rows import LawRow

Vector = np.ndarray  # float64 [settings]


@dataclass(frozen=True)
class SettingTable:
    """One entry per setting, for one task. Phases are padded with empty ones.

    Attributes:
        parameters: of the model, without embeddings and output projection.
        starts, ends: of the phases, as fractions of all steps [settings, phases].
        own: tokens of the task by phase [settings, phases].
        others: tokens of all other tasks.
        unique: tokens of one epoch of the task.
        first_peak, last_peak, last_end: peaks of the first and the last phase, and the last
            learning rate as a fraction of its peak.
        resets: number of phases after the first that begin with a fresh optimizer state.
    """

    parameters: Vector
    starts: np.ndarray
    ends: np.ndarray
    own: np.ndarray
    others: Vector
    unique: Vector
    first_peak: Vector
    last_peak: Vector
    last_end: Vector
    resets: Vector

    @classmethod
    def of(cls, rows: Sequence[LawRow], task: str) -> Self:
        """Return the table of these rows, one each."""
        most = max(len(row.phases) for row in rows)
        starts, ends, own = (np.zeros((len(rows), most)) for _ in range(3))
        for i, row in enumerate(rows):
            begin = 0
            for k, phase in enumerate(row.phases):
                starts[i, k] = begin / row.steps
                begin += phase.steps
                ends[i, k] = begin / row.steps
                own[i, k] = phase.tokens.get(task, 0.0)

        def column(values: Sequence[float]) -> Vector:
            return np.array(values, dtype=np.float64)

        return cls(
            parameters=column([row.parameters for row in rows]),
            starts=starts,
            ends=ends,
            own=own,
            others=column([row.total_tokens - row.tokens(task) for row in rows]),
            unique=column([row.unique[task] for row in rows]),
            first_peak=column([row.phases[0].peak for row in rows]),
            last_peak=column([row.phases[-1].peak for row in rows]),
            last_end=column([row.phases[-1].end for row in rows]),
            resets=column([sum(phase.reset for phase in row.phases[1:]) for row in rows]),
        )

    def take(self, indices: Sequence[int] | np.ndarray) -> Self:
        """Return the table of some of the settings."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return type(self)(**{name: column[indices] for name, column in values.items()})

    @cached_property
    def tokens(self) -> Vector:
        """Tokens of the task, with repetition; at least one."""
        total: Vector = np.maximum(self.own.sum(axis=1), 1.0)
        return total

    @cached_property
    def last_tokens(self) -> Vector:
        """Tokens of all tasks in the last phase."""
        # Phases that are padding begin at 0.
        last: Vector = (1 - self.starts.max(axis=1)) * (self.tokens + self.others)
        return last

    def repeated(self, tokens: Vector) -> Vector:
        """Return the epochs beyond the first that these tokens of the task are."""
        repeated: Vector = np.maximum(tokens / self.unique - 1, 0.0)
        return repeated

    @cached_property
    def rate(self) -> Vector:
        """The task's share of all tokens."""
        rate: Vector = self.tokens / (self.tokens + self.others)
        return rate

    def order(self, recency: float) -> Vector:
        """Return the mean weight of the task's tokens if the weight of a token at the fraction x of
        the run is in proportion to exp(-recency (1 - x)); 1 for tokens spread over the whole run.
        """
        if abs(recency) < 1e-6:
            return np.ones(len(self.own))

        def integral(x: np.ndarray) -> np.ndarray:
            return np.exp(-recency * (1 - x)) / recency

        length = np.maximum(self.ends - self.starts, 1e-12)
        weights = (integral(self.ends) - integral(self.starts)) / length
        uniform = (1 - np.exp(-recency)) / recency
        mean: Vector = (weights * self.own).sum(axis=1) / self.tokens / uniform
        return mean


@dataclass(frozen=True)
class Means:
    """A task's losses, averaged over the seeds of each setting.

    Attributes:
        rows: one row of each setting.
        losses, counts: mean loss and number of seeds [settings].
        noise: standard deviation of a single run over the seeds, pooled over the settings, in
            nats; None if no setting has two seeds.
        freedom: degrees of freedom of the noise.
    """

    rows: Sequence[LawRow]
    losses: Vector
    counts: Vector
    noise: float | None
    freedom: int

    @property
    def noise_of_mean(self) -> float | None:
        """The root mean square of the standard errors of the settings' means."""
        if self.noise is None:
            return None
        return float(self.noise * np.sqrt(np.mean(1 / self.counts)))


def setting_groups(rows: Sequence[LawRow]) -> list[list[LawRow]]:
    """Return the rows by setting, in their order."""
    groups: dict[object, list[LawRow]] = {}
    for row in rows:
        groups.setdefault((row.sweep, row.setting), []).append(row)
    return [*groups.values()]


def means_of(groups: Sequence[Sequence[LawRow]], task: str) -> Means:
    """Return a task's mean losses by setting."""
    losses: list[list[float]] = [[row.losses[task] for row in group] for group in groups]
    freedom = sum(len(each) - 1 for each in losses)
    squares = sum(float(np.sum((np.array(each) - np.mean(each)) ** 2)) for each in losses)
    return Means(
        rows=[group[0] for group in groups],
        losses=np.array([np.mean(each) for each in losses]),
        counts=np.array([float(len(each)) for each in losses]),
        noise=float(np.sqrt(squares / freedom)) if freedom else None,
        freedom=freedom,
    )


Parameters = Mapping[str, float]
