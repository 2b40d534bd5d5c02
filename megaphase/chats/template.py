"""A tokenizer's chat template, rendered as transformers does, with the places of the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from pathlib import Path
from typing import Any

import jinja2

from megaphase.chats.environment import CompiledTemplate
from megaphase.chats.template_files import has_template, read_special_tokens, read_template
from megaphase.utils.errors import InputError
from megaphase.utils.files import hash_json

ASSISTANT = "assistant"
# The names of a message's reasoning; a template finds it under the first two of them.
REASONING = ("reasoning_content", "thinking", "reasoning")
_MOST_OF_REASON = 200  # characters

Message = Mapping[str, Any]


class ChatError(ValueError):
    """A conversation that the template cannot render, or of which the answers cannot be found."""


@dataclass(frozen=True)
class RenderedChat:
    """The text of a conversation.

    Attributes:
        answers: [begin, end) of the assistant's answers, in characters, ascending.
        is_marked: whether the template's own {% generation %} blocks are the answers.
    """

    text: str
    answers: list[tuple[int, int]]
    is_marked: bool


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and the special tokens that it names.

    Attributes:
        source: the file that it comes from.
    """

    text: str
    special_tokens: Mapping[str, str]
    source: Path

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate:
        """Read the template of a tokenizer's directory: chat_template.jinja, or the key of
        tokenizer_config.json (of several named ones the one named `default`).

        Raises InputError if there is none, or it cannot be parsed.
        """
        source, text = read_template(folder)
        template = cls(text, read_special_tokens(folder), source)
        try:
            _ = template.compiled
        except Exception as error:  # jinja2 does not say which
            problem = f"the chat template cannot be parsed ({_reason(error)})"
            raise InputError(source, problem, "put back the model's own") from None
        return template

    @classmethod
    def find(cls, folder: Path) -> ChatTemplate | None:
        """Like `load`, but return None if there is no template."""
        return cls.load(folder) if has_template(folder) else None

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.pop("compiled", None)
        return state

    @property
    def fingerprint(self) -> str:
        """A digest that changes with what the template makes of messages."""
        return hash_json({"template": self.text, "special_tokens": dict(self.special_tokens)})

    @cached_property
    def compiled(self) -> CompiledTemplate:
        return CompiledTemplate(self.text)

    def render(self, messages: Sequence[Message]) -> RenderedChat:
        """Return the text of a conversation and where the assistant speaks in it.

        Where the template has {% generation %} blocks, those are the answers. Otherwise an answer
        is what the template adds for an assistant's message to the conversation before it with the
        prompt for an answer; so it holds the token that ends the turn, and white space after that.

        Raises ChatError if the template refuses the messages, or the answers cannot be found: it
        rewrites earlier turns, or its prompt for an answer is not what it puts before one.
        """
        text, blocks = self._rendered(messages)
        if self.compiled.marks_answers:
            return RenderedChat(text, blocks, True)
        numbers = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
        return RenderedChat(text, [self._answer(text, messages, i) for i in numbers], False)

    def render_text(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """Return the text of a conversation, with the prompt for an answer or without.

        Raises ChatError if the template refuses the messages.
        """
        return self._rendered(messages, prompt=prompt)[0]

    def _answer(self, text: str, messages: Sequence[Message], number: int) -> tuple[int, int]:
        """Return [begin, end) of the answer with this number, from 0, in the whole text."""
        before, after = messages[:number], self.render_text(messages[: number + 1])
        try:
            prompt, bare = self.render_text(before, prompt=True), self.render_text(before)
        except ChatError:
            if number:
                raise
            problem = "it begins with the assistant, and the template has no prompt for that"
            raise ChatError(f"{problem}{_NOT_FOUND}") from None
        if after == bare:
            return len(after), len(after)  # the template leaves it out
        if not text.startswith(after.rstrip()) or not after.startswith((prompt, bare)):
            problem = f"the template renders message {number + 1} otherwise when others follow"
            raise ChatError(f"{problem}{_NOT_FOUND}")
        if not after.startswith(prompt):
            problem = f"the template's prompt for an answer is {prompt.removeprefix(bare)!r}"
            raise ChatError(f"{problem}; message {number + 1} does not begin with it{_NOT_FOUND}")
        if prompt == bare and (header := self._header(before, bare)).strip():
            problem = f"the template writes {header!r} before an answer, and not as its prompt"
            raise ChatError(f"{problem} (add_generation_prompt){_NOT_FOUND}")
        return len(prompt), len(after if text.startswith(after) else after.rstrip())

    def _header(self, before: Sequence[Message], bare: str) -> str:
        """Return what the template writes before the text of an answer."""
        texts = [
            self.render_text([*before, {"role": ASSISTANT, "content": content}])
            for content in ("a", "b")
        ]
        if texts[0] == texts[1]:
            return ""
        return commonprefix(texts).removeprefix(bare)  # noqa: RUF071 - texts, not paths

    def _rendered(
        self, messages: Sequence[Message], *, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        values: dict[str, Any] = {**self.special_tokens, "messages": list(map(_prepared, messages))}
        values |= {"add_generation_prompt": prompt, "tools": None, "documents": None}
        try:
            text, blocks = self.compiled.render(**values)
        except Exception as error:  # a template can raise whatever Python does
            raise ChatError(f"the chat template refuses it ({_reason(error)})") from None
        try:
            text.encode()
        except UnicodeEncodeError as error:
            surrogate = f"\\u{ord(text[error.start]):04x}"
            raise ChatError(f"its text holds a lone surrogate, {surrogate}") from None
        return text, blocks


_NOT_FOUND = (
    ", so the answers cannot be found; {% generation %} blocks in the template would mark them"
)


def _prepared(message: Message) -> dict[str, Any]:
    """Return a message as transformers passes it to a template: without keys that are null, and
    with its reasoning under both of the names that templates read."""
    given = {key: value for key, value in message.items() if value is not None}
    reasoning = next((given[key] for key in REASONING if key in given), None)
    if reasoning is None:
        return given
    return {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _reason(error: Exception) -> str:
    known = isinstance(error, (jinja2.TemplateError, TypeError, KeyError)) and str(error)
    reason = " ".join((str(error) if known else f"{type(error).__name__}: {error}").split())
    reason = reason.encode(errors="backslashreplace").decode()
    return reason if len(reason) <= _MOST_OF_REASON else f"{reason[:_MOST_OF_REASON]}…"
