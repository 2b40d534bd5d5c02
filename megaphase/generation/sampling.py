"""Greedy decoding and sampling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megaphase.generation.decoder import Decoder
from megaphase.generation.decoding import Continuation, Decoding, Prompt
from megaphase.model.gpt import GPT


def sample(model: GPT, prompts: Sequence[Prompt], how: Decoding, eod: int) -> list[Continuation]:
    """Return a continuation of every prompt, computed as one batch; finished rows leave it."""
    decoder = Decoder(model, [p.tokens for p in prompts], max(p.limit for p in prompts))
    found = [Continuation() for _ in prompts]
    draws = [_uniform(how.seed, p.number, p.limit) for p in prompts]
    rows, step = list(range(len(prompts))), 0
    while True:
        if how.temperature:
            tokens = _drawn(decoder.logits, how, [float(draws[i][step]) for i in rows])
        else:
            tokens = decoder.logits.argmax(-1)
        gains = decoder.logits.log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
        for i, token, gain in zip(rows, tokens.tolist(), gains.tolist(), strict=True):
            found[i] = found[i].then(token, gain, eod)
        step += 1
        active = [
            row
            for row, i in enumerate(rows)
            if not found[i].ended and len(found[i].tokens) < prompts[i].limit
        ]
        if not active:
            return found
        decoder.select(active)
        rows = [rows[row] for row in active]
        decoder.step(tokens[active])


def _uniform(seed: int, number: int, count: int) -> np.ndarray:
    """Return a prompt's own random numbers, which depend neither on its batch nor on the device."""
    return np.random.default_rng([seed, number]).random(count)


def _drawn(logits: Tensor, how: Decoding, draws: Sequence[float]) -> Tensor:
    """Sample a token of each row, int64 [rows], restricted by top-k and top-p.

    Top-k and top-p (Holtzman et al. 2020) exclude all but the most likely tokens.
    """
    likeliest, tokens = (logits / how.temperature).sort(stable=True, dim=-1, descending=True)
    probabilities = likeliest.double().softmax(-1)
    if how.top_k:
        probabilities[:, how.top_k :] = 0.0
        probabilities /= probabilities.sum(-1, keepdim=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities[:, 1:][before[:, 1:] >= how.top_p] = 0.0
    reached = probabilities.cumsum(-1)
    wanted = torch.tensor(draws, dtype=torch.float64, device=logits.device) * reached[:, -1]
    places = torch.searchsorted(reached, wanted.unsqueeze(1), right=True)
    last = (probabilities > 0).sum(-1, keepdim=True) - 1
    return tokens.gather(1, places.minimum(last)).squeeze(1)
