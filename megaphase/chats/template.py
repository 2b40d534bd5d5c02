"""A tokenizer's chat template, rendered as transformers does, with the places of the answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megaphase.utils.errors import InputError

TEMPLATE_NAME, CONFIG_NAME = "chat_template.jinja", "tokenizer_config.json"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
_ASSISTANT = "assistant"
# Noncharacters, which no text holds: they mark the text of a {% generation %} block.
_BEGIN, _END = "\ufdd0", "\ufdd1"

Message = Mapping[str, Any]


class ChatError(ValueError):
    """A conversation that the template cannot render, or of which the answers cannot be found."""


@dataclass(frozen=True)
class RenderedChat:
    """The text of a conversation.

    Attributes:
        answers: [begin, end) of the assistant's answers, in characters, ascending.
    """

    text: str
    answers: list[tuple[int, int]]


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
        config = _config(folder)
        path, text = folder / TEMPLATE_NAME, config.get("chat_template")
        if path.is_file():
            text = path.read_text()
        else:
            path = folder / CONFIG_NAME
        if isinstance(text, list):
            text = {each.get("name"): each.get("template") for each in text}.get("default")
        if not isinstance(text, str):
            remedy = f"put the model's {TEMPLATE_NAME} there"
            raise InputError(folder, "the tokenizer has no chat template", remedy)
        tokens = {name: _token(config[name]) for name in _SPECIAL_TOKENS if config.get(name)}
        template = cls(text, tokens, path)
        try:
            _ = template._compiled
        except jinja2.TemplateError as error:
            problem = f"the chat template cannot be parsed ({error})"
            raise InputError(path, problem, "put back the model's own") from None
        return template

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.pop("_compiled", None)
        return state

    def render(self, messages: Sequence[Message]) -> RenderedChat:
        """Return the text of a conversation and where the assistant speaks in it.

        Where the template has {% generation %} blocks, those are the answers. Otherwise an answer
        is what the template adds for an assistant's message to the conversation before it with the
        prompt for an answer; so it holds the token that ends the turn.

        Raises ChatError if the template refuses the messages, or rewrites earlier turns, so that
        the answers cannot be found.
        """
        marked = self._text(messages)
        if _BEGIN in marked:
            return _without_marks(marked)
        answers = []
        for number, message in enumerate(messages):
            if message["role"] != _ASSISTANT:
                continue
            prompt = self._text(messages[:number], prompt=True) if number else ""
            after = self._text(messages[: number + 1])
            if not after.startswith(prompt):
                prompt = self._text(messages[:number])
            if not (after.startswith(prompt) and marked.startswith(after.rstrip())):
                problem = f"the template renders message {number + 1} otherwise when others follow"
                raise ChatError(f"{problem}, so the answers cannot be found")
            answers.append((len(prompt), len(after.rstrip())))
        return RenderedChat(marked, answers)

    @cached_property
    def _compiled(self) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        return environment.from_string(self.text)

    def _text(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        try:
            return self._compiled.render(
                messages=list(messages),
                add_generation_prompt=prompt,
                tools=None,
                documents=None,
                **self.special_tokens,
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise ChatError(f"the chat template refuses it ({error})") from None


class _Generation(Extension):
    """The block {% generation %} … {% endgeneration %}, which marks an answer."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{_BEGIN}{caller()}{_END}"


def _without_marks(marked: str) -> RenderedChat:
    text, answers = "", []
    for number, part in enumerate(marked.replace(_END, _BEGIN).split(_BEGIN)):
        if number % 2:  # every second part is the text of a block
            answers.append((len(text), len(text) + len(part)))
        text += part
    return RenderedChat(text, answers)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(path, f"is not valid JSON ({error})", "put back the model's own") from None
    return config if isinstance(config, dict) else {}


def _token(value: Any) -> str:
    return str(value.get("content", "") if isinstance(value, dict) else value)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # jinja2's own escapes characters of HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> str:
    raise jinja2.TemplateError(message)
