"""Greedy decoding and sampling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megaphase.decoding.decoder import DecodedModel, Decoder
from megaphase.decoding.options import Continuation, Decoding, Prompt
from megaphase.distributed.device_copies import to_device

# Tokens of each row that a GPU computes before the host looks for rows that are finished; these
# compute along until then, and what they have after EOD is dropped.
GPU_TOKENS_PER_READ = 8


def sample(
    model: DecodedModel, prompts: Sequence[Prompt], how: Decoding, eod: int
) -> list[Continuation]:
    """Return a continuation of every prompt, computed as one batch; finished rows leave it."""
    limits = [prompt.limit for prompt in prompts]
    decoder = Decoder(model, [p.tokens for p in prompts], max(limits))
    device = decoder.logits.device
    most = tokens_per_read(device)
    found = [Continuation() for _ in prompts]
    finished = [False] * len(prompts)
    draws = to_device(_uniform(prompts, how), device)
    rows, done = list(range(len(prompts))), 0
    tokens: Tensor | None = None
    while True:
        figures: list[Tensor] = []
        for step in range(done, min(done + most, min(limits[i] for i in rows))):
            if tokens is not None:
                decoder.step(tokens)
            tokens = _next_tokens(decoder.logits, how, draws[:, step])
            gains = decoder.logits.log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
            figures.append(torch.stack([tokens.double(), gains.double()]))  # exact in float64
        done += len(figures)
        for step_tokens, step_gains in torch.stack(figures).cpu().tolist():
            for i, token, gain in zip(rows, step_tokens, step_gains, strict=True):
                if not finished[i]:
                    found[i] = found[i].then(int(token), gain, eod, how.ends)
                    stop = prompts[i].stop
                    finished[i] = found[i].ended or (stop is not None and stop(found[i].tokens))
        active = [row for row, i in enumerate(rows) if not finished[i] and done < limits[i]]
        if not active:
            return found
        assert tokens is not None
        if len(active) < len(rows):
            decoder.select(active)
            chosen = to_device(torch.tensor(active), device)
            tokens, draws = tokens[chosen], draws[chosen]
            rows = [rows[row] for row in active]


def tokens_per_read(device: torch.device) -> int:
    """A CPU does one thing at a time, so there rows are finished with their last token."""
    return 1 if device.type == "cpu" else GPU_TOKENS_PER_READ


def _next_tokens(logits: Tensor, how: Decoding, draws: Tensor) -> Tensor:
    """The next token of each row, int64 [rows]; draws: see _drawn, unused where greedy."""
    return _drawn(logits, how, draws) if how.temperature else logits.argmax(-1)


def _uniform(prompts: Sequence[Prompt], how: Decoding) -> Tensor:
    """Return each prompt's own random numbers, which depend neither on its batch nor on the device;
    float64 [prompts, most tokens], 0 where none is needed."""
    draws = np.zeros((len(prompts), max(prompt.limit for prompt in prompts)))
    if how.temperature:
        for row, prompt in zip(draws, prompts, strict=True):
            row[: prompt.limit] = np.random.default_rng([how.seed, prompt.number]).random(
                prompt.limit
            )
    return torch.from_numpy(draws)


def _drawn(logits: Tensor, how: Decoding, draws: Tensor) -> Tensor:
    """Sample a token of each row, int64 [rows], restricted by top-k and top-p.

    Top-k and top-p (Holtzman et al. 2020) exclude all but the most likely tokens.

    draws: float64 [rows], uniform between 0 and 1.
    """
    likeliest, tokens = (logits / how.temperature).sort(stable=True, dim=-1, descending=True)
    probabilities = likeliest.double().softmax(-1)
    if how.top_k:
        probabilities[:, how.top_k :] = 0.0
        probabilities /= probabilities.sum(-1, keepdim=True)
    before = _running_sums(probabilities) - probabilities
    probabilities[:, 1:][before[:, 1:] >= how.top_p] = 0.0
    reached = _running_sums(probabilities)
    wanted = draws * reached[:, -1]
    places = torch.searchsorted(reached, wanted.unsqueeze(1), right=True)
    last = (probabilities > 0).sum(-1, keepdim=True) - 1
    return tokens.gather(1, places.minimum(last)).squeeze(1)


def _running_sums(probabilities: Tensor) -> Tensor:
    """The cumulative sums of each row; of the CPU, where `deterministic: true` asks for an
    operation that torch does not have on a GPU."""
    if torch.are_deterministic_algorithms_enabled():
        return probabilities.cpu().cumsum(-1).to(probabilities.device)
    return probabilities.cumsum(-1)
