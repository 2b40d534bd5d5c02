"""The pieces of a self-contained HTML page: document, tables, figures. Knows nothing of runs.

Functions that take `html` want markup that is already escaped; all other text is escaped here.
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

import matplotlib as mpl
from matplotlib.figure import Figure

from megaphase.experiments.plot_style import (
    GRID,
    INK,
    MUTED,
    NARROW,
    PAPER,
    TASK_COLOURS,
    WIDE,
    Size,
    plot_style,
)

GENERATOR = "megaphase report"
PNG_DOTS_PER_INCH = 200
NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}

DOCUMENT = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="$generator">
<title>$title</title>
<style>
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
    css = files("megaphase.experiments").joinpath("report.css").read_text(encoding="utf-8")
    return DOCUMENT.substitute(
        generator=GENERATOR, title=escape(title), css=_colour_variables() + css, body=body_html
    )


def section(title: str, body_html: str, level: int = 2) -> str:
    """A headed section."""
    return f"<section>\n<h{level}>{escape(title)}</h{level}>\n{body_html}\n</section>"


def table(head_html: str, rows: Sequence[Sequence[str]], note: str = "") -> str:
    """A table that scrolls sideways where it does not fit; cells are markup, the first is a head.

    `head_html` is the content of `<thead>`.
    """
    body = "\n".join(
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{c}</td>" for c in rest) + "</tr>"
        for first, *rest in rows
    )
    caption = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<div class="scroll"><table>\n<thead>{head_html}</thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>{caption}"
    )


def grouped_head(first: str, groups: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Two header rows: group titles above their columns. A group of one column has only a title."""
    top = [f'<th rowspan="2" scope="col">{escape(first)}</th>']
    below = []
    for title, columns in groups:
        if columns:
            top.append(f'<th colspan="{len(columns)}" scope="colgroup">{escape(title)}</th>')
            below += [f'<th scope="col">{escape(column)}</th>' for column in columns]
        else:
            top.append(f'<th rowspan="2" scope="col">{escape(title)}</th>')
    return f"<tr>{''.join(top)}</tr><tr>{''.join(below)}</tr>"


def definitions(pairs: Sequence[tuple[str, str]]) -> str:
    """A list of terms and what they are set to."""
    items = "".join(
        f"<div><dt>{escape(term)}</dt><dd>{escape(value)}</dd></div>" for term, value in pairs
    )
    return f"<dl>{items}</dl>"


def add_plot(plot: Plot, folder: Path) -> str:
    """Write the plot as PNG and SVG into `folder`; return the figure with the SVG inside.

    The page holds it twice, for a wide and for a narrow window; the style sheet shows one.
    """
    wide = plot.draw(WIDE)
    svg = _svg(wide, plot.name)
    (folder / f"{plot.name}.svg").write_text(svg, encoding="utf-8")
    with plot_style():
        wide.savefig(
            folder / f"{plot.name}.png", dpi=PNG_DOTS_PER_INCH, metadata={"Software": None}
        )
    narrow_name = f"{plot.name}-narrow"
    narrow = _svg(plot.draw(NARROW), narrow_name)
    links = " · ".join(
        f'<a href="{escape(folder.name)}/{escape(plot.name)}.{kind}">{kind.upper()}</a>'
        for kind in ("png", "svg")
    )
    return (
        f'<figure id="{escape(plot.name)}">\n'
        f'<div class="wide">{_inline(svg, plot.name, plot.title)}</div>\n'
        f'<div class="narrow">{_inline(narrow, narrow_name, plot.title)}</div>\n'
        f"<figcaption><b>{escape(plot.title)}.</b> {escape(plot.caption)} "
        f'<span class="files">{links}</span></figcaption>\n</figure>'
    )


def _svg(figure: Figure, salt: str) -> str:
    buffer = io.StringIO()
    with plot_style(), mpl.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata=NO_METADATA)
    return buffer.getvalue()


def _inline(svg: str, name: str, title: str) -> str:
    """The bare element: identifiers made unique in the page, colours left to the style sheet."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'(\sid="|href="#|url\(#)', lambda m: f"{m[1]}{escape(name)}-", svg)
    for colour in _variables():
        svg = svg.replace(f": {colour}", f": {colour_variable(colour)}")
    label = f'<svg role="img" aria-label="{escape(title)}" '
    return svg.replace("<svg ", label, 1)


def colour_variable(colour: str) -> str:
    """The colour as the style sheet may change it."""
    return f"var({_variables()[colour]}, {colour})"


def _variables() -> dict[str, str]:
    named = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"}
    return named | {colour: f"--task-{i}" for i, colour in enumerate(TASK_COLOURS)}


def _colour_variables() -> str:
    lines = "".join(f"  {variable}: {colour};\n" for colour, variable in _variables().items())
    return f":root {{\n{lines}}}\n"
