"""The options of decoding, and its results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Decoding:
    """Options of decoding: beam search if beam > 1, sampling if temperature > 0, otherwise greedy.

    Attributes:
        max_tokens: maximum number of new tokens; a longer continuation ends without EOD.
        beam: number of hypotheses that are extended at a time.
        length_penalty: the score of a hypothesis of n tokens, EOD included, is its log-probability
            divided by n to this power: 0 favours short ones, larger values long ones.
        temperature: the logits are divided by it.
        top_k: sample among this many most likely tokens; 0: all.
        top_p: sample among the most likely tokens whose probabilities sum to this.
        seed: seed of the sampling.
        ends: tokens that end a continuation as EOD does, such as the end of a turn.
    """

    max_tokens: int = 64
    beam: int = 1
    length_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    ends: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Prompt:
    """Tokens to be continued.

    Attributes:
        number: index in the input, on which the random numbers depend.
        limit: maximum number of new tokens, EOD included.
        stop: whether a continuation with these tokens is finished; None: tokens alone finish it.
    """

    tokens: list[int]
    number: int
    limit: int
    stop: Callable[[list[int]], bool] | None = None


@dataclass
class Continuation:
    """A generated continuation of a prompt.

    Attributes:
        tokens: the new tokens without the one that ends them.
        log_probability: of the tokens, and of EOD or the end of a turn if it was generated, in
            nats.
        ended: whether one of these was generated.
    """

    tokens: list[int] = field(default_factory=list)
    log_probability: float = 0.0
    ended: bool = False

    def then(
        self, token: int, gain: float, eod: int, ends: frozenset[int] = frozenset()
    ) -> Continuation:
        """Return the continuation extended by one token with this log-probability; EOD and `ends`
        finish it."""
        total = self.log_probability + gain
        if token == eod or token in ends:
            return Continuation(self.tokens, total, ended=True)
        return Continuation([*self.tokens, token], total)
