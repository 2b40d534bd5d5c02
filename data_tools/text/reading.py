"""Conversion of a record of a file to a document."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from string import Formatter
from typing import Any

from megaphase.data_tools.text.file_types import Kind
from megaphase.utils.errors import InputError

ID_KEY = "id"  # the key of a record's own id, if it has one

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
_ESCAPE = re.compile(r"\\([ntr\\])")


@dataclass(frozen=True)
class SourceTarget:
    """A translation pair."""

    source: str
    target: str


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        messages: each with a `role` and a `content`, both strings; one at least.
        where: computes its place for an error message.
    """

    messages: list[dict[str, Any]]
    where: Callable[[], str]


Document = str | SourceTarget | Chat

DEFAULT_KEY = "text"


@dataclass(frozen=True)
class Reading:
    """Defines how a record of a file becomes a document.

    Attributes:
        key: the key of the JSON object, or column of the Parquet row, that holds the text.
        template: joins several keys, as in "{title}\\n\\n{text}", and replaces `key`; {{ and }}
            stand for braces.
        pair: keys of the source and the target; documents are then SourceTargets.
        messages: the key of a conversation's list of messages; documents are then Chats.
        separator: a line of a .txt file that ends a document; None: a blank line does.
        stdin_kind: the format of standard input: jsonl or txt.

    Raises InputError, naming the option, if these contradict each other or the template cannot be
    parsed.
    """

    key: str = DEFAULT_KEY
    template: str | None = None
    pair: tuple[str, str] | None = None
    separator: str | None = None
    stdin_kind: Kind = "jsonl"
    messages: str | None = None

    def __post_init__(self) -> None:
        if self.template is not None and self.pair is not None:
            problem = "cannot be combined with --source-key and --target-key"
            raise InputError("--template", problem, "leave one out")
        if self.messages is not None and (self.template is not None or self.pair is not None):
            problem = "cannot be combined with --template, --source-key and --target-key"
            raise InputError("--messages-key", problem, "leave one out")
        if self.separator == "" or set("\r\n") & set(self.separator or ""):
            problem = "is not a single line" if self.separator else "is empty"
            remedy = "give one line, or leave it out: then a blank line ends a document"
            raise InputError("--separator", problem, remedy)
        if self.template is not None and not self.keys:
            problem = f"{self.template!r} names no key"
            raise InputError("--template", problem, 'write, for example, "{title}\\n\\n{text}"')

    @cached_property
    def template_parts(self) -> list[tuple[str, str | None]]:
        """The template's literal texts, each with the key that follows it, or None at the end."""
        return _parse_template(self.template or "")

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The keys that a record must have, each once."""
        if self.messages is not None:
            names = [self.messages]
        elif self.pair is not None:
            names = list(self.pair)
        elif self.template is not None:
            names = [name for _, name in self.template_parts if name is not None]
        else:
            names = [self.key]
        return tuple(dict.fromkeys(names))

    @property
    def chooses_keys(self) -> bool:
        """Whether a text is under another key than the default one, or several are joined."""
        return self.key != DEFAULT_KEY or self.template is not None

    @property
    def key_option(self) -> str:
        """The option with which a user chooses other keys."""
        if self.messages is not None:
            return "--messages-key"
        if self.pair is not None:
            return "--source-key and --target-key"
        return "--json-key" if self.template is None else "--template"

    def document(self, strings: Mapping[str, str]) -> Document:
        """Return the document of a record, given the strings under all of its `keys`."""
        if self.pair is not None:
            return SourceTarget(strings[self.pair[0]], strings[self.pair[1]])
        if self.template is None:
            return strings[self.key]
        return "".join(
            literal + ("" if name is None else strings[name])
            for literal, name in self.template_parts
        )


def unescape(text: str) -> str:
    """Replace the escapes \\n, \\t, \\r and \\\\ in an option's text."""
    return _ESCAPE.sub(lambda found: _ESCAPES[found[1]], text)


def _parse_template(template: str) -> list[tuple[str, str | None]]:
    remedy = 'write a key as in "{title}\\n\\n{text}", a brace as {{ or }}'
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        problem = f"{template!r} has unbalanced braces ({error})"
        raise InputError("--template", problem, remedy) from None
    for _, name, specification, conversion in parsed:
        if name is not None and (specification or conversion or not name or set("{}") & set(name)):
            raise InputError("--template", f"{template!r} holds more than keys", remedy)
    return [(literal, name) for literal, name, _, _ in parsed]
