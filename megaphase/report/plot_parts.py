"""Parts that several figures share: legends, axes of steps, panels, labels next to points."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import Bbox

from megaphase.utils.plot_style import (
    MUTED,
    NAME_LIMIT,
    Size,
    inch_axes,
    new_figure,
    plot_label,
    short_number,
)

BEGINNING = 0.1  # of the steps so far; a loss falls so far there that the rest would look flat
MANY_POINTS = 2000
MOST_NATS = 1e100  # beyond, a loss is as good as infinite, and no axis can show it
FEW_POINTS = 5  # a curve with fewer is shown whole
LEGEND_LINE_INCHES = 0.24
LEGEND_KEY_INCHES = 0.5  # handle and spacing
LEGEND_CHARACTER_INCHES = 0.08
BOTTOM_INCHES = 0.52  # tick labels and the axis title
LEFT_INCHES = 0.62
TITLE_INCHES = 0.3
LABEL_POINTS = 8.5  # font size of labels next to points
Curve = tuple[np.ndarray, np.ndarray]  # steps [n], losses [n]


def line_key(label: str, color: str = MUTED, **look: Any) -> Line2D:
    """Return a line as a legend's key."""
    return Line2D([], [], label=label, color=color, **look)


def legend_on_top(figure: Figure, keys: Sequence[Line2D | Patch], columns: int) -> None:
    """Put a legend at the upper right edge, for which the figure must have space."""
    figure.legend(
        handles=list(keys),
        loc="upper right",
        ncols=columns,
        handlelength=1.6,
        columnspacing=1.2,
        handletextpad=0.5,
        borderaxespad=0.2,
    )


def legend_columns(labels: Sequence[str], size: Size) -> int:
    """Return the number of columns that fit into the figure's width."""
    longest = max((len(label) for label in labels), default=0)
    wide = LEGEND_KEY_INCHES + LEGEND_CHARACTER_INCHES * longest
    return max(1, min(len(labels), int((size.width - 0.1) / wide)))


