"""Scores and continuations for rank 0, computed by all ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from megaphase.decoding.generate import generate
from megaphase.decoding.options import Continuation, Decoding
from megaphase.distributed.all_ranks import Fault, result_or_fault
from megaphase.distributed.control_group import ControlGroup
from megaphase.harness.rank_model import RankModel
from megaphase.harness.scoring import Score, Scored, alike, batches, score
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import RunError, one_line

Result = TypeVar("Result")
# A stop text may be generated in more tokens than it is encoded in.
_TOKENS_MORE = 2


class Continued(NamedTuple):
    """A prompt, given as tokens, and how to continue it: until one of the texts `stops` appears."""

    prompt: list[int]
    how: Decoding
    stops: tuple[str, ...]


class ComputingError(Exception):
    """A rank has failed while others wait for it in the middle of a forward pass, so that the
    processes can only end."""


@dataclass(frozen=True)
class _Over:
    """Tells the other ranks that there are no more requests. fault: with which rank 0 has ended."""

    fault: Fault | None


class ModelService:
    """Distributes the requests of rank 0 over the data-parallel ranks, and collects the results.

    Within `serve`, rank 0 calls `score` and `continue_`; the other ranks wait for requests.
    """

    def __init__(
        self,
        model: RankModel,
        tokenizer: Tokenizer,
        control: ControlGroup,
        *,
        batch: int,
        advance: Callable[[str, int, int], object] = lambda what, done, total: None,
    ) -> None:
        """
        Args:
            batch: rows of full length that are computed at a time on a data-parallel rank; more
                where they are shorter.
            advance: called on rank 0 with a kind of request, and the number of those that are
                finished on it, and of all.
        """
        self.model, self.tokenizer = model, tokenizer
        self._control, self._batch, self._advance = control, batch, advance

    def serve(self, action: Callable[[], Result]) -> Result | None:
        """Run `action` on rank 0 while the other ranks compute what it asks for.

        Called by all ranks. Returns its result on rank 0, None on the others.

        Raises:
            InputError, RunError: those of `action`, on every rank.
            ComputingError: on the rank that has failed.
        """
        if self.model.grid.is_first:
            outcome = result_or_fault(action)
            if isinstance(outcome, Fault):
                self._control.from_first_rank(_Over(outcome))
                raise outcome
            self._control.from_first_rank(_Over(None))
            return outcome
        nothing: Any = None
        while not isinstance(work := self._control.from_first_rank(nothing), _Over):
            self._compute(work)
        if work.fault is not None:
            raise work.fault
        return None

    def score(self, rows: Sequence[Scored]) -> list[Score]:
        """Return the score of every row; on rank 0 within `serve`."""
        return self._collected([*rows])

    def continue_(self, prompts: Sequence[Continued]) -> list[Continuation]:
        """Return the continuation of every prompt; on rank 0 within `serve`."""
        return self._collected([*prompts])

    def _collected(self, requests: list[Any]) -> list[Any]:
        if not requests:
            return []
        self._control.from_first_rank(requests)
        found = self._compute(requests)
        for part in found:
            if isinstance(part, Fault):
                raise part
        results = {i: result for part in found for i, result in part.items()}
        return [results[i] for i in range(len(requests))]

    def _compute(self, requests: list[Scored] | list[Continued]) -> list[Any]:
        """Compute this rank's part; return the parts of all ranks, or what has failed on them."""
        own = self._own_part_or_fault(requests)
        self.model.join_others()
        is_copy = self.model.grid.tensor_rank > 0 and not isinstance(own, Fault)
        return self._control.gather({} if is_copy else own)

    def _own_part_or_fault(self, requests: list[Scored] | list[Continued]) -> Any:
        """Whatever a rank raises becomes a fault, which the others then get with its part."""
        try:
            return result_or_fault(lambda: self._own_part(requests))
        except Exception as error:
            text = one_line(" ".join(str(error).split()))
            problem = f"rank {self._control.rank} has failed: {text or type(error).__name__}"
            if isinstance(error, torch.OutOfMemoryError):
                problem += "; a smaller batch needs less memory"
            if self.model.waits_for_others:
                raise ComputingError(problem) from error
            return RunError(problem)

    def _own_part(self, requests: list[Scored] | list[Continued]) -> dict[int, Any]:
        grid = self.model.grid
        if isinstance(requests[0], Continued):
            # Of prompts that are sorted by length, every rank has some of each length.
            order = sorted(range(len(requests)), key=lambda i: -len(requests[i][0]))
            return self._continuations(requests, order[grid.data_rank :: grid.data_size])
        found: dict[int, Any] = {}
        rows = [Scored(*each) for each in requests]
        groups = alike(rows)
        lengths = [len(rows[group[0]].tokens) for group in groups]
        own = batches(lengths, self._batch * self.model.shape.seq_len)
        own = own[grid.data_rank :: grid.data_size]
        total = sum(len(groups[number]) for batch in own for number in batch)
        for batch in own:
            together = [groups[number] for number in batch]
            scores = score(self.model, [[rows[i] for i in group] for group in together])
            for group, of_group in zip(together, scores, strict=True):
                found |= dict(zip(group, of_group, strict=True))
            self._advance("scoring", len(found), total)
        return found

    def _continuations(self, requests: Sequence[Any], own: Sequence[int]) -> dict[int, Any]:
        alike: dict[tuple[Decoding, tuple[str, ...]], list[int]] = defaultdict(list)
        for i in own:
            alike[requests[i].how, requests[i].stops].append(i)
        found: dict[int, Any] = {}
        for (how, stops), group in alike.items():
            done = len(found)

            def count(finished: int) -> None:
                nonlocal done
                done += finished
                self._advance("generating", done, len(own))

            continuations = generate(
                self.model,
                [requests[i].prompt for i in group],
                how,
                self.tokenizer.eod,
                batch=self._batch,
                stop=self._stop(stops),
                numbers=group,
                advance=count,
            )
            found |= dict(zip(group, continuations, strict=True))
        return found

    def _stop(self, stops: Sequence[str]) -> Callable[[list[int]], bool] | None:
        """Whether the last tokens contain one of the texts."""
        if not stops:
            return None
        tokenizer = self.tokenizer
        longest = max(map(len, tokenizer.encode_batch(list(stops)))) + _TOKENS_MORE

        def is_finished(tokens: list[int]) -> bool:
            text = tokenizer.decode(tokens[-longest:])
            return any(stop in text for stop in stops)

        return is_finished
