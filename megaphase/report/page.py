"""The pieces of a self-contained HTML page: document, tables, figures. Knows nothing of runs.

Parameters and cells named `html` are markup that is already escaped; other text is escaped here.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from urllib.parse import quote

import matplotlib as mpl
from matplotlib.figure import Figure

from megaphase.report.plot_style import (
    GRID,
    INK,
    LINE_COLOURS,
    MUTED,
    NARROW,
    PAPER,
    WIDE,
    Size,
    plot_style,
)

GENERATOR = '<meta name="generator" content="megaphase report">'
PNG_DOTS_PER_INCH = 200
NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}
CSS_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"} | {
    colour: f"--line-{i}" for i, colour in enumerate(LINE_COLOURS)
}

DOCUMENT = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
$generator
<title>$title</title>
<style>
:root { $variables }
$css</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")


@dataclass(frozen=True)
class Plot:
    """A figure of a report. `name` is the stem of its files; `draw` makes it in a given size."""

    name: str
    title: str
    caption: str
    draw: Callable[[Size], Figure]


def document(title: str, body_html: str) -> str:
    """The whole page, with its style sheet inside."""
    return DOCUMENT.substitute(
        generator=GENERATOR,
        title=escape(title),
        variables=" ".join(f"{name}: {colour};" for colour, name in CSS_VARIABLES.items()),
        css=files("megaphase.report").joinpath("report.css").read_text(encoding="utf-8"),
        body=body_html,
    )


def table(head_html: str, rows: Sequence[Sequence[str]], note: str) -> str:
    """A table that scrolls sideways where it does not fit.

    `head_html` is the content of `<thead>`; the cells are markup, the first of a row is its head.
    """
    body = "\n".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f'<div class="scroll"><table>\n<thead>{head_html}</thead>\n<tbody>\n{body}\n</tbody>'
        f'</table></div>\n<p class="note">{escape(note)}</p>'
    )


def head(cells_html: Sequence[str]) -> str:
    """A header row."""
    cells = "".join(f'<th scope="col">{cell}</th>' for cell in cells_html)
    return f"<tr>{cells}</tr>"


def grouped_head(first: str, groups: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Two header rows: the groups' titles, and below them their columns."""
    top = f'<th rowspan="2" scope="col">{escape(first)}</th>' + "".join(
        f'<th colspan="{len(columns)}" scope="colgroup">{escape(title)}</th>'
        for title, columns in groups
    )
    return f"<tr>{top}</tr>{head([escape(c) for _, columns in groups for c in columns])}"


def add_plot(plot: Plot, out: Path, folder: str) -> str:
    """Write the plot as PNG and SVG into `out/folder`; return the figure with the SVG inside.

    The page holds it twice, for a wide and for a narrow window; the style sheet shows one.
    """
    wide = plot.draw(WIDE)
    svg = _svg(wide)
    stem = f"{folder}/{plot.name}"
    (out / folder).mkdir(parents=True, exist_ok=True)
    (out / f"{stem}.svg").write_text(svg, encoding="utf-8")
    with plot_style():
        wide.savefig(out / f"{stem}.png", dpi=PNG_DOTS_PER_INCH, metadata={"Software": None})
    narrow = _svg(plot.draw(NARROW))
    links = " · ".join(f'<a href="{quote(stem)}.{k}">{k.upper()}</a>' for k in ("png", "svg"))
    return (
        f'<figure>\n<div class="wide">{_inline(svg, f"{stem}-wide", plot.title)}</div>\n'
        f'<div class="narrow">{_inline(narrow, f"{stem}-narrow", plot.title)}</div>\n'
        f"<figcaption><b>{escape(plot.title)}.</b> {escape(plot.caption)} "
        f'<span class="files">{links}</span></figcaption>\n'
        "</figure>"
    )


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    # A fixed salt makes the same figure the same text.
    with plot_style(), mpl.rc_context({"svg.hashsalt": "megaphase"}):
        figure.savefig(buffer, format="svg", metadata=NO_METADATA)
    return buffer.getvalue()


def _inline(svg: str, name: str, title: str) -> str:
    """The bare element: identifiers made unique in the page, colours left to the style sheet."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'(\sid="|href="#|url\(#)', lambda found: f"{found[1]}{quote(name)}-", svg)
    for colour in CSS_VARIABLES:
        svg = svg.replace(f": {colour}", f": {css_colour(colour)}")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def css_colour(colour: str) -> str:
    """The colour as the style sheet may change it."""
    return f"var({CSS_VARIABLES[colour]})"
