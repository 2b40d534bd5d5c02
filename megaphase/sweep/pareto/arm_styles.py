"""The colour and marker of every arm, the same in all reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import sha256
from itertools import product

from megaphase.utils.plot_style import LINE_COLOURS

ArmStyle = tuple[str, str]  # colour and marker
ArmStyles = Mapping[str, ArmStyle]
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "h", "<", ">", "*")

LIKE_STATIC = 5  # a second blue, which arms have only if no other colour is free

# Arms that examples and documentation use: indices of colour and marker.
_KNOWN = {
    "static": (0, 0),
    "two-phase": (1, 1),
    "restart": (2, 2),
    "keep": (3, 3),
    "low-only": (4, 4),
    "regularized": (7, 5),
    "temperature": (6, 8),
    "unimax": (9, 11),
    "cooldown": (11, 9),
    "cascade": (10, 10),
    "dropout": (15, 5),
    "weight-decay": (12, 6),
    "early-stopping": (16, 7),
    "wsd": (17, 3),
    "uniform-natural-uniform": (14, 4),
    "two-phase-average": (8, 2),
    "high-only": (13, 0),
}


def style_of_arms(arms: Iterable[str]) -> dict[str, ArmStyle]:
    """Return the style of every arm, in their order; it depends on their names alone.

    A known arm always has the same style. Any other one has a colour that follows from its name,
    the next free one if another arm of this sweep has it. So no two arms share a colour unless
    there are more arms than colours, and then they differ in the marker.
    """
    names = list(arms)
    known = {name: _KNOWN[name] for name in names if name in _KNOWN}
    found, taken = dict(known), set(known.values())
    for name in sorted(set(names) - known.keys()):
        found[name] = _free(name, taken)
        taken.add(found[name])
    return {name: (LINE_COLOURS[found[name][0]], MARKERS[found[name][1]]) for name in names}


def _free(name: str, taken: set[tuple[int, int]]) -> tuple[int, int]:
    """Return the first free pair of colour and marker in the order that follows from a name.

    Colours that no arm has come first, and among them those that no known arm ever has.
    """
    start = int.from_bytes(sha256(name.encode()).digest()[:4], "big")
    colours, reserved = len(LINE_COLOURS), {colour for colour, _ in _KNOWN.values()}
    uses = [sum(colour == used for used, _ in taken) for colour in range(colours)]
    order = sorted(
        product(range(colours), range(len(MARKERS))),
        key=lambda pair: (
            pair in taken,
            uses[pair[0]],
            pair[0] == LIKE_STATIC,
            pair[0] in reserved,
            (pair[0] - start) % colours,
            (pair[1] - start // colours) % len(MARKERS),
        ),
    )
    return order[0]
