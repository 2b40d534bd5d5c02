"""Self-contained HTML pages from templates: document, tables, figures. Independent of runs."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from megaphase.utils.plot_style import (
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
NO_BREAK_SPACE = "\u00a0"
PNG_DOTS_PER_INCH = 200
NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}
CSS_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"} | {
    colour: f"--line-{i}" for i, colour in enumerate(LINE_COLOURS)
}


@dataclass(frozen=True)
class Plot:
    """A figure of a report. `name` is the stem of its files; `draw` makes it in a given size."""

    name: str
    title: str
    caption: str
    draw: Callable[[Size], Figure]


@dataclass(frozen=True)
class DrawnPlot:
    """A drawn plot: its files are `stem`.png and `stem`.svg, and the page holds both drawings."""

    title: str
    caption: str
    stem: str
    wide_svg: Markup
    narrow_svg: Markup


@dataclass(frozen=True)
class Cell:
    """The content of a table's cell; a plain string can be used instead if it has only text.

    Attributes:
        colour: colour of a swatch before the text, in CSS; see `css_colour`.
        small: text in small print after it.
    """

    text: str
    bold: bool = False
    warning: bool = False
    colour: str | None = None
    small: str = ""


@dataclass(frozen=True)
class PageTable:
    """A table and the note below it; the first cell of a row is its head.

    Attributes:
        columns: the column titles; with `groups`, only the title of the first column.
        groups: titles over several columns, each with the titles of these.
        words: whether its cells are words, which are broken into lines and aligned to the left.
    """

    columns: Sequence[str | Cell]
    rows: Sequence[Sequence[str | Cell]]
    note: str
    groups: Sequence[tuple[str, Sequence[str]]] = ()
    words: bool = False


def render(template: str, **values: object) -> Markup:
    """Fill a template of this package; text in `values` is escaped, Markup is not."""
    return Markup(_environment().get_template(template).render(values))


def document(
    title: str, articles: Sequence[Markup], tables: Sequence[str], folder: str, tables_note: str
) -> str:
    """Return the whole page, including its style sheet.

    tables: names of the files in `folder` to which the page links; tables_note: text after them.
    """
    return render(
        "page.html",
        generator=Markup(GENERATOR),
        title=title,
        variables=CSS_VARIABLES,
        css=Markup(files("megaphase.report").joinpath("report.css").read_text(encoding="utf-8")),
        articles=articles,
        tables=tables,
        tables_note=tables_note,
        numbers_folder=folder,
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("megaphase.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
    )
    environment.filters["unbroken"] = _unbroken
    return environment


def _unbroken(text: str) -> Markup:
    """Keep intervals such as [-0.1, +0.2], p-values, and numbers such as 4e-3, on one line."""
    text = re.sub(r"\[[^][]*\]", lambda found: found[0].replace(" ", NO_BREAK_SPACE), text)
    text = re.sub(r"p ([<=]) ", rf"p{NO_BREAK_SPACE}\1{NO_BREAK_SPACE}", text)
    numbers = re.sub(r"\d[\d.]*e-\d+", r'<span class="number">\g<0></span>', str(escape(text)))
    return Markup(numbers)


def draw_plot(plot: Plot, out: Path, folder: str) -> DrawnPlot:
    """Write the plot as PNG and SVG into `out/folder`; return the drawings for the page.

    The page contains two, for a wide and for a narrow window; the style sheet shows one of them.
    """
    wide = plot.draw(WIDE)
    svg = _svg(wide)
    stem = f"{folder}/{plot.name}"
    (out / folder).mkdir(parents=True, exist_ok=True)
    (out / f"{stem}.svg").write_text(svg, encoding="utf-8")
    with plot_style():
        wide.savefig(
            out / f"{stem}.png",
            dpi=PNG_DOTS_PER_INCH,
            metadata={"Software": None},
            pil_kwargs={"compress_level": 2},  # a quarter larger, in much less time
        )
    narrow = _svg(plot.draw(NARROW))
    return DrawnPlot(
        plot.title,
        plot.caption,
        stem,
        _inline(svg, f"{stem}-wide", plot.title),
        _inline(narrow, f"{stem}-narrow", plot.title),
    )


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    # With a fixed salt, the same figure always gives the same text.
    with plot_style(), mpl.rc_context({"svg.hashsalt": "megaphase"}):
        figure.savefig(buffer, format="svg", metadata=NO_METADATA)
    return buffer.getvalue()


def _inline(svg: str, name: str, title: str) -> Markup:
    """Return the SVG element with identifiers unique in the page and colours as CSS variables."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'(\sid="|href="#|url\(#)', lambda found: f"{found[1]}{quote(name)}-", svg)
    for colour in CSS_VARIABLES:
        svg = svg.replace(f": {colour}", f": {css_colour(colour)}")
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1))


def css_colour(colour: str) -> str:
    """Return the colour as a CSS variable that the style sheet may change."""
    return f"var({CSS_VARIABLES[colour]})"
