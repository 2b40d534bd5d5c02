"""Writes docs/run-file.md from the config classes and their fields' docstrings: `make docs`."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

from megaphase.config.fields import Section
from megaphase.config.run import RunConfig

PAGE = Path(__file__).with_name("run-file.md")
INTRODUCTION = """\
<!-- Made by generate_run_file.py from the docstrings of the config classes; do not edit. -->

# The run file

A run file is YAML 1.2 (so the task `no` stays Norwegian, and `200e9` and `3e-4` are numbers). A key
that is not listed here is refused, with the nearest right name. `KEY.PATH=VALUE` on the command
line replaces a value, for example `phases.1.mixture.temperature=2`.

- **Paths**, also those in `KEY.PATH=VALUE`, are relative to the run file; `~` and `~name` at their
  beginning are home folders.
- **Types are strict**: `true` is no number, `1` is not `true`, and text in quotes is neither.
  Integers may be written as `200e9`.
- **Decimal numbers mean what is written**: `epochs: {hi: 2.32}` of 50 samples are 116 samples,
  whatever binary number is nearest to 2.32.
- **Names** of tasks and phases, after which files are named, are made of letters of any script,
  digits, `_`, `.` and `-`; they begin with neither `.` nor `-`, and have at most 100 bytes in
  UTF-8. A phase must not have the name of a checkpoint (`latest`, `best-…`, `step-…`). A key's path
  finds names that hold a `.`, too.

In the tables, *required* means that the key has no default, and — that it is left out by default.
A section without *required* may be left out: its keys then have their own defaults.
"""
TABLE_HEAD = "| key | value | default | meaning |\n| --- | --- | --- | --- |\n"
FORMATS = {"path": "path", "url": "URL", "role-or-tasks": "a role, or a list of tasks"}
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def page() -> str:
    """The content of docs/run-file.md."""
    return "\n".join([INTRODUCTION, *(_chapter(*each) for each in sections())])


def sections(
    model: type[Section] = RunConfig, path: str = ""
) -> Iterator[tuple[str, type[Section]]]:
    """Key path and class of every section of the run file, in the order of its keys."""
    yield path, model
    for name, field in model.model_fields.items():
        key = field.alias or name
        for below in _section_classes(field.annotation):
            yield from sections(below, _path(path, key, model))


def _path(path: str, key: str, model: type[Section]) -> str:
    schema = _schema(model)[key]
    types = {each.get("type") for each in (schema, *schema.get("anyOf", ()))}
    suffix = ".NAME" if "object" in types else "[N]" if "array" in types else ""
    return f"{path}.{key}{suffix}" if path else f"{key}{suffix}"


def _section_classes(annotation: Any) -> list[type[Section]]:
    if inspect.isclass(annotation) and issubclass(annotation, Section):
        return [annotation]
    return [found for each in get_args(annotation) for found in _section_classes(each)]


def _schema(model: type[Section]) -> dict[str, dict[str, Any]]:
    """The JSON schemas of a section's keys."""
    properties: dict[str, dict[str, Any]] = model.model_json_schema()["properties"]
    return properties


def _chapter(path: str, model: type[Section]) -> str:
    above, _, below = inspect.cleandoc(model.__doc__ or "").partition("\n\n")
    meanings = _docstrings(model)
    rows = [_row(path, model, name, meanings[name]) for name in model.model_fields]
    parts = [f"## {_title(path)}{_chosen_by(model)}", above, TABLE_HEAD + "\n".join(rows), below]
    return "\n\n".join(filter(None, parts)) + "\n"


def _docstrings(model: type[Section]) -> dict[str, str]:
    """The text below every field of a class and of those that it inherits from.

    pydantic's use_attribute_docstrings finds it, too, but at every start of every command.
    """
    return {
        ast.unparse(field.target): ast.literal_eval(below.value)
        for each in reversed(model.__mro__)
        if issubclass(each, Section)
        for field, below in pairwise(_body(each))
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr)
    }


def _body(model: type[Section]) -> list[ast.stmt]:
    [definition] = ast.parse(inspect.getsource(model)).body
    assert isinstance(definition, ast.ClassDef)
    return definition.body


