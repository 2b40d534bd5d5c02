"""One look for all figures: sizes, colours, axes, labels at line ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colour-blind-safe hues, the pale ones darkened until a label in them is readable
# on white. The page replaces each by a CSS variable, so that a dark theme can brighten them.
TASK_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#00825f",
    "#a8488a",
    "#a87800",
    "#2f8fc4",
    "#5a4fa2",
    "#6e6259",
)
INK = "#20242b"
MUTED = "#6b7280"
GRID = "#e3e5e8"
PAPER = "#ffffff"

STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.titlesize": 9.5,
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

LABEL_GAP_POINTS = 11.5
NAME_LIMIT = 18


@dataclass(frozen=True)
class Size:
    """A figure's size in inches; `narrow` ones are for a phone's width."""

    width: float
    height: float

    @property
    def narrow(self) -> bool:
        return self.width < 6


WIDE = Size(9.6, 4.3)
NARROW = Size(4.1, 3.7)


@contextmanager
def plot_style() -> Iterator[None]:
    """Apply the style within the block only (also needed while a figure is saved)."""
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        yield


def new_figure(width: float, height: float) -> Figure:
    """A figure outside pyplot's global state, drawn without a display."""
    figure = Figure(figsize=(width, height), facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def inch_axes(
    figure: Figure, *, left: float, right: float, bottom: float = 0.52, top: float = 0.3
) -> Axes:
    """Axes with margins in inches, so that their height is known before anything is drawn."""
    width, height = figure.get_size_inches()
    inner_width, inner_height = width - left - right, height - bottom - top
    axes = figure.add_axes(
        (left / width, bottom / height, inner_width / width, inner_height / height)
    )
    axes.patch.set_visible(False)
    return axes


def shown(name: str) -> str:
    """A task's or run's name as a figure shows it: shortened, and never taken for mathematics."""
    short = name if len(name) <= NAME_LIMIT else name[: NAME_LIMIT - 1] + "…"
    return short.replace("$", r"\$")


def label_margin(names: Sequence[str]) -> float:
    """Inches that the longest of these names needs beside the axes."""
    return 0.2 + 0.078 * max((len(shown(name)) for name in names), default=0)


def task_colours(tasks: Iterable[str]) -> dict[str, str]:
    """A colour for each task; make it once per report, so that all figures share it."""
    return {t: TASK_COLOURS[i % len(TASK_COLOURS)] for i, t in enumerate(dict.fromkeys(tasks))}


def label_line_ends(axes: Axes, ends: Sequence[tuple[str, float, str]]) -> None:
    """Write (name, y, colour) at the right edge, moved apart just as far as they would overlap.

    The limits of the y axis must be final.
    """
    figure_height = axes.get_figure(root=True).get_size_inches()[1]  # type: ignore[union-attr]
    height = axes.get_position().height * figure_height * 72
    low, high = axes.get_ylim()
    ends = sorted(ends, key=lambda end: end[1])
    wanted = [(y - low) / (high - low) * height for _, y, _ in ends]
    for (name, _, colour), position in zip(ends, spread(wanted, height), strict=True):
        axes.annotate(
            shown(name),
            (1.0, position / height),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
            annotation_clip=False,
        )


def spread(wanted: Sequence[float], height: float) -> list[float]:
    """Positions at least a label's height apart, in the same order, within 0..height if they fit.

    `wanted` is ascending. Each pass pushes up from the bottom, then down from the top.
    """
    gap = min(LABEL_GAP_POINTS, height / max(1, len(wanted) - 1))
    placed = [min(max(0.0, w), height) for w in wanted]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    ceiling = height
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def labels_fit(count: int, size: Size) -> bool:
    """Whether that many labels have room beside axes of this size."""
    return count * LABEL_GAP_POINTS <= (size.height - 0.9) * 72
