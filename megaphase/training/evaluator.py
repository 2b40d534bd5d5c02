"""Loss of every task on documents that training never sees."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from megaphase.callbacks.callback import HeldOutLoss
from megaphase.plan.dataset import Batch, read_held_out
from megaphase.plan.spec import PlanSpec
from megaphase.tokenizer import Tokenizer
from megaphase.training.engine import Engine
from megaphase.utils.targets import IGNORED_TARGET


class HeldOutEvaluator:
    """Scores the first `samples` held-out samples of every task, always the same ones."""

    def __init__(self, spec: PlanSpec, engine: Engine, tokenizer: Tokenizer, samples: int) -> None:
        """samples: how many of each task; fewer where a task has not so many."""
        self._spec, self._engine = spec, engine
        self._samples, self._pad_token_id = samples, tokenizer.eod
        self._token_bytes = torch.from_numpy(tokenizer.token_bytes())  # int64 [vocab]

    def evaluate(self, next_task: Callable[[], object] = lambda: None) -> dict[str, HeldOutLoss]:
        """Losses of the current weights by task; called by all ranks, same result on each.

        `next_task` is called before each of them.
        """
        found = {}
        for number, (task, stream) in enumerate(self._spec.held_out.items()):
            next_task()
            rows = self._own_rows(read_held_out(stream, number, self._samples, self._pad_token_id))
            if torch.cuda.is_available():
                rows = rows.pinned()
            losses = self._engine.evaluate(rows)
            nats = float(losses.loss_sums[number])
            scored_bytes = self._engine.sum_by_task(self._bytes_of_rows(rows), rows)[number]
            found[task] = HeldOutLoss(
                nats / max(1.0, float(losses.tokens[number])),
                nats / math.log(2) / max(1.0, float(scored_bytes)),
            )
        return found

    def _own_rows(self, batch: Batch) -> Batch:
        """This data-parallel rank's rows; rows without targets fill up to equally many."""
        grid, micro = self._engine.grid, self._engine.micro
        share = -(-len(batch) // (grid.data_size * micro)) * micro
        missing = share * grid.data_size - len(batch)
        rows = slice(grid.data_rank * share, (grid.data_rank + 1) * share)
        pad = torch.nn.functional.pad
        documents = batch.documents
        return Batch(
            pad(batch.inputs, (0, 0, 0, missing), value=self._pad_token_id),
            pad(batch.targets, (0, 0, 0, missing), value=IGNORED_TARGET),
            pad(batch.tasks, (0, missing), value=int(batch.tasks[0])),
            None if documents is None else pad(documents, (0, 0, 0, missing)),
        )[rows]

    def _bytes_of_rows(self, batch: Batch) -> torch.Tensor:
        """Bytes of the text behind each row's targets; int64 [samples]."""
        scored = batch.targets != IGNORED_TARGET
        return (self._token_bytes[batch.targets.where(scored, 0)] * scored).sum(1)
