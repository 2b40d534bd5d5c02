"""The target of a recommendation: `{hi: min, high: within 0.02}`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megaphase.utils.errors import InputError
from megaphase.utils.names import shown
from megaphase.utils.validation_errors import hint
from megaphase.utils.yaml_file import parse_scalar

WHERE = "--target"
WITHIN = re.compile(r"within +([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?: +of +(best|static))?")
REMEDY = "write min, within X, or within X of static, with X in nats"
Reference = Literal["best", "static"]


@dataclass(frozen=True)
class Limit:
    """At most this many nats above a reference: the lowest predicted loss of all candidates, or of
    the static ones."""

    nats: float
    of: Reference

    def __str__(self) -> str:
        return f"within {self.nats:g} of {self.of}"


@dataclass(frozen=True)
class Target:
    """What the losses shall be.

    Attributes:
        minimized: names of tasks or groups, whose mean loss shall be as low as possible.
        limits: of other tasks or groups.
        members: the tasks of every name.
    """

    minimized: Sequence[str]
    limits: Mapping[str, Limit]
    members: Mapping[str, Sequence[str]]

    def __str__(self) -> str:
        parts = [f"{name}: min" for name in self.minimized]
        parts += [f"{name}: {limit}" for name, limit in self.limits.items()]
        return "{" + ", ".join(parts) + "}"


def parse_target(text: str, high: Sequence[str], low: Sequence[str]) -> Target:
    """Read a target.

    high, low: the tasks of the sweep's groups, which may be named by `high` and `low`.

    Raises:
        InputError: names the key and the remedy.
    """
    data = parse_scalar(text)
    if not isinstance(data, dict) or not data:
        raise InputError(
            WHERE,
            f"{shown(text)} is not a mapping of tasks",
            "write it as '{hi: min, high: within 0.02}'",
        )
    members: dict[str, Sequence[str]] = {"high": high, "low": low}
    members |= {task: [task] for task in (*high, *low)}
    minimized: list[str] = []
    limits: dict[str, Limit] = {}
    for name, value in data.items():
        if name not in members:
            raise InputError(
                f"{WHERE}: {name}", "no such task or group", hint(name, members, "there are")
            )
        if value == "min":
            minimized.append(name)
        else:
            limits[name] = _limit(f"{WHERE}: {name}", value)
    if not minimized:
        raise InputError(WHERE, "no task is to have the lowest loss", "give one of them min")
    return Target(minimized, limits, {name: members[name] for name in (*minimized, *limits)})


def _limit(where: str, value: object) -> Limit:
    found = WITHIN.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        raise InputError(where, f"{shown(value)} is no target", REMEDY)
    nats = float(found[1])
    if not math.isfinite(nats):
        raise InputError(where, f"{shown(value)} is not finite", REMEDY)
    of: Reference = "static" if found[2] == "static" else "best"
    return Limit(nats, of)
