"""The common style of all figures: sizes, colours, axes, labels at line ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# The first eight are Okabe and Ito's colour-blind-safe hues; the pale ones are darkened until
# labels in them are readable on white. The others are chosen far from these and from each other.
# The page replaces each by a CSS variable, so that a dark theme can brighten them.
LINE_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#00825f",
    "#a8488a",
    "#a87800",
    "#2f8fc4",
    "#5a4fa2",
    "#6e6259",
    "#8b1a1a",
    "#4d6b00",
    "#d81b60",
    "#00606b",
    "#7b3f00",
    "#1f2f7a",
    "#9b6fd6",
    "#c96a6a",
    "#5f9a14",
    "#c94fb0",
    "#3c3f45",
    "#0a9aa0",
)
INK = "#20242b"
MUTED = "#5f6874"
GRID = "#e3e5e8"
PAPER = "#ffffff"

STYLE = {
    "font.family": "sans-serif",
    "font.size": 10.0,
    "legend.fontsize": 9.5,
    "axes.titlesize": 10.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "savefig.facecolor": "auto",
}

DASHED = (0, (3, 2))
DOTTED = (0, (1, 1.5))
LABEL_GAP_POINTS = 13.0
CHARACTER_INCHES = 0.094  # of a bold label, at the widest
NAME_LIMIT = 18
SETTING_LIMIT = 44  # characters of a setting's name, which includes its arm, mixture and peaks


@dataclass(frozen=True)
class Size:
    """A figure's size in inches; the narrow one fits a phone."""

    width: float
    height: float
    narrow: bool


WIDE = Size(9.4, 4.2, narrow=False)
NARROW = Size(4.0, 3.7, narrow=True)


@contextmanager
def plot_style() -> Iterator[None]:
    """Apply the style only within the block (it is also needed while a figure is saved)."""
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of this size in inches, outside pyplot's global state."""
    return Figure(figsize=(width, height), facecolor=PAPER)


def inch_axes(figure: Figure, left: float, bottom: float, right: float, top: float) -> Axes:
    """Return axes at these distances in inches from the figure's left and lower edge."""
    width, height = figure.get_size_inches()
    box = (left / width, bottom / height, (right - left) / width, (top - bottom) / height)
    axes = figure.add_axes(box)
    axes.patch.set_visible(False)
    # Not of 2.5: numbers with a digit more would push the axis's title out of the figure.
    axes.yaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10]))
    return axes


def plot_label(name: str, limit: int = NAME_LIMIT) -> str:
    """Return a task's or run's name for a figure: shortened, and never parsed as mathematics."""
    short = name if len(name) <= limit else name[: limit - 1] + "…"
    return short.replace("$", r"\$")


def label_width(names: Iterable[str]) -> float:
    """Return the inches that the longest of these names needs next to the axes."""
    return 0.15 + CHARACTER_INCHES * max((len(plot_label(name)) for name in names), default=0)


def line_colours(names: Iterable[str]) -> dict[str, str]:
    """Return a colour for each name; call it once per report, so that all figures share it."""
    return {n: LINE_COLOURS[i % len(LINE_COLOURS)] for i, n in enumerate(dict.fromkeys(names))}


def label_line_ends(axes: Axes, ends: Sequence[tuple[str, float, str]]) -> None:
    """Write (name, y, colour) at the right edge, moved apart only as far as they would overlap.

    The limits of the y axis must be final.
    """
    figure_height = axes.get_figure(root=True).get_size_inches()[1]  # type: ignore[union-attr]
    height = axes.get_position().height * figure_height * 72
    low, high = axes.get_ylim()
    ends = sorted(ends, key=lambda end: end[1])
    wanted = [(y - low) / (high - low) * height for _, y, _ in ends]
    for (name, _, colour), position in zip(ends, spread(wanted, height), strict=True):
        axes.annotate(
            plot_label(name),
            (1.0, position / height),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
            annotation_clip=False,
        )


def spread(wanted: Sequence[float], height: float) -> list[float]:
    """Return positions at least a label's height apart, in the same order, within 0..height.

    `wanted` is ascending. One pass moves positions up from the bottom, another down from the top.
    """
    gap = min(LABEL_GAP_POINTS, height / max(1, len(wanted) - 1))
    placed: list[float] = []
    for w in wanted:
        placed.append(max(w, placed[-1] + gap if placed else 0.0))
    ceiling = height
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def short_number(value: float) -> str:
    """Format a number for an axis: 0, 2.5, 40k, 3e-4."""
    if value and abs(value) < 0.01:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"
