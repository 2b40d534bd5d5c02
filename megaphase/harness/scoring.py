"""The log-probabilities of given continuations, in batches of similar length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch

from megaphase.distributed.device_copies import to_device
from megaphase.harness.rank_model import RankModel
from megaphase.ops.attention import without_plans
from megaphase.utils.errors import RunError
from megaphase.utils.targets import IGNORED_TARGET


class Scored(NamedTuple):
    """Tokens of which the last `scored` are to be scored, given those before them."""

    tokens: list[int]
    scored: int


class Score(NamedTuple):
    """log_probability: in nats. greedy: whether each token is the most likely one."""

    log_probability: float
    greedy: bool


def batches(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Return the indices of the batches, the longest rows first.

    A batch of n rows, padded to the longest one, has no more than `most_tokens` tokens, or a single
    row.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found: list[list[int]] = []
    first = 0
    while first < len(order):
        rows = max(1, most_tokens // max(1, lengths[order[first]]))
        found.append(order[first : first + rows])
        first += rows
    return found


def alike(rows: Sequence[Scored]) -> list[list[int]]:
    """Return the indices of rows that one forward pass serves: those that differ only in their
    last token, if that alone is scored, as the answers of a question with lettered choices do."""
    found: dict[object, list[int]] = defaultdict(list)
    for i, (tokens, count) in enumerate(rows):
        found[tuple(tokens[:-1]) if count == 1 else i].append(i)
    return list(found.values())


@torch.inference_mode()
def score(model: RankModel, groups: Sequence[Sequence[Scored]]) -> list[list[Score]]:
    """Return the scores of a batch, in which each group of rows takes one row; see `alike`.

    Raises:
        RunError: the model's logits are not finite.
    """
    longest = max(len(group[0].tokens) for group in groups) - 1
    most = max(map(len, groups))
    inputs = torch.zeros(len(groups), longest, dtype=torch.int64)
    targets = torch.full((len(groups), longest, most), IGNORED_TARGET)
    for i, group in enumerate(groups):
        last = len(group[0].tokens) - 1
        inputs[i, :last] = torch.tensor(group[0].tokens[:-1])
        for j, (tokens, count) in enumerate(group):
            targets[i, last - count : last, j] = torch.tensor(tokens[-count:])
    with without_plans():
        gains, hits = model(to_device(inputs), to_device(targets), score=True)
    sums = gains.double().sum(1)
    if not sums.isfinite().all():
        raise RunError("the model's logits are not finite; its training has diverged")
    return [
        [Score(*each) for each in zip(*pair, strict=True)][: len(group)]
        for group, pair in zip(
            groups, zip(sums.tolist(), hits.all(1).tolist(), strict=True), strict=True
        )
    ]
