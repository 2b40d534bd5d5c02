"""lm-evaluation-harness's interface to a model: it imports lm_eval, which is an extra.

Tokens are those that the exported model has under `lm_eval --model hf`: BOS begins a text where the
tokenizer's files say so, and an empty context is BOS or, where there is none, EOD.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megaphase.chats.turn_ends import turn_ends
from megaphase.decoding.options import Decoding
from megaphase.harness.scoring import Scored
from megaphase.harness.service import Continued, ModelService
from megaphase.utils.errors import InputError

# Of lm-evaluation-harness, for tasks that name no number.
DEFAULT_NEW_TOKENS = 256
_SAMPLING = ("temperature", "top_k", "top_p")
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_WITHOUT_EFFECT = ("do_sample", "use_cache")

Pair = tuple[object, list[int], list[int]]  # what lm_eval caches by; context; continuation


class ServedModel(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """Answers the requests of lm_eval by a ModelService; exists on rank 0 alone."""

    def __init__(self, service: ModelService) -> None:
        super().__init__()
        self.service, self._tokens = service, service.tokenizer
        self._bos = self._tokens.bos if self._tokens.adds_bos else None
        self._tasks: list[str | None] = []  # of the requests that are being tokenized
        self._turn_ends = turn_ends(self._tokens)

    @property
    def eot_token_id(self) -> int:
        return self._tokens.eod

    @property
    def prefix_token_id(self) -> int:
        return self._tokens.eod if self._tokens.bos is None else self._tokens.bos

    @property
    def max_length(self) -> int:
        return self.service.model.shape.seq_len

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The tokens of a text, after BOS if the model was trained with it."""
        tokens = self._tokens.encode(string)
        if self._bos is None or add_special_tokens is False:
            return tokens
        if add_special_tokens is None and string.startswith(self._tokens.piece(self._bos)):
            return tokens
        return [self._bos, *tokens]

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether it is the greedy one."""
        self._tasks = [request.task_name for request in requests]
        try:
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
            return found
        finally:
            self._tasks = []

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        tasks = self._tasks or [None] * len(requests)
        rows = [
            self._scored(task or "the task", context, continuation)
            for task, (_, context, continuation) in zip(tasks, requests, strict=True)
        ]
        return [(each.log_probability, each.greedy) for each in self.service.score(rows)]

    def _scored(self, task: str, context: list[int], continuation: list[int]) -> Scored:
        """Left of what the model sees, a context is cut off."""
        if not continuation:
            raise InputError(task, "asks for the probability of an empty text", "mend it")
        if len(continuation) > self.max_length:
            raise InputError(
                task,
                f"has a continuation of {len(continuation):,} tokens, the model's seq_len is "
                f"{self.max_length:,}",
                "leave the task out",
            )
        whole = context + continuation
        return Scored(whole[-(self.max_length + 1) :], len(continuation))

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each text, in windows where it is longer than the model's
        seq_len."""
        pairs: list[Pair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                pairs.append((None, *make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (gain, _) in zip(owners, self._loglikelihood_tokens(pairs), strict=True):
            sums[owner] += gain
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to the first of the task's stop texts."""
        prompts = [self._continued(request) for request in requests]
        found = self.service.continue_(prompts)
        return [
            postprocess_generated_text(self._tokens.decode(each.tokens), list(prompt.stops), None)
            for prompt, each in zip(prompts, found, strict=True)
        ]

    def _continued(self, request: Instance) -> Continued:
        context, given = request.args
        task = request.task_name or "the task"
        _check_generation(task, given)
        options = normalize_gen_kwargs(given, DEFAULT_NEW_TOKENS)
        stops = handle_stop_sequences(options.pop("until"), self._tokens.piece(self._tokens.eod))
        new_tokens = options.pop("max_gen_toks")
        room = self.max_length - new_tokens
        if room <= 0:
            raise InputError(
                task,
                f"generates up to {new_tokens:,} tokens, the model's seq_len is "
                f"{self.max_length:,}",
                "set max_gen_toks in generation_kwargs of its file",
            )
        unknown = [key for key in options if key not in (*_SAMPLING, *_WITHOUT_EFFECT)]
        if unknown:
            raise InputError(
                task, f"generation_kwargs: {unknown[0]} is not supported", "leave it out"
            )
        sampled = {key: options[key] for key in _SAMPLING if options.get(key) is not None}
        if not options.get("do_sample"):
            sampled = {}
        elif not sampled.get("temperature"):
            raise InputError(task, "do_sample needs a temperature above 0", "set it")
        tokens = self.tok_encode(context)[-room:] or [self.prefix_token_id]
        how = Decoding(new_tokens, ends=self._turn_ends, **sampled)
        return Continued(tokens, how, tuple(filter(None, stops)))


def _check_generation(task: str, given: Mapping[str, Any]) -> None:
    """Raise InputError for a number in a task's generation_kwargs that no model can use."""
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        **dict.fromkeys(_LENGTHS, (lambda n: n >= 1 and n % 1 == 0, "a whole number from 1")),
        "temperature": (lambda n: 0 <= n < math.inf, "0 or a positive number"),
        "top_k": (lambda n: n >= 0 and n % 1 == 0, "0 or a positive whole number"),
        "top_p": (lambda n: 0 < n <= 1, "a number above 0, at most 1"),
    }
    for key, (is_right, rule) in rules.items():
        value = given.get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and is_right(value)):
            problem = f"generation_kwargs.{key} is {value!r}"
            raise InputError(task, problem, f"write {rule} in its file")
