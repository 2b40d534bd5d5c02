"""Format the content of a checkpoint as a table or as JSON."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table

from megaphase.checkpoint.tensor_file import TensorKind
from megaphase.convert.inspect import Contents

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # of a block, in a tensor's name


def inspection_as_json(contents: Contents) -> dict[str, Any]:
    """Return everything as JSON; tensors by name with `dtype` and `shape`."""
    return {
        "format": contents.format,
        **contents.facts,
        "parameters": contents.parameters,
        "bytes": contents.nbytes,
        "verified": contents.verified,
        "tensors": {
            name: {"dtype": type_name(kind), "shape": list(kind.shape)}
            for name, kind in contents.tensors.items()
        },
    }


def inspection_table(contents: Contents) -> RenderableType:
    """Return a table of facts and tensors; tensors that are alike in all blocks share a line."""
    facts = Table.grid(padding=(0, 2))
    facts.add_row("format", contents.format)
    for name, value in contents.facts.items():
        facts.add_row(name, _shown(value))
    if contents.tensors:
        facts.add_row("parameters", f"{contents.parameters:,}")
    facts.add_row("on the disk", decimal(contents.nbytes))
    facts.add_row("verified", contents.verified or "nothing: no hashes, or not asked for")
    if not contents.tensors:
        return facts
    return Group(facts, "", _tensor_table(contents.tensors))


def type_name(kind: TensorKind) -> str:
    """Return a dtype's name as in a run file, bf16, fp16 or fp32; torch's name for others."""
    name = str(kind.dtype).removeprefix("torch.")
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(name, name)


def _tensor_table(tensors: Mapping[str, TensorKind]) -> Table:
    alike: dict[tuple[str, TensorKind], list[str]] = defaultdict(list)
    for name, kind in tensors.items():
        alike[_NUMBER.sub("*", name, count=1), kind].append(name)
    table = Table()
    table.add_column("tensor", overflow="fold")
    table.add_column("shape")
    table.add_column("type")
    for (pattern, kind), names in alike.items():
        shape = " × ".join(f"{size:,}" for size in kind.shape)
        table.add_row(_joint_name(pattern, names), shape, type_name(kind))
    return table


def _joint_name(pattern: str, names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    numbers = sorted(int(match[0]) for name in names if (match := _NUMBER.search(name)))
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return pattern.replace("*", f"{numbers[0]}…{numbers[-1]}", 1)
    return pattern.replace("*", ",".join(map(str, numbers)), 1)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(each)}" for key, each in value.items())
    if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        return "\n".join(map(_shown, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
