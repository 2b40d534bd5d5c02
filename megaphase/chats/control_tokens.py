"""The control tokens of conversations, which only the chat template may write."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from megaphase.chats.template import ASSISTANT, REASONING, ChatError, ChatTemplate, Message
from megaphase.tokenizer import Tokenizer

# Words on which templates decide.
_ROLES = frozenset(
    (
        "system",
        "developer",
        "user",
        ASSISTANT,
        "tool",
        "function",
        "ipython",
        "observation",
        "model",
    )
)
_PROSE = frozenset(("content", *REASONING))
_IDENTIFIER = re.compile(r"[A-Za-z0-9_.-]+")
_TEXT = re.compile(r"\S(?:.*\S)?", re.DOTALL)
_SYMBOL = re.compile(r"[^\w\s]")
_PLACEHOLDER = "x"
_SHORT = (
    [{"role": "user", "content": "a"}, {"role": ASSISTANT, "content": "a"}],
    [{"role": "system", "content": "a"}, {"role": "user", "content": "a"},
     {"role": ASSISTANT, "content": "a"}],
)  # fmt: skip
_MOST_REMEMBERED = 4096


class ControlTokens:
    """Checks that the control tokens of conversations are those that the template writes.

    A conversation is compared with the same one with placeholders for its texts: the template
    must write the same control tokens for both. So none can come from a text, however a key names
    the text, a normalizer changes it, or the template rewrites it or joins it with others.

    Control tokens are those of the tokenizer, and all added tokens with a symbol that the template
    writes around the texts of a short conversation.

    Args:
        encoder: the `tokenizers` library's tokenizer, with the control tokens.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, encoder: Any) -> None:
        self._template, self._encoder = template, encoder
        self.is_control = tokenizer.token_bytes() == 0
        named = template.special_tokens.get("unk_token")
        name = getattr(encoder.model, "unk_token", None) or named
        unknown = None if name is None else encoder.token_to_id(name)
        if unknown is not None and not tokenizer.byte_fallback:
            self.is_control[unknown] = False  # characters outside the vocabulary become it
        self.is_control[list(self._written_around_texts())] = True
        self._remembered: dict[str, list[int]] = {}

    def check(self, messages: Sequence[Message], ids: np.ndarray, *, prompt: bool = False) -> None:
        """Raise ChatError unless the control tokens among a conversation's tokens, int [tokens],
        are the template's own.

        prompt: whether the tokens end with the template's prompt for an answer.
        """
        found = self._of(ids)
        try:
            expected = self._expected(messages, prompt)
        except RecursionError:
            raise ChatError("its messages are nested too deeply") from None
        if found == expected:
            return
        for number, message in enumerate(messages, start=1):
            for text in _texts(message):
                if spelled := self._of(self._ids(text)):
                    token = self._encoder.id_to_token(spelled[0])
                    raise ChatError(f"message {number} spells the control token {token!r}")
        tokens = " ".join(map(self._encoder.id_to_token, found[:20]))
        problem = "the chat template writes other control tokens than for other texts"
        raise ChatError(f"{problem} in these roles ({tokens})")

    def _of(self, ids: np.ndarray) -> list[int]:
        found: list[int] = ids[self.is_control[ids]].tolist()
        return found

    def _ids(self, text: str) -> np.ndarray:
        try:
            return np.array(self._encoder.encode(text, add_special_tokens=False).ids, np.int32)
        except (TypeError, UnicodeEncodeError):  # a lone surrogate
            return np.empty(0, np.int32)

    def _expected(self, messages: Sequence[Message], prompt: bool) -> list[int]:
        """Return the control tokens that the template writes for such messages."""
        with_placeholders = self._with_placeholders(messages, self._known_roles)
        plain = json.dumps(with_placeholders)
        key = f"{plain}{prompt}"
        if key not in self._remembered:
            if len(self._remembered) >= _MOST_REMEMBERED:
                self._remembered.clear()
            self._remembered[key] = self._of(self._ids(self._plain_text(messages, plain, prompt)))
        return self._remembered[key]

    def _plain_text(self, messages: Sequence[Message], with_placeholders: str, prompt: bool) -> str:
        try:
            return self._template.render_text(json.loads(with_placeholders), prompt=prompt)
        except ChatError:
            pass
        try:
            # A role that the template knows, and does not name.
            plain = self._with_placeholders(messages, None)
            return self._template.render_text(plain, prompt=prompt)
        except ChatError as error:
            problem = "whether its control tokens are the template's cannot be told: with other"
            raise ChatError(f"{problem} texts {error}") from None

    def _with_placeholders(
        self, messages: Sequence[Message], roles: frozenset[str] | None
    ) -> list[dict[str, Any]]:
        """Return messages with placeholders for their texts, and for roles that are not among
        `roles` (None: all are kept)."""
        plain = []
        for message in messages:
            copy = {
                _key(key, number): self._plain(value, is_prose=key in _PROSE or key == "name")
                for number, (key, value) in enumerate(message.items())
            }
            known = roles is None or message["role"] in roles
            plain.append({**copy, "role": message["role"] if known else _PLACEHOLDER})
        return plain

    def _plain(self, value: Any, *, is_prose: bool = False) -> Any:
        if isinstance(value, str):
            if not is_prose and _IDENTIFIER.fullmatch(value):
                return value
            # A template may look for what it expects in a text, such as </think>.
            parts = self._searched.split(value) if self._searched else [value]
            if len(parts) == 1:
                return _PLACEHOLDER if value.strip() else value
            return "".join(
                part if number % 2 else _TEXT.sub(_PLACEHOLDER, part)
                for number, part in enumerate(parts)
            )
        if isinstance(value, Mapping):
            items = enumerate(value.items())
            return {_key(key, number): self._plain(each) for number, (key, each) in items}
        if isinstance(value, Sequence) and not isinstance(value, bytes):
            return [self._plain(each) for each in value]
        return value if value is None or isinstance(value, (bool, int, float)) else _PLACEHOLDER

    @cached_property
    def _known_roles(self) -> frozenset[str]:
        return _ROLES | self._template.compiled.constants

    @cached_property
    def _searched(self) -> re.Pattern[str] | None:
        """Matches the constants that the template looks for in texts, without control tokens."""
        texts = {each.strip() for each in self._template.compiled.searched}
        kept = [
            re.escape(each)
            for each in sorted(texts, key=lambda text: (-len(text), text))
            if len(each) > 1 and _SYMBOL.search(each) and not self._of(self._ids(each))
        ]
        return re.compile(f"({'|'.join(kept)})") if kept else None

    def _written_around_texts(self) -> Iterator[int]:
        added = {
            token: each.content
            for token, each in self._encoder.get_added_tokens_decoder().items()
            if _SYMBOL.search(each.content)
        }
        for messages in _SHORT:
            try:
                rendered = self._template.render(messages)
            except ChatError:
                continue
            encoded = self._encoder.encode(rendered.text, add_special_tokens=False)
            for token, (begin, end) in zip(encoded.ids, encoded.offsets, strict=True):
                inside = any(first <= begin and end <= last for first, last in rendered.answers)
                ends = any(not rendered.text[end:last].strip() for _, last in rendered.answers)
                if token in added and (not inside or ends):
                    yield token


def _key(key: Any, number: int) -> str:
    is_plain = isinstance(key, str) and _IDENTIFIER.fullmatch(key)
    return key if is_plain else f"{_PLACEHOLDER}{number}"


def _texts(value: Any) -> Iterator[str]:
    """Yield all strings of a message."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _texts(key)
            yield from _texts(each)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for each in value:
            yield from _texts(each)
