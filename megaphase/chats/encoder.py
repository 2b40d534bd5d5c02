"""Conversations as tokens, with a mark for each token of an answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from megaphase.chats.template import ChatError, ChatTemplate, Message
from megaphase.tokenizer import TOKENIZER_JSON_NAME, Tokenizer
from megaphase.utils.errors import InputError


class EncodedChat(NamedTuple):
    """A conversation.

    Attributes:
        tokens: int32 [tokens], with the EOD that ends it.
        targets: u8 [tokens], 1 where a token belongs to an answer.
        prompt: what comes before the first answer, from which the hash is computed, in UTF-8.
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
        """Raises InputError if the tokenizer has no tokenizer.json or no chat template."""
        if not (tokenizer.path / TOKENIZER_JSON_NAME).is_file():
            problem = f"has no {TOKENIZER_JSON_NAME}, by which chats are tokenized"
            remedy = "take the directory of a Hugging Face model with a chat template"
            raise InputError(tokenizer.path, problem, remedy)
        return cls(tokenizer, ChatTemplate.load(tokenizer.path))

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer, "template": self.template}

    def encode(self, messages: Sequence[Message]) -> EncodedChat:
        """Return a conversation's tokens.

        Raises ChatError if it has no answer, the template refuses it, its answers cannot be found,
        or a message spells a control token, which it would then become.
        """
        self._check_contents(messages)
        rendered = self.template.render(messages)
        if not rendered.answers:
            raise ChatError("no message is of the role 'assistant'")
        encoded = self._encoder.encode(rendered.text, add_special_tokens=False)
        ids = np.array(encoded.ids, np.int32)
        begins = np.array([begin for begin, _ in encoded.offsets], np.int64)
        sizes = np.array([end - begin for begin, end in encoded.offsets], np.int64)
        edges = np.array(rendered.answers, np.int64).ravel()
        # Inside an answer an odd number of edges has been passed.
        targets = (np.searchsorted(edges, begins, side="right") % 2).astype(np.uint8)
        targets[sizes == 0] = 0
        # Training puts BOS before a document by itself, where the tokenizer has that.
        if self.tokenizer.adds_bos and len(ids) and ids[0] == self.tokenizer.bos:
            ids, targets = ids[1:], targets[1:]
        if not len(ids) or ids[-1] != self.tokenizer.eod:
            ids = np.append(ids, np.int32(self.tokenizer.eod))
            targets = np.append(targets, np.uint8(0))
        first = next(i for i, each in enumerate(messages) if each["role"] == "assistant")
        prompt = [[each["role"], each["content"]] for each in messages[:first]]
        size = sum(len(each["content"].encode()) for each in messages)
        return EncodedChat(ids, targets, json.dumps(prompt, ensure_ascii=False).encode(), size)

    @cached_property
    def _encoder(self) -> Any:  # the library has no types
        from tokenizers import Tokenizer as Encoder

        encoder = Encoder.from_file(str(self.tokenizer.path / TOKENIZER_JSON_NAME))
        encoder.no_truncation()
        encoder.no_padding()
        return encoder

    @cached_property
    def _control_tokens(self) -> tuple[str, ...]:
        added = self._encoder.get_added_tokens_decoder().values()
        return tuple(each.content for each in added if each.special)

    def _check_contents(self, messages: Sequence[Message]) -> None:
        for number, message in enumerate(messages, start=1):
            for token in self._control_tokens:
                if token in message["content"]:
                    raise ChatError(f"message {number} spells the control token {token!r}")