def _title(path: str) -> str:
    return f"`{path}`" if path else "Top level"


def _chosen_by(model: type[Section]) -> str:
    """For a title: the key whose value chooses this section, where it must be written."""
    field = model.model_fields.get("name")
    words = get_args(field.annotation) if field is not None and field.is_required() else ()
    return f" with `name: {words[0]}`" if words else ""


def _row(path: str, model: type[Section], name: str, meaning: str) -> str:
    field = model.model_fields[name]
    key = field.alias or name
    below = _section_classes(field.annotation)
    value = _words(_schema(model)[key])
    if below:
        value = f"[{value}](#{_anchor(_path(path, key, model))})"
    default = "*required*" if field.is_required() else _default(field.default)
    return f"| `{key}` | {value} | {default} | {' '.join(meaning.split()).removesuffix('.')} |"


def _anchor(path: str) -> str:
    """As GitHub makes it from a heading."""
    return re.sub(r"[^\w-]", "", path.lower())


def _default(value: Any) -> str:
    if isinstance(value, Section):
        return ""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{list(value)}`"
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    return f"`{shown.replace('e-0', 'e-')}`"


def _words(schema: dict[str, Any]) -> str:
    """The values that a JSON schema allows."""
    if "anyOf" in schema or "oneOf" in schema:
        alternatives = schema.get("anyOf") or schema["oneOf"]
        words = [_words(each) for each in alternatives if each != {"type": "null"}]
        return " or ".join(dict.fromkeys(words))
    if "$ref" in schema:
        return "mapping"
    if "format" in schema:
        return FORMATS[schema["format"]]
    if "enum" in schema or "const" in schema:
        return _one_of(schema.get("enum", [schema.get("const")]))
    match schema["type"]:
        case "boolean":
            return _one_of([True, False])
        case "string":
            return "text"
        case "object":
            each = schema["additionalProperties"]
            return "mapping by name" if "$ref" in each else f"mapping of tasks to {_plural(each)}"
        case "array" if "prefixItems" in schema:
            return f"list of {len(schema['prefixItems'])} {_plural(schema['prefixItems'][0])}"
        case "array":
            return f"list of {_plural(schema['items'])}"
        case "integer" | "number":
            return f"{schema['type']} {_range(schema)}"
    raise ValueError(f"no words for {schema}")


def _plural(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return _words(schema)
    if "oneOf" in schema:
        return " or ".join(_plural(each) for each in schema["oneOf"])
    noun, _, rest = _words(schema).partition(" ")
    return f"{noun}s {rest}".rstrip()


def _one_of(values: list[Any]) -> str:
    shown = [f"`{str(v).lower() if isinstance(v, bool) else v}`" for v in values]
    return ", ".join(shown[:-1]) + (" or " if shown[:-1] else "") + shown[-1]


def _range(schema: dict[str, Any]) -> str:
    """The bounds of a number; pydantic writes some of them by its own names."""
    low, high = schema.get("minimum", schema.get("ge")), schema.get("maximum", schema.get("le"))
    above = schema.get("exclusiveMinimum", schema.get("gt"))
    if above is not None and schema["type"] == "integer":
        low, above = max(above + 1, low or 0), None
    below = schema.get("exclusiveMaximum", schema.get("lt"))
    if low is not None and high is not None:
        return f"from {_number(low)} to {_number(high)}"
    if low is None:
        assert above is not None, "every number of a run file has a lower bound"
        lower = f"above {_number(above)}"
    else:
        lower = f"from {_number(low)}"
    if high is not None:
        return f"{lower}, at most {_number(high)}"
    return f"{lower}, below {_number(below)}" if below is not None else f"{lower} on"


def _number(value: float) -> str:
    """1e-30 as 10⁻³⁰, 65536 as 65,536."""
    if value == 2**63 - 1:
        return "2⁶³ − 1"
    mantissa, _, exponent = f"{value:e}".partition("e")
    if float(mantissa) == 1 and not 1e-3 <= value < 1e6:
        return "10" + str(int(exponent)).translate(SUPERSCRIPTS)
    return f"{value:,.10g}" if isinstance(value, float) else f"{value:,}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
