"""Loss of every task on the documents of a split, such as those that training never sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch.nn.functional import pad

from megaphase.callbacks.callback import HeldOutLoss
from megaphase.plan.dataset import Batch, read_samples
from megaphase.plan.spec import PlanSpec
from megaphase.plan.stream import Stream
from megaphase.tokenizer import Tokenizer
from megaphase.training.engine import Engine
from megaphase.utils.targets import IGNORED_TARGET

Losses = dict[str, HeldOutLoss]
"""The losses of a split by task."""

# Tokens that each rank reads and scores at a time: of many samples, all at once would not fit into
# memory, where a token needs about 40 bytes.
BLOCK_TOKENS = 1 << 20


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
        self._scored_bytes: dict[tuple[str, int, int], float] = {}

    def evaluate(self, phase: int, progress: Callable[[], object] = lambda: None) -> Losses:
        """Losses of the current weights by task; called by all ranks, same result on each.

        Args:
            phase: its number; the samples have its sequence length, which must be the engine's.
            progress: called before each block of samples.
        """
        found, numbers = {}, {task: number for number, task in enumerate(self._spec.streams)}
        for task, stream in self._streams(phase).items():
            found[task] = self._loss(stream, numbers[task], progress)
        return found

    def _loss(self, stream: Stream, task: int, progress: Callable[[], object]) -> HeldOutLoss:
        # The bytes do not depend on the weights. The micro-batch decides which samples each rank
        # has, and so how their sum is rounded: a resumed run must find the same one.
        key = stream.task, stream.seq_len, self._engine.micro
        nats, tokens, scored_bytes = 0.0, 0.0, 0.0
        for starts, rows in self._own_blocks(stream, task, progress):
            losses = self._engine.evaluate(rows)
            nats += float(losses.loss_sums[task])
            tokens += float(losses.tokens[task])
            if key not in self._scored_bytes:
                row_bytes = self._bytes_of_rows(stream, starts, rows)
                scored_bytes += float(self._engine.sum_by_task(row_bytes, rows)[task])
        scored_bytes = self._scored_bytes.setdefault(key, scored_bytes)
        return HeldOutLoss(nats / max(1.0, tokens), nats / math.log(2) / max(1.0, scored_bytes))

    def _streams(self, phase: int) -> dict[str, Stream]:
        seq_len = self._spec.phases[phase].kind.seq_len
        if seq_len not in self._of_length:
            self._of_length[seq_len] = {
                task: stream.at(seq_len) for task, stream in self._of_split.items()
            }
        return self._of_length[seq_len]

    def _own_blocks(
        self, stream: Stream, task: int, progress: Callable[[], object]
    ) -> Iterator[tuple[np.ndarray, Batch]]:
        """Read this data-parallel rank's samples in blocks of whole micro-batches; yield where the
        samples of each begin, too.

        Rows without targets fill up to equally many on every rank, so that all ranks have as many
        blocks of the same sizes.
        """
        samples = min(self._samples, stream.samples_per_epoch)
        grid, micro = self._engine.grid, self._engine.micro
        share = -(-samples // (grid.data_size * micro)) * micro
        block = max(1, BLOCK_TOKENS // (stream.seq_len * micro)) * micro
        first = min(grid.data_rank * share, samples)
        starts = stream.starts_in_blocks(first, min(first + share, samples), block)
        nothing = np.empty((0, 2), stream.start_dtype)
        for begin in range(0, share, block):
            progress()
            own, rows = next(starts, nothing), min(block, share - begin)
            batch = read_samples(stream, task, own, self._pad_token_id, rows)
            yield own, batch.pinned() if torch.cuda.is_available() else batch

    def _bytes_of_rows(self, stream: Stream, starts: np.ndarray, batch: Batch) -> torch.Tensor:
        """Bytes of the text before normalization behind each row's targets; [samples]."""
        scored = batch.targets != IGNORED_TARGET
        if self._exact_bytes:
            return (self._token_bytes[batch.targets.where(scored, 0)] * scored).sum(1)
        found = torch.from_numpy(stream.bytes_of_targets(starts, self._token_bytes.numpy()))
        return pad((found * scored[: len(starts)]).sum(1), (0, len(scored) - len(starts)))
