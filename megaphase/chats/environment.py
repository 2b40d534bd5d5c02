"""The jinja environment of chat templates, as transformers defines it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Their output is collected before it is written, so that a block inside has no place in the text.
_COLLECTED = (nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock)


class CompiledTemplate:
    """A chat template that can be rendered.

    Raises an exception, of jinja2 or any other kind, if the text is not a template, or jinja2's
    TemplateError if it has a {% generation %} block of which the place cannot be told.

    Attributes:
        marks_answers: whether it has {% generation %} blocks.
        searched: the constants that it compares texts with, or passes to functions and filters.
        constants: all of its string constants.
    """

    def __init__(self, text: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        # The same messages must always give the same text.
        del environment.filters["random"], environment.globals["lipsum"]
        parsed = environment.parse(text)
        _check_places(parsed)
        self.marks_answers = any(map(_is_generation, parsed.find_all(nodes.CallBlock)))
        self.searched = frozenset(_searched(parsed))
        self.constants = frozenset(_strings(parsed.find_all(nodes.Const)))
        self._template = environment.from_string(parsed)
        self._generation: _Generation = environment.extensions[_Generation.identifier]  # type: ignore[assignment]

    def render(self, **values: Any) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and [begin, end) of each {% generation %} block in it, in characters."""
        parts, generation = [], self._generation
        generation.written, generation.blocks = 0, []
        for part in self._template.generate(**values):
            parts.append(part)
            generation.written += len(part)
        return "".join(parts), generation.blocks


class _Generation(Extension):
    """The block {% generation %} … {% endgeneration %}, which marks an answer."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it
    written = 0  # characters of the text so far

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.blocks: list[tuple[int, int]] = []

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_noted")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _noted(self, caller: Any) -> str:
        text: str = caller()
        self.blocks.append((self.written, self.written + len(text)))
        return text


def _is_generation(block: nodes.CallBlock) -> bool:
    called = block.call.node
    return isinstance(called, nodes.ExtensionAttribute) and (
        called.identifier == _Generation.identifier
    )


def _check_places(node: nodes.Node, collected: bool = False) -> None:
    for child in node.iter_child_nodes():
        if collected and isinstance(child, nodes.CallBlock) and _is_generation(child):
            problem = (
                f"the {{% generation %}} block in line {child.lineno} is inside a macro, a call, "
                "filter or set block, a recursive loop or another such block"
            )
            raise jinja2.TemplateError(f"{problem}, where transformers loses its place")
        is_collected = isinstance(child, _COLLECTED) or (
            isinstance(child, nodes.For) and child.recursive
        )
        _check_places(child, collected or is_collected)


def _searched(parsed: nodes.Template) -> Iterator[str]:
    for compared in parsed.find_all(nodes.Compare):
        yield from _strings([compared.expr, *(operand.expr for operand in compared.ops)])
    for called in parsed.find_all((nodes.Call, nodes.Filter, nodes.Test)):
        yield from _strings(called.args)  # type: ignore[attr-defined]


def _strings(found: Any) -> Iterator[str]:
    return (
        node.value
        for node in found
        if isinstance(node, nodes.Const) and isinstance(node.value, str)
    )


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # jinja2's own escapes characters of HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> str:
    raise jinja2.TemplateError(message)
