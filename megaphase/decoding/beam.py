"""Beam search: of all hypotheses of one length, the most likely few are extended.

Finished hypotheses are kept and compared by length-normalized score (Wu et al. 2016, section 7,
with n to a power as in most toolkits). Ties are broken by the rank of the extended hypothesis, then
by the smaller token id, so the result is the same on every run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from megaphase.decoding.decoder import DecodedModel, Decoder
from megaphase.decoding.options import Continuation, Decoding, Prompt
from megaphase.distributed.device_copies import to_device

Candidate = tuple[float, int, int]  # gain in log-probability; the beam it extends; token


class BeamSearch:
    """The search for the continuations of one prompt, independent of the model.

    Attributes:
        live: unfinished hypotheses, at most `beam`, the most likely first.
        kept: finished hypotheses, at most `beam`, the best first.
    """

    def __init__(self, limit: int, how: Decoding, eod: int) -> None:
        self.live = [Continuation()]
        self.kept: list[Continuation] = []
        self._limit, self._how, self._eod = limit, how, eod
        self._length = 0

    def score(self, hypothesis: Continuation) -> float:
        """Return the score by which hypotheses of different lengths are compared."""
        length = len(hypothesis.tokens) + hypothesis.ended
        return float(hypothesis.log_probability / length**self._how.length_penalty)

    def extend(self, candidates: Iterable[Candidate]) -> list[tuple[int, int]]:
        """Replace the live hypotheses by their most likely extensions, the most likely first.

        Returns, for every hypothesis that is live now, the index of the hypothesis that it
        extends, and its token; nothing if the search is finished.
        """
        before, beam = self.live, self._how.beam
        self.live, origins = [], []
        self._length += 1
        for rank, (gain, number, token) in enumerate(candidates):
            if len(self.live) == beam:
                break
            hypothesis = before[number].then(token, gain, self._eod, self._how.ends)
            if not hypothesis.ended:
                self.live.append(hypothesis)
                origins.append((number, token))
            elif rank < beam:  # a less likely extension has no place in the beam
                self.kept.append(hypothesis)
        if self._length == self._limit:
            self.kept += self.live
            self.live = []
        self.kept = sorted(self.kept, key=self.score, reverse=True)[:beam]
        return origins if self.live and not self._is_decided() else []

    def _is_decided(self) -> bool:
        """Return whether `beam` hypotheses are finished and no live one can have a better score."""
        if len(self.kept) < self._how.beam:
            return False
        return self.score(self.live[0]) <= self.score(self.kept[-1])


def beam_search(
    model: DecodedModel, prompts: Sequence[Prompt], how: Decoding, eod: int
) -> list[list[Continuation]]:
    """Return the best continuations of every prompt, at most `how.beam` of each, the best first.

    Every prompt takes `how.beam` rows of the batch until its search is finished. `Prompt.stop` is
    for sampling alone.
    """
    beam = how.beam
    limits = [prompt.limit for prompt in prompts]
    decoder = Decoder(model, [p.tokens for p in prompts], max(limits), copies=beam)
    searches = [BeamSearch(limit, how, eod) for limit in limits]
    active = list(searches)
    decoder.select([i for i in range(len(prompts)) for _ in range(beam)])
    while True:
        everything = _candidates(decoder.logits.log_softmax(-1), active, how)
        rows, tokens, unfinished = [], [], []
        for place, (search, candidates) in enumerate(zip(active, everything, strict=True)):
            if origins := search.extend(candidates):
                # Rows that no hypothesis needs are copies of the best one; their results are not
                # used.
                origins += origins[:1] * (beam - len(origins))
                rows += [place * beam + number for number, _ in origins]
                tokens += [token for _, token in origins]
                unfinished.append(search)
        if not unfinished:
            return [search.kept for search in searches]
        if len(unfinished) == len(active):
            decoder.reorder(rows)
        else:
            decoder.select(rows)
        active = unfinished
        decoder.step(to_device(torch.tensor(tokens), decoder.logits.device))


def _candidates(
    gains: Tensor, searches: Sequence[BeamSearch], how: Decoding
) -> list[list[Candidate]]:
    """Return the most likely extensions of every search's hypotheses: as many as may be live, and
    as many again for each token that ends one.

    gains: [searches * beam, vocab], the log-probabilities of the next token.
    """
    vocab, beam = gains.shape[1], how.beam
    totals = [
        [each.log_probability for each in search.live] + [-math.inf] * (beam - len(search.live))
        for search in searches
    ]
    before = to_device(torch.tensor(totals, dtype=torch.float64), gains.device).view(-1, 1)
    scores = (gains + before).view(len(searches), beam * vocab)
    count = min((2 + len(how.ends)) * beam, beam * vocab)
    values, places, tied = _largest_unless_tied(scores, count)
    figures = _figures(gains, values, places, tied)
    if figures[3].any():
        values, places = _first_of_sorted(scores, count)
        figures = _figures(gains, values, places, tied)
    return [
        [
            (gain, *divmod(int(place), vocab))
            for value, gain, place in zip(*columns, strict=True)
            if value > -math.inf
        ]
        for columns in zip(*figures[:3].tolist(), strict=True)
    ]


def _figures(gains: Tensor, values: Tensor, places: Tensor, tied: Tensor) -> Tensor:
    """Scores, gains, places, and whether these are among equal ones, read at once; float64
    [4, searches, count], CPU. float64 holds them all exactly."""
    gained = gains.view(len(values), -1).gather(1, places)
    columns = values, gained, places, tied.expand_as(values)
    return torch.stack([each.double() for each in columns]).cpu()


def largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest values of each row and their indices, in order. Of equal values,
    those with the smallest index come first, which `torch.topk` does not guarantee."""
    values, places, tied = _largest_unless_tied(scores, count)
    return _first_of_sorted(scores, count) if tied.any() else (values, places)


def _largest_unless_tied(scores: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """`largest` for the rows that are not tied: bool [rows, 1], whether the smallest of these
    values also stands elsewhere in the row."""
    values, places = scores.topk(count)
    edge = values[:, -1:]
    tied = (scores == edge).sum(1, keepdim=True) > (values == edge).sum(1, keepdim=True)
    places, order = places.sort(1)
    values, order = values.gather(1, order).sort(stable=True, dim=1, descending=True)
    return values, places.gather(1, order), tied


def _first_of_sorted(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    values, places = scores.sort(stable=True, dim=1, descending=True)
    return values[:, :count], places[:, :count]
