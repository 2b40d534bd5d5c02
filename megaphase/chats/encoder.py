"""Conversations as tokens, with a mark for each token of an answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from megaphase.chats.control_tokens import ControlTokens
from megaphase.chats.library import load_encoder
from megaphase.chats.template import ASSISTANT, ChatError, ChatTemplate, Message, RenderedChat
from megaphase.tokenizer import TOKENIZER_JSON_NAME, Tokenizer
from megaphase.utils.errors import InputError

_INSTRUCTIONS = frozenset(("system", "developer"))  # roles that ask nothing


class EncodedChat(NamedTuple):
    """A conversation.

    Attributes:
        tokens: int32 [tokens], with the EOD that ends it.
        targets: u8 [tokens], 1 where a token belongs to an answer.
        prompt: what comes before the first answer to a message, or, where there is none, all of
            it; from this the hash is computed, in UTF-8.
        text_bytes: size of all messages in bytes of UTF-8.
    """

    tokens: np.ndarray
    targets: np.ndarray
    prompt: bytes
    text_bytes: int


@dataclass(frozen=True)
class ChatEncoder:
    """Renders conversations by the template of a Hugging Face tokenizer, and tokenizes them."""

    tokenizer: Tokenizer
    template: ChatTemplate

    @classmethod
    def load(cls, tokenizer: Tokenizer) -> ChatEncoder:
        """Raises InputError if the tokenizer has no tokenizer.json or no chat template, or its
        files are damaged or contradict each other."""
        if not (tokenizer.path / TOKENIZER_JSON_NAME).is_file():
            problem = f"has no {TOKENIZER_JSON_NAME}, by which chats are tokenized"
            remedy = "take the directory of a Hugging Face model with a chat template"
            raise InputError(tokenizer.path, problem, remedy)
        encoder = cls(tokenizer, ChatTemplate.load(tokenizer.path))
        _ = encoder._encoder
        return encoder

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer, "template": self.template}

    def encode(self, messages: Sequence[Message]) -> EncodedChat:
        """Return a conversation's tokens.

        Raises ChatError if it has no answer, the template refuses it, its answers cannot be found,
        or a control token comes from a message, not from the template.
        """
        rendered = self.template.render(messages)
        ids, targets = self._marked(rendered)
        self._control_tokens.check(messages, ids)
        if not targets.any():
            if any(message["role"] == ASSISTANT for message in messages):
                raise ChatError("the chat template gives the assistant no token in it")
            raise ChatError("no message is of the role 'assistant'")
        # Training puts BOS before a document by itself, where the tokenizer has that.
        if self.tokenizer.adds_bos and len(ids) and ids[0] == self.tokenizer.bos:
            ids, targets = ids[1:], targets[1:]
        if not len(ids) or ids[-1] != self.tokenizer.eod:
            ids = np.append(ids, np.int32(self.tokenizer.eod))
            targets = np.append(targets, np.uint8(0))
        size = sum(len(each["content"].encode()) for each in messages)
        return EncodedChat(ids, targets, _prompt(messages), size)

    def _marked(self, rendered: RenderedChat) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of a rendered conversation, int32, and the marks of answers, u8."""
        encoded = self._encoder.encode(rendered.text, add_special_tokens=False)
        ids = np.array(encoded.ids, np.int32)
        offsets = np.array(encoded.offsets, np.int64).reshape(-1, 2)
        targets = np.zeros(len(ids), np.uint8)
        for begin, end in rendered.answers:
            if rendered.is_marked:
                first, last = _marked_tokens(encoded, begin, end, len(rendered.text))
            else:
                first, last = self._tokens_of(rendered.text, begin, end, ids, offsets)
            targets[first : last + 1] = 1
        return ids, targets

    def _tokens_of(
        self, text: str, begin: int, end: int, ids: np.ndarray, offsets: np.ndarray
    ) -> tuple[int, int]:
        """Return the first and the last token of an answer, without white space after the control
        token that ends it; ids int [tokens], offsets [tokens, 2]."""
        if begin == end:
            return 0, -1
        is_control = self._control_tokens.is_control
        first = int(np.searchsorted(offsets[:, 1], begin, side="right"))
        if first < len(ids) and offsets[first, 0] < begin and is_control[ids[first]]:
            first += 1  # the control token before the answer takes the white space after it
        before_space = begin + len(text[begin:end].rstrip())
        for each in (before_space, end):
            last = int(np.searchsorted(offsets[:, 0], each, side="left")) - 1
            if last >= first and is_control[ids[last]]:
                break
        return first, last

    @cached_property
    def _encoder(self) -> Any:  # the library has no types
        # Where the template marks answers itself, their tokens are found as transformers does.
        return load_encoder(self.tokenizer, trims_offsets=self.template.compiled.marks_answers)

    @cached_property
    def _control_tokens(self) -> ControlTokens:
        return ControlTokens(self.tokenizer, self.template, self._encoder)


def _marked_tokens(encoded: Any, begin: int, end: int, size: int) -> tuple[int, int]:
    """Return the first and the last token of a {% generation %} block as transformers finds them;
    size: of the text, in characters.

    Raises ChatError where it finds none: it then marks nothing, or everything up to the end.
    """
    if begin == end == size:
        return 0, -1
    first = encoded.char_to_token(begin)
    last = encoded.char_to_token(end - 1) if end else None
    if first is None or not last:
        problem = "transformers finds no token for the first or the last character of an answer"
        remedy = 'white space has one with "trim_offsets": false in tokenizer.json'
        raise ChatError(f"{problem}, so it would mark others; {remedy}")
    return first, last


def _prompt(messages: Sequence[Message]) -> bytes:
    asked = (
        number
        for number, message in enumerate(messages)
        if message["role"] == ASSISTANT
        and any(each["role"] not in {*_INSTRUCTIONS, ASSISTANT} for each in messages[:number])
    )
    first = next(asked, len(messages))
    prompt = [[each["role"], each["content"]] for each in messages[:first]]
    return json.dumps(prompt, ensure_ascii=False).encode()
