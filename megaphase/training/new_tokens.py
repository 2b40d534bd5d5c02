"""Which tokens' rows a phase with `trained: new_embeddings` trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from megaphase.checkpoint.names import newest_state
from megaphase.checkpoint.state import NEW_TOKENS, STATE_FILE
from megaphase.config.run import RunConfig
from megaphase.plan.branch import Branch
from megaphase.utils.errors import InputError


@dataclass(frozen=True)
class TrainedTokens:
    """The tokens whose rows are trained.

    Attributes:
        recorded: those by which the model's vocabulary was extended, if a checkpoint records it.
        of_phases: for each phase, the tokens whose rows alone it trains; None where it trains all
            weights.
    """

    recorded: range | None
    of_phases: tuple[range | None, ...]

    @classmethod
    def of(cls, config: RunConfig, vocab_size: int, branch: Branch | None) -> Self:
        """Read them from the run file, and from the run's newest checkpoint or else the one with
        which it starts.

        vocab_size: the tokenizer's.

        Raises:
            InputError: a phase trains new tokens, and nothing says which they are.
        """
        recorded = _recorded(config, branch)
        phases = range(len(config.phases))
        return cls(
            recorded, tuple(_of_phase(config, i, recorded, vocab_size, branch) for i in phases)
        )

    def state(self) -> dict[str, Any]:
        """Return the record for the state of every checkpoint of the run."""
        if self.recorded is None:
            return {}
        return {NEW_TOKENS: [self.recorded.start, self.recorded.stop]}

    def event(self, phase: int) -> dict[str, Any]:
        """Return the facts of the event that the phase with this number starts."""
        tokens = self.of_phases[phase]
        return {} if tokens is None else {"trained_tokens": [tokens.start, tokens.stop]}

    def sentences(self, phase: int) -> list[str]:
        """Return what a run says at the start of the phase with this number."""
        tokens = self.of_phases[phase]
        if tokens is None:
            return []
        ids = f"{tokens.start:,} to {tokens.stop - 1:,}"
        return [f"only the rows of tokens {ids} are trained"]


def _recorded(config: RunConfig, branch: Branch | None) -> range | None:
    states: list[dict[str, Any]] = [newest_state(config.output) or {}]
    states += [] if branch is None else [branch.state]
    for state in states:
        if state.get(NEW_TOKENS) is not None:
            try:
                first, stop = state[NEW_TOKENS]
                return range(first, stop)
            except (TypeError, ValueError):
                where = config.output if branch is None else branch.checkpoint
                raise InputError(
                    where, f"{NEW_TOKENS} in {STATE_FILE} is damaged", "use another checkpoint"
                ) from None
    return None


def _of_phase(
    config: RunConfig,
    number: int,
    recorded: range | None,
    vocab_size: int,
    branch: Branch | None,
) -> range | None:
    phase = config.phases[number]
    if phase.trained == "all":
        return None
    if phase.first_new_token is not None:
        return range(phase.first_new_token, vocab_size)
    if recorded is None:
        origin = "the run starts from no checkpoint"
        if branch is not None:
            origin = f"{branch.checkpoint} does not record which tokens are new"
        raise InputError(
            config.where(f"phases[{number}].trained"),
            f"is new_embeddings, but {origin}",
            "give first_new_token, or start from a checkpoint of convert extend-vocab",
        )
    return recorded
