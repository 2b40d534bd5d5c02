"""Loss of every task on the documents of a split, such as those that training never sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch

from megaphase.callbacks.callback import HeldOutLoss
from megaphase.plan.dataset import Batch, read_held_out
from megaphase.plan.spec import PlanSpec
from megaphase.plan.stream import Stream
from megaphase.tokenizer import Tokenizer
from megaphase.training.engine import Engine
from megaphase.utils.targets import IGNORED_TARGET

Losses = dict[str, HeldOutLoss]
"""The losses of a split by task."""


class HeldOutEvaluator:
    """Scores the first `samples` samples of every task in a split, always the same ones in phases
    of the same sequence length."""

    def __init__(
        self,
        spec: PlanSpec,
        engine: Engine,
        tokenizer: Tokenizer,
        samples: int,
        streams: Mapping[str, Stream] | None = None,
    ) -> None:
        """
        Args:
            samples: how many of each task; fewer where a task has not so many.
            streams: of the tasks that the split has; the documents held out for validation by
                default.
        """
        self._spec, self._engine = spec, engine
        self._of_split = spec.held_out if streams is None else streams
        self._samples, self._pad_token_id = samples, tokenizer.eod
        self._token_bytes = torch.from_numpy(tokenizer.token_bytes())  # int64 [vocab]
        self._exact_bytes = tokenizer.exact_bytes
        self._of_length: dict[int, dict[str, Stream]] = {}
        self._weights: dict[tuple[str, int, int], torch.Tensor] = {}

    def evaluate(self, phase: int, next_task: Callable[[], object] = lambda: None) -> Losses:
        """Losses of the current weights by task; called by all ranks, same result on each.

        Args:
            phase: its number; the samples have its sequence length, which must be the engine's.
            next_task: called before each of them.
        """
        found, numbers = {}, {task: number for number, task in enumerate(self._spec.streams)}
        for task, stream in self._streams(phase).items():
            next_task()
            number = numbers[task]
            rows = self._own_rows(stream, number)
            if torch.cuda.is_available():
                rows = rows.pinned()
            losses = self._engine.evaluate(rows)
            nats = float(losses.loss_sums[number])
            row_bytes = (
                self._bytes_of_rows(rows)
                if self._exact_bytes
                else self._text_bytes_of_rows(stream, rows)
            )
            scored_bytes = self._engine.sum_by_task(row_bytes, rows)[number]
            found[task] = HeldOutLoss(
                nats / max(1.0, float(losses.tokens[number])),
                nats / math.log(2) / max(1.0, float(scored_bytes)),
            )
        return found

    def _streams(self, phase: int) -> dict[str, Stream]:
        seq_len = self._spec.phases[phase].kind.seq_len
        if seq_len not in self._of_length:
            self._of_length[seq_len] = {
                task: stream.at(seq_len) for task, stream in self._of_split.items()
            }
        return self._of_length[seq_len]

    def _own_rows(self, stream: Stream, task: int) -> Batch:
        """Read this data-parallel rank's samples; rows without targets fill up to equally many."""
        samples = min(self._samples, stream.samples_per_epoch)
        rows, _ = self._own_part(samples)
        batch = read_held_out(stream, task, samples, self._pad_token_id, rows)
        missing = rows.stop - rows.start - len(batch)
        pad = torch.nn.functional.pad
        documents = batch.documents
        return Batch(
            pad(batch.inputs, (0, 0, 0, missing), value=self._pad_token_id),
            pad(batch.targets, (0, 0, 0, missing), value=IGNORED_TARGET),
            pad(batch.tasks, (0, missing), value=task),
            None if documents is None else pad(documents, (0, 0, 0, missing)),
        )

    def _own_part(self, samples: int) -> tuple[slice, int]:
        """This data-parallel rank's part of the samples, and the rows that are missing to it."""
        grid, micro = self._engine.grid, self._engine.micro
        share = -(-samples // (grid.data_size * micro)) * micro
        rows = slice(grid.data_rank * share, (grid.data_rank + 1) * share)
        return rows, share * grid.data_size - samples

    def _text_bytes_of_rows(self, stream: Stream, batch: Batch) -> torch.Tensor:
        """Bytes of the text behind each row's targets before normalization; float64 [samples]."""
        # The micro-batch decides how many rows fill up, and which samples each rank has.
        key = stream.task, stream.seq_len, self._engine.micro
        if key not in self._weights:
            samples = min(self._samples, stream.samples_per_epoch)
            found = stream.bytes_of_targets(samples, self._token_bytes.numpy())
            rows, missing = self._own_part(samples)
            self._weights[key] = torch.from_numpy(np.pad(found, ((0, missing), (0, 0)))[rows])
        return (self._weights[key] * (batch.targets != IGNORED_TARGET)).sum(1)

    def _bytes_of_rows(self, batch: Batch) -> torch.Tensor:
        """Bytes of the text behind each row's targets; int64 [samples]."""
        scored = batch.targets != IGNORED_TARGET
        return (self._token_bytes[batch.targets.where(scored, 0)] * scored).sum(1)
