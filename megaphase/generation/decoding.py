"""How a continuation is chosen, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Decoding:
    """Greedy by default; beam search where beam > 1, sampling where temperature > 0.

    Attributes:
        max_tokens: after so many a continuation ends without EOD.
        beam: hypotheses that are followed at a time.
        length_penalty: a hypothesis of n tokens, EOD included, scores its log-probability / n to
            this power: 0 favours short ones, larger values long ones.
        temperature: logits are divided by it.
        top_k: tokens to sample among, the likeliest; 0 for all.
        top_p: the likeliest tokens whose probabilities reach this together.
        seed: of the sampling.
    """

    max_tokens: int = 64
    beam: int = 1
    length_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Prompt:
    """Tokens to go on from.

    Attributes:
        number: its place in the input, on which its random numbers depend.
        limit: the most tokens that it may get, EOD included.
    """

    tokens: list[int]
    number: int
    limit: int


@dataclass
class Continuation:
    """What the model made of a prompt.

    Attributes:
        tokens: without EOD.
        log_probability: of the tokens, and of EOD where it came, under the model; nats.
        ended: whether EOD came.
    """

    tokens: list[int] = field(default_factory=list)
    log_probability: float = 0.0
    ended: bool = False

    def then(self, token: int, gain: float, eod: int) -> Continuation:
        """The continuation with one more token, of that log-probability."""
        total = self.log_probability + gain
        if token == eod:
            return Continuation(self.tokens, total, ended=True)
        return Continuation([*self.tokens, token], total)
