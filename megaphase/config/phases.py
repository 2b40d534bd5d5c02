"""A phase of a run file, composed of the sections of what it is made of."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from megaphase.callbacks.early_stopping import StopConfig
from megaphase.config.fields import (
    Count,
    CountOrZero,
    Epochs,
    PhaseName,
    PositiveOrZero,
    Section,
    Steps,
)
from megaphase.model.config import PhaseModelConfig
from megaphase.optim.average_config import AverageConfig
from megaphase.optim.schedules import LearningRateConfig
from megaphase.plan.batch_config import PhaseBatchConfig
from megaphase.plan.mixture import MixtureConfig

PHASE_LENGTHS = ("tokens", "steps", "epochs")


class PhaseConfig(Section):
    """A phase is a run of optimizer steps with one mixture, one learning-rate schedule and one
    policy for the optimizer state. Give its length by exactly one of `tokens`, `steps` and
    `epochs`."""

    name: PhaseName
    """A name, see above, that no other phase has."""
    tokens: Count | None = None
    """Length of the phase in tokens, rounded up to whole steps; a sample counts `seq_len` tokens,
    however full it is."""
    steps: Steps | None = None
    """Length of the phase in optimizer steps."""
    epochs: dict[str, Epochs] | None = Field(default=None, min_length=1)
    """Length of the phase in passes over the training text of a task, for example `{hi: 4}`, in
    samples of the phase's own `seq_len` and `cut`, counted from the phase's start, also if that is
    in the middle of a pass; of several tasks, the one that gets there first ends the phase. Not
    with `mixture.max_epochs`."""
    mixture: MixtureConfig
    """Sampling rates of the tasks."""
    loss_weights: dict[str, PositiveOrZero] | None = Field(default=None, min_length=1)
    """Weights of tasks' losses in this phase, in place of `tasks.NAME.loss_weight`; of tasks
    that the phase samples."""
    order: Literal["balanced", "random"] = "balanced"
    """`balanced`: after any n samples the count of every task differs from its rate times n by less
    than one. `random`: the task of every sample is drawn independently, and `max_epochs` holds on
    average."""
    cut: Literal["tokens", "documents"] = "tokens"
    """`tokens`: a text is cut every `seq_len` tokens, wherever documents begin. `documents`:
    samples begin where documents begin; none is cut that fits into a sample, and short ones share a
    sample, packed by best fit; what they leave empty is padding. Translation pairs are always
    packed, and the key changes nothing for them."""
    optimizer_state: Literal["reset", "keep"] = "reset"
    """Whether the optimizer's moments and step count are reset at the phase's start, or kept."""
    begin_from: Literal["weights", "average"] = "weights"
    """Whether the phase begins with the weights of the phase before, or with their `average`, which
    that phase then needs; in the first phase, those of the checkpoint that `--from` names."""
    average: AverageConfig | None = None
    """An average of the phase's weights, beside them; none if left out."""
    trained: Literal["all", "new_embeddings"] = "all"
    """`new_embeddings` trains only the rows of embedding and output projection that belong to the
    tokens by which the vocabulary was extended; all other weights stay as they are, bit for bit.
    This phase and the next one need `optimizer_state: reset`."""
    first_new_token: CountOrZero | None = None
    """Id of the first of these tokens; if left out, the checkpoint with which the run starts
    records it, as those of `convert extend-vocab` do."""
    model: PhaseModelConfig | None = None
    """Sequence length and rotary positions of the phase; as in the `model` section if left out."""
    batch: PhaseBatchConfig | None = None
    """Batch of the phase; as in the `batch` section if left out."""
    learning_rate: LearningRateConfig
    """Learning-rate schedule."""
    stop: StopConfig = StopConfig()
    """Conditions that end the phase before its length is reached."""

    @property
    def length_key(self) -> str:
        """Which of the keys gives the phase's length."""
        return self._length_keys()[0]

    def _length_keys(self) -> list[str]:
        return [key for key in PHASE_LENGTHS if getattr(self, key) is not None]

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        given = self._length_keys()
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"give exactly one of {', '.join(PHASE_LENGTHS)}; found {found}")
        if self.epochs is not None and self.mixture.max_epochs is not None:
            raise ValueError(
                "epochs does not go with mixture.max_epochs, whose rates depend on the length; "
                "give tokens or steps"
            )
        return self

    @model_validator(mode="after")
    def _trains_new_rows_from_a_reset(self) -> Self:
        if self.trained == "all" and self.first_new_token is not None:
            raise ValueError(
                "first_new_token is only for trained: new_embeddings; leave it out, or write that"
            )
        if self.trained == "new_embeddings" and self.optimizer_state == "keep":
            raise ValueError(
                "trained: new_embeddings needs optimizer_state: reset, because the moments of "
                "the other weights would change them; write reset"
            )
        return self

    @model_validator(mode="after")
    def _ends_within_the_schedule(self) -> Self:
        rate = self.learning_rate
        if self.steps is not None and rate.steps is not None:
            end = rate.first_step + self.steps
            if end > rate.steps:
                raise ValueError(
                    f"the phase ends at step {end:,} of its schedule (learning_rate.first_step "
                    f"{rate.first_step:,} + steps {self.steps:,}), beyond learning_rate.steps "
                    f"({rate.steps:,}); make it {end:,} or more"
                )
        if self.steps is not None and rate.steps is None:
            problem = rate.too_long_for(self.steps)
            if problem:
                raise ValueError(f"learning_rate: {problem}")
        return self
