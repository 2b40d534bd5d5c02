"""How many samples each optimizer step of a phase takes, in exact integers."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple, Self

# Of a ramp; a plan and its fingerprint name each of them.
MOST_STAGES = 10_000


class BatchStage(NamedTuple):
    """Steps of a phase that take equally many samples.

    first_step: 0-based in the phase; samples_before: of the phase's steps before it; samples: of
    each step.
    """

    first_step: int
    samples_before: int
    samples: int


@dataclass(frozen=True)
class BatchSchedule:
    """The global batch of every step of a phase; steps are 0-based in the phase.

    stages: in the order of their steps, the first one from step 0; the last one has no end.
    """

    stages: tuple[BatchStage, ...]

    @classmethod
    def constant(cls, samples: int) -> Self:
        """Every step takes so many samples."""
        return cls((BatchStage(0, 0, samples),))

    @classmethod
    def ramp(
        cls, first: int, step: int, full: int, tokens: int, *, seq_len: int, tokens_before: int = 0
    ) -> Self:
        """The batch grows from `first` by `step` samples at a time to `full`, over `tokens` tokens.

        With n batches below `full`, a step that begins after t tokens of the ramp takes
        first + ⌊t · n / tokens⌋ · step samples, or `full` from t = tokens on. So a batch holds
        until a step ends at or after its part of the tokens; what it takes beyond that, the next
        one has less, and a part that is shorter than a step may be left out.

        tokens_before: of the ramp, before the phase.
        """
        number = (full - first) // step
        stages: list[BatchStage] = []
        at, before = 0, 0  # step, and samples before it
        while True:
            stage = min((tokens_before + before * seq_len) * number // tokens, number)
            samples = first + stage * step
            stages.append(BatchStage(at, before, samples))
            if stage == number:
                return cls(tuple(stages))
            # The first count of samples at which the next stage is reached.
            end = -(-((stage + 1) * tokens - tokens_before * number) // (number * seq_len))
            steps = -(-(end - before) // samples)
            at, before = at + steps, before + steps * samples

    @property
    def is_constant(self) -> bool:
        """Whether all steps take equally many samples."""
        return len(self.stages) == 1

    @property
    def largest(self) -> int:
        """The samples of the steps that take most."""
        return max(stage.samples for stage in self.stages)

    def stage_at(self, step: int) -> BatchStage:
        """The stage that a step belongs to."""
        return self.stages[bisect_right(self.stages, step, key=lambda s: s.first_step) - 1]

    def samples_at(self, step: int) -> int:
        """The samples of a step."""
        return self.stage_at(step).samples

    def samples_before(self, step: int) -> int:
        """The samples of all steps of the phase before this one."""
        stage = self.stage_at(step)
        return stage.samples_before + (step - stage.first_step) * stage.samples

    def steps_for(self, samples: int) -> int:
        """The fewest steps that take at least so many samples together."""
        index = bisect_right(self.stages, samples - 1, key=lambda stage: stage.samples_before)
        stage = self.stages[max(index - 1, 0)]
        return stage.first_step - (stage.samples_before - samples) // stage.samples

    def within(self, steps: int) -> list[tuple[BatchStage, int]]:
        """The stages of a phase of so many steps, each with the number of its steps."""
        ends = [stage.first_step for stage in self.stages[1:]] + [steps]
        return [
            (stage, min(end, steps) - stage.first_step)
            for stage, end in zip(self.stages, ends, strict=True)
            if stage.first_step < steps
        ]