def legend_inches(labels: Sequence[str], columns: int) -> float:
    """Return the height of a legend in inches."""
    return 0.1 + LEGEND_LINE_INCHES * -(-len(labels) // columns)


def panel_grid(
    size: Size,
    titles: Sequence[str],
    panel_height: float,
    top: float,
    limit: int = NAME_LIMIT,
) -> tuple[Figure, list[Axes]]:
    """Return a figure with a panel per title, two per row if it is wide, below `top` inches.

    limit: characters of a title.
    """
    columns = 1 if size.narrow or len(titles) == 1 else 2
    title_inches = TITLE_INCHES if any(titles) else 0.1
    panel_width = (size.width - 0.25) / columns
    rows = -(-len(titles) // columns)
    figure = new_figure(size.width, rows * panel_height + top)
    panels = []
    for i, title in enumerate(titles):
        left = i % columns * panel_width
        bottom = (rows - 1 - i // columns) * panel_height
        axes = inch_axes(
            figure,
            left + LEFT_INCHES,
            bottom + BOTTOM_INCHES,
            left + panel_width,
            bottom + panel_height - title_inches,
        )
        axes.set_title(plot_label(title, limit), loc="left", fontweight="bold")
        panels.append(axes)
    return figure, panels


def without_beginning(curve: Curve, span: tuple[int, int], starts: Iterable[int] = ()) -> Curve:
    """Return a curve without its steep beginning; whole if it has few points, of which some are
    after it.

    span: the first and the last step of the axis. starts: steps at which phases or branches begin:
        from the first of them on, everything is kept.
    """
    steps, losses = curve
    first, last = span
    kept = steps >= min(first + BEGINNING * (last - first), *starts, np.inf)
    few = np.count_nonzero(np.isfinite(losses)) < FEW_POINTS
    return curve if few and np.any(kept) else (steps[kept], losses[kept])


def thinned(curve: Curve) -> Curve:
    """Return a curve of so many points as can be told apart, the last and the highest included."""
    steps, values = curve
    if len(steps) <= MANY_POINTS:
        return curve
    every = -(-len(steps) // MANY_POINTS)
    kept = np.unique([*range(0, len(steps), every), int(np.nanargmax(values)), len(steps) - 1])
    return steps[kept], values[kept]


def loss_limits(curves: Iterable[Curve], otherwise: Iterable[Curve] = ()) -> tuple[float, float]:
    """Return limits that show all of these curves.

    otherwise: curves to use if the others have no finite point.
    """
    values = np.empty(0)
    for group in (curves, otherwise):
        values = np.concatenate([values, *(losses for _, losses in group)])
        values = values[np.abs(values) < MOST_NATS]  # nor NaN
        if len(values):
            break
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    room = 0.08 * max(high - low, 0.1)
    return low - room, high + room


def step_axes(axes: Axes, span: tuple[int, int], size: Size, ticks: int = 9) -> None:
    """Make the x axis show steps, from the first to the last."""
    first, last = span
    axes.set_xlim(first, first + 1.01 * max(last - first, 1))  # with room for half a marker
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axes.xaxis.set_major_locator(MaxNLocator(5 if size.narrow else ticks, integer=True))
    axes.grid(False, axis="x")


class PointLabel(NamedTuple):
    """A text next to a point, in data coordinates."""

    x: float
    y: float
    text: str
    colour: str


# Possible places of a label, the best first: direction and distance in points.
PLACES = [
    (dx, dy, distance)
    for distance in (6.0, 13.0, 22.0)
    for dx, dy in ((-1, -1), (1, 1), (-1, 0), (1, 0), (0, -1), (0, 1), (1, -1), (-1, 1))
]


def label_points(
    axes: Axes, labels: Sequence[PointLabel], lines: Sequence[np.ndarray] = ()
) -> list[PointLabel]:
    """Write labels next to their points so that none covers another or a point.

    lines: paths [n, 2] in data coordinates that labels should not cover. The size of the axes must
    be final. Labels without a free place are left out and returned.
    """
    axes.autoscale_view()  # otherwise limits are only computed when it is drawn
    dpi = axes.get_figure(root=True).dpi / 72  # type: ignore[union-attr]  # pixels per point
    to_pixels = axes.transData.transform
    dots = [to_pixels((label.x, label.y)) for label in labels]
    paths = [_along(to_pixels(line)) for line in lines if len(line)]
    line_points = np.concatenate(paths) if paths else np.empty((0, 2))
    frame = axes.get_window_extent()
    around = 4 * dpi * np.array([-1, -1, 1, 1])
    taken = np.empty((0, 4))
    every_dot = np.array([[x, y, x, y] for x, y in dots]).reshape(-1, 4) + around
    left_out = []
    for i, label in enumerate(labels):
        covered = np.concatenate([np.delete(every_dot, i, axis=0), taken])
        place = _free_place(dots[i], label.text, dpi, covered, frame, line_points)
        if place is None:
            left_out.append(label)
            continue
        offset, ha, va, box = place
        taken = np.append(taken, [box.extents], axis=0)
        axes.annotate(
            label.text, (label.x, label.y), offset, textcoords="offset points", ha=ha, va=va,
            color=label.colour, fontsize=LABEL_POINTS, zorder=5,
        )  # fmt: skip
    return left_out


def left_out_note(labels: Sequence[PointLabel]) -> str:
    """Return how many labels were left out for want of room; empty if none was."""
    count = len(labels)
    if not count:
        return ""
    return f"no room for {count} {'label' if count == 1 else 'labels'}"


def cropped_note(axes: Axes, curves: Iterable[Curve]) -> str:
    """Return how far the curves reach beyond the limits of the y axis; empty if they do not."""
    low, high = sorted(axes.get_ylim())
    values = [losses[np.isfinite(losses)] for _, losses in curves]
    reach = [(float(each.min()), float(each.max())) for each in values if len(each)]
    notes = []
    if (most := max((top for _, top in reach), default=high)) > high:
        notes.append(f"up to {_in_short(most)}")
    if (least := min((bottom for bottom, _ in reach), default=low)) < low:
        notes.append(f"down to {_in_short(least)}")
    return f"cut off: {', '.join(notes)}" if notes else ""


def _in_short(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 1e5 else f"{value:.0e}"


def note_on_panel(axes: Axes, *notes: str) -> None:
    """Write what a panel leaves out at its upper right corner, above the axes."""
    text = "; ".join(note for note in notes if note)
    place, figure = axes.get_subplotspec(), axes.get_figure(root=True)
    if not text or figure is None:
        return
    panels = 1 if place is None else place.get_gridspec().ncols
    # In points: axes take about nine tenths of a panel, letters half as much as they are high.
    letters = 0.9 * 72 * figure.get_figwidth() / panels / (0.5 * LABEL_POINTS)
    lines = textwrap.fill(text, int(letters))
    axes.set_title(lines, loc="right", fontsize=LABEL_POINTS, color=MUTED)


Place = tuple[tuple[float, float], str, str, Bbox]


def _free_place(
    dot: np.ndarray, text: str, dpi: float, taken: np.ndarray, frame: Bbox, line_points: np.ndarray
) -> Place | None:
    """Return offset in points, alignments and box in pixels of the place that covers least line.

    taken: left, bottom, right and top of boxes in pixels that must not be covered [boxes, 4].
    """
    width, height = 0.68 * LABEL_POINTS * len(text) * dpi, 1.15 * LABEL_POINTS * dpi
    best: Place | None = None
    least = np.inf
    for rank, (dx, dy, distance) in enumerate(PLACES):
        length = distance / np.hypot(dx, dy)
        offset = dx * length, dy * length
        x, y = dot[0] + offset[0] * dpi, dot[1] + offset[1] * dpi
        box = Bbox.from_bounds(x + (dx - 1) * width / 2, y + (dy - 1) * height / 2, width, height)
        inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 + 20 * dpi
        if not inside or not (frame.y0 <= box.y0 and box.y1 <= frame.y1 + 6 * dpi):
            continue
        if np.any(np.all((taken[:, :2] <= box.max) & (taken[:, 2:] >= box.min), axis=1)):
            continue
        cost = rank + 3 * int(box.count_contains(line_points)) if len(line_points) else rank
        if cost < least:
            ha, va = ("right", "center", "left")[dx + 1], ("top", "center", "bottom")[dy + 1]
            best, least = (offset, ha, va, box), cost
    return best


def _along(path: np.ndarray) -> np.ndarray:
    """Return points every few pixels along a path."""
    pieces = []
    for start, end in pairwise(path):
        count = int(np.hypot(*(end - start)) // 4) + 2
        pieces.append(np.linspace(start, end, min(count, 400)))
    return np.concatenate(pieces) if pieces else path
