"""Detect diverging training from the losses and gradient norms that every step computes anyway.

A step is compared with what the tasks in its batch had come to before, so that neither another
mixture nor a task that is seen for the first time counts as a rise.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["above_uniform", "rise", "stuck", "gradient_norm"]

# A cumulative sum (Page 1954) that is never below 0: a step adds the nats by which its loss exceeds
# what was expected by more than MARGIN, or takes away those by which it is below that; at most
# LARGEST.
MARGIN, LARGEST = 1.0, 3.0
SUSPECTED, CERTAIN = 10.0, 100.0

# A task's loss is averaged over about so many of the newest steps that saw it, and is what the task
# has come to after no fewer.
AVERAGED = 20
_DECAY = 1 - 1 / AVERAGED

# A loss is stuck if over so many steps it moves by less than this part of itself, or if it is not
# below that of uniform guessing by so many nats and does not fall either: the mean of the second
# half is not below that of the first by so many standard errors.
STUCK_STEPS = 100
STILL, NOTHING_LEARNED, FALLING_ERRORS = 0.002, 0.05, 2.0

# The median of the newest gradient norms against that of those before.
NEW_NORMS, OLD_NORMS, ENOUGH_NORMS = 10, 100, 30
NORM_FACTOR = 20.0


@dataclass(frozen=True)
class Divergence:
    """What is wrong.

    Attributes:
        kind: above_uniform: the loss is far above what it was, and above that of uniform guessing;
            rise: only the former; stuck: it does not move any more; gradient_norm: the gradient is
            far larger than it was.
        since: the first step of which that holds.
        value: the loss of the step at which it was found, in nats a token, or the norm.
        expected: what the step's tasks had come to before; for `stuck` the loss of uniform
            guessing, for `gradient_norm` the median norm before.
    """

    kind: Kind
    since: int
    value: float
    expected: float


@dataclass
class _TaskLoss:
    """Of one task within the phase.

    Attributes:
        loss_sum, tokens: of the newest steps, decaying; nats and scored tokens.
        steps: how many have seen it.
        reached: the lowest average so far, or the held-out loss at the phase's start; None where
            neither is known.
    """

    loss_sum: float = 0.0
    tokens: float = 0.0
    steps: int = 0
    reached: float | None = None

    def add(self, loss_sum: float, tokens: float) -> None:
        self.loss_sum = _DECAY * self.loss_sum + loss_sum
        self.tokens = _DECAY * self.tokens + tokens
        self.steps += 1
        if self.steps >= AVERAGED:
            average = self.loss_sum / self.tokens
            self.reached = average if self.reached is None else min(self.reached, average)


class DivergenceDetector:
    """Looks at every step of a phase; its state is plain JSON values."""

    def __init__(self, vocabulary: int) -> None:
        """vocabulary: tokens among which the model chooses."""
        self._uniform = math.log(vocabulary)
        self._tasks: dict[str, _TaskLoss] = {}
        self._score, self._since, self._is_up = 0.0, 0, False
        self._is_new_phase = False
        self._rate = 0.0
        self._losses: deque[float] = deque(maxlen=STUCK_STEPS)
        self._norms: deque[float] = deque(maxlen=OLD_NORMS + NEW_NORMS)
        self.found: Divergence | None = None

    def begin_phase(self, held_out: Mapping[str, float]) -> None:
        """Another mixture: every task begins with its held-out loss, in nats a token.

        Where the phase before has diverged, what the tasks had come to earlier still counts.
        """
        before = {name: task.reached for name, task in self._tasks.items()}
        diverged = self._score > 0
        self._tasks = {}
        for name, loss in held_out.items():
            known = before.get(name) if diverged else None
            reached = loss if math.isfinite(loss) else self._uniform
            self._tasks[name] = _TaskLoss(reached=reached if known is None else min(known, reached))
        self._is_new_phase = not diverged
        self._rate = 0.0
        self._losses.clear()
        self._norms.clear()

    def observe(
        self,
        step: int,
        loss_sums: Mapping[str, float],
        tokens: Mapping[str, float],
        norm: float,
        rate: float,
    ) -> Divergence | None:
        """Process a step that was applied.

        loss_sums, tokens: nats and scored tokens by task. norm: of the gradient, before clipping.
        rate: the learning rate.

        Returns what is wrong since this step; afterwards `found` says so until it is over.
        """
        seen = {name: count for name, count in tokens.items() if count > 0}
        total = sum(seen.values())
        if not total:
            return None
        loss = sum(loss_sums[name] for name in seen) / total
        if self._is_new_phase:
            self._raise_to_training(loss - self._expected(loss_sums, seen) / total)
        expected = self._expected(loss_sums, seen)
        self._add_to_score(step, loss - expected / total)
        if self._score == 0:
            for name, count in seen.items():
                self._task(name).add(loss_sums[name], count)
        self._add_to_windows(loss, norm, rate)
        before, self.found = self.found, self._judge(step, loss, expected / total)
        return self.found if self.found is not None and self.found != before else None

    def is_diverged(self, *, phase_ends: bool) -> bool:
        """Return whether the divergence found is certain to last, as far as is known.

        Large gradients alone never are. At the end of a phase a loss counts that is still up.
        """
        if self.found is None or self.found.kind == "gradient_norm":
            return False
        if self.found.kind == "stuck" or self._score >= CERTAIN:
            return True
        return phase_ends and self._is_up

    @property
    def last_sound_step(self) -> int | None:
        """After which the weights were good for certain; None while nothing is suspicious."""
        since = self._since if self._score > 0 else None
        if self.found is not None:
            since = min(self.found.since, self._since if since is None else since)
        # The loss of a step is that of the weights before it, which the step before has made.
        return None if since is None else since - 2

    def state_dict(self) -> dict[str, Any]:
        """All that it knows."""
        return {
            "tasks": {name: asdict(task) for name, task in self._tasks.items()},
            "score": self._score,
            "since": self._since,
            "is_up": self._is_up,
            "is_new_phase": self._is_new_phase,
            "rate": self._rate,
            "losses": list(self._losses),
            "norms": list(self._norms),
            "found": None if self.found is None else asdict(self.found),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._tasks = {name: _TaskLoss(**task) for name, task in state["tasks"].items()}
        self._score, self._since, self._rate = state["score"], state["since"], state["rate"]
        self._is_up, self._is_new_phase = state["is_up"], state["is_new_phase"]
        self._losses = deque(state["losses"], self._losses.maxlen)
        self._norms = deque(state["norms"], self._norms.maxlen)
        self.found = None if state["found"] is None else Divergence(**state["found"])

    def _task(self, name: str) -> _TaskLoss:
        return self._tasks.setdefault(name, _TaskLoss())

    def _expected(self, loss_sums: Mapping[str, float], tokens: Mapping[str, float]) -> float:
        """The sum over the tokens; of a task of which nothing is known no more than by guessing."""
        expected = 0.0
        for name, count in tokens.items():
            reached = self._task(name).reached
            unknown = min(loss_sums[name], count * self._uniform)
            expected += unknown if reached is None else count * reached
        return expected

    def _raise_to_training(self, excess: float) -> None:
        """Add to the held-out losses by how much the first step of a phase is above them.

        Its loss is still that of the weights that were measured: what it is above them is due to
        dropout, or to other texts.
        """
        self._is_new_phase = False
        if math.isfinite(excess) and excess > 0:
            for task in self._tasks.values():
                if task.reached is not None:
                    task.reached += excess

    def _add_to_score(self, step: int, excess: float) -> None:
        if self._score == 0:
            self._since = step
        added = max(-LARGEST, min(LARGEST, excess - MARGIN))
        self._is_up = added > 0
        self._score = max(0.0, min(CERTAIN, self._score + added))

    def _add_to_windows(self, loss: float, norm: float, rate: float) -> None:
        if rate > self._rate:  # while it warms up the loss may stay where it is
            self._losses.clear()
        self._rate = rate
        self._losses.append(loss)
        if self.found is None or self.found.kind != "gradient_norm" or not self._norms_are_large():
            self._norms.append(norm)
        else:  # those before stay what the newest are compared with
            del self._norms[-NEW_NORMS]
            self._norms.append(norm)

    def _judge(self, step: int, loss: float, expected: float) -> Divergence | None:
        found = self.found
        is_of_loss = found is not None and found.kind in ("above_uniform", "rise")
        if self._score >= SUSPECTED or (is_of_loss and self._score > 0):
            if is_of_loss:
                return found
            kind: Kind = "above_uniform" if loss > self._uniform else "rise"
            return Divergence(kind, self._since, loss, expected)
        if self._is_stuck():
            if found is not None and found.kind == "stuck":
                return found
            return Divergence("stuck", step - STUCK_STEPS + 1, loss, self._uniform)
        if self._norms_are_large():
            if found is not None and found.kind == "gradient_norm":
                return found
            return Divergence("gradient_norm", step - NEW_NORMS + 1, *self._medians())
        return None

    def _is_stuck(self) -> bool:
        if len(self._losses) < STUCK_STEPS:
            return False
        losses = list(self._losses)
        mean = statistics.fmean(losses)
        if mean > self._uniform / 2 and max(losses) - min(losses) < STILL * mean:
            return True
        if mean < self._uniform - NOTHING_LEARNED:
            return False
        if self.found is not None and self.found.kind == "stuck":
            return True
        half = STUCK_STEPS // 2
        first, second = losses[:half], losses[half:]
        error = math.sqrt((statistics.variance(first) + statistics.variance(second)) / half)
        return statistics.fmean(first) - statistics.fmean(second) < FALLING_ERRORS * error

    def _norms_are_large(self) -> bool:
        if len(self._norms) < ENOUGH_NORMS + NEW_NORMS:
            return False
        new, old = self._medians()
        return new > NORM_FACTOR * old

    def _medians(self) -> tuple[float, float]:
        """Return the median of the newest norms, and of those before."""
        norms = list(self._norms)
        return statistics.median(norms[-NEW_NORMS:]), statistics.median(norms[:-NEW_NORMS])
