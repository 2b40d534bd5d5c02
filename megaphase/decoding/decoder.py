"""Incremental decoding of a batch of prompts with a GPT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megaphase.distributed.device_copies import to_device
from megaphase.model.kv_cache import KVCache
from megaphase.model.shape import GPTShape
from megaphase.utils.errors import RunError


class DecodedModel(Protocol):
    """A GPT, or what calls one."""

    @property
    def shape(self) -> GPTShape: ...

    @property
    def compute_dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def tensor_size(self) -> int: ...

    @property
    def __call__(self) -> Any:
        """`GPT.forward` with a cache."""


class Decoder:
    """A batch of token sequences and the model's predictions of their next tokens.

    Every token is fed to the model once; its keys and values are cached. The result of a row does
    not depend on the other rows.

    Attributes:
        logits: fp32 [rows, vocab], for the token after the last one of every row.
    """

    def __init__(
        self,
        model: DecodedModel,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        *,
        copies: int = 1,
    ) -> None:
        """
        Args:
                prompts: token ids, at least one per prompt.
                new_tokens: maximum number of new tokens per row, the last of which is not fed.
                copies: number of rows per prompt for which `select` may ask.

            Raises:
                RunError: the model's logits are not finite.
        """
        longest = max(map(len, prompts))
        device = model.device
        padding = [longest - len(prompt) for prompt in prompts]
        rows = [[0] * empty + list(p) for empty, p in zip(padding, prompts, strict=True)]
        self._model = model
        self._prompt_slots = longest
        self._cache = KVCache(
            model.shape,
            to_device(torch.tensor(padding), device),
            rows=len(prompts) * copies,
            slots=longest + new_tokens - 1,
            dtype=model.compute_dtype,
            tensor_size=model.tensor_size,
        )
        self.logits = self._feed(to_device(torch.tensor(rows), device))
        if not self.logits.isfinite().all():
            raise RunError("the model's logits are not finite; its training has diverged")

    def step(self, tokens: Tensor) -> None:
        """Append one token to every row, int64 [rows]."""
        self.logits = self._feed(tokens.unsqueeze(1))

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order; a row may be repeated."""
        self._select(rows, 0)

    def reorder(self, rows: Sequence[int]) -> None:
        """Like `select`, if every row is replaced by one with the same prompt."""
        self._select(rows, self._prompt_slots)

    def _select(self, rows: Sequence[int], first_slot: int) -> None:
        if list(rows) == list(range(len(self.logits))):
            return
        chosen = to_device(torch.tensor(rows), self.logits.device)
        self.logits = self.logits[chosen]
        self._cache.select(chosen, first_slot)

    @torch.inference_mode()
    def _feed(self, tokens: Tensor) -> Tensor:
        """Return the logits after the last of `tokens`, int64 [rows, seq]."""
        logits = self._model(tokens, cache=self._cache)
        assert isinstance(logits, Tensor)  # there are no targets
        return logits.float()
