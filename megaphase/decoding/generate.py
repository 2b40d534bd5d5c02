"""Generate continuations of any number of prompts, in batches of prompts of similar length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megaphase.decoding.beam import beam_search
from megaphase.decoding.decoder import DecodedModel
from megaphase.decoding.options import Continuation, Decoding, Prompt
from megaphase.decoding.sampling import sample
from megaphase.ops.attention import without_plans
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError


def generate(
    model: DecodedModel,
    prompts: Sequence[Sequence[int]],
    how: Decoding,
    eod: int,
    *,
    batch: int = 16,
    stop: Callable[[list[int]], bool] | None = None,
    numbers: Sequence[int] | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> list[Continuation]:
    """Return the best continuation of every prompt, up to EOD or one of `how.ends`; it does not
    depend on the batch.

    A continuation also ends at the model's seq_len. An empty prompt starts a document, as after
    EOD.

    Args:
        prompts: token ids of each prompt.
        batch: number of prompts that are computed at a time.
        stop: whether a continuation with these tokens is finished, without EOD; not in beam search.
        numbers: of the prompts, on which their random numbers depend; by default their places.
        advance: called with the number of prompts finished since the last call.

    Raises:
        InputError: a prompt is longer than the model's seq_len.
        RunError: the model's logits are not finite.
    """
    seq_len = model.shape.seq_len
    check_lengths(prompts, seq_len)
    places = range(len(prompts)) if numbers is None else numbers
    waiting = [
        # The last generated token is not fed, so it needs no position.
        Prompt(list(tokens), number, min(how.max_tokens, seq_len - len(tokens) + 1), stop)
        for number, tokens in zip(places, (tokens or [eod] for tokens in prompts), strict=True)
    ]
    waiting.sort(key=lambda prompt: len(prompt.tokens))
    found: dict[int, Continuation] = {}
    for first in range(0, len(waiting), batch):
        together = waiting[first : first + batch]
        with without_plans():
            if how.beam > 1:
                best = [kept[0] for kept in beam_search(model, together, how, eod)]
            else:
                best = sample(model, together, how, eod)
        found |= {prompt.number: each for prompt, each in zip(together, best, strict=True)}
        advance(len(together))
    return [found[number] for number in places]


def text_after(prompt: Sequence[int], tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return the text that the tokens add to the prompt's, without a character that is cut off.

    Both are decoded together, since many tokenizers drop a text's first space, and a character may
    have begun in the prompt.
    """
    before = tokenizer.decode(prompt)
    both = tokenizer.decode([*prompt, *tokens], whole=True)
    return both[len(before) :] if both.startswith(before) else tokenizer.decode(tokens, whole=True)


def check_lengths(prompts: Sequence[Sequence[int]], seq_len: int) -> None:
    """Reject prompts, given as token ids, that are longer than the model's seq_len.

    Raises:
        InputError: names the first such prompt.
    """
    for number, tokens in enumerate(prompts, 1):
        if len(tokens) > seq_len:
            raise InputError(
                f"prompt {number}",
                f"has {len(tokens):,} tokens, the model's seq_len is {seq_len:,}",
                "shorten it",
            )
