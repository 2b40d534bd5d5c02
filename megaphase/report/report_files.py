"""The directory of a report, in which page, plots and numbers are published atomically."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from megaphase.report import page
from megaphase.utils.errors import InputError
from megaphase.utils.files import (
    directory_written_aside,
    real_path,
    removal_path,
    remove_abandoned,
    remove_directory,
)

PAGE_FILE = "index.html"
PLOTS_FOLDER = "plots"
NUMBERS_FOLDER = "numbers"


@dataclass(frozen=True)
class PageContent:
    """The articles of a page, and the names of the files in NUMBERS_FOLDER to which it links.

    tables_note: text after the links.
    """

    articles: Sequence[Markup]
    tables: Sequence[str]
    tables_note: str = ""


def write_page(out: Path, title: str, content_of: Callable[[Path], PageContent]) -> Path:
    """Write a report into the directory `out`, replacing an earlier one; return its page.

    content_of: writes plots and numbers into the folder that it is given, and returns the rest.

    Raises:
        InputError: `out` contains anything other than an earlier report.
    """
    with _replacing_report(out) as folder:
        content = content_of(folder)
        text = page.document(
            title, content.articles, content.tables, NUMBERS_FOLDER, content.tables_note
        )
        (folder / PAGE_FILE).write_text(text, encoding="utf-8")
    return out / PAGE_FILE


@contextmanager
def _replacing_report(out: Path) -> Iterator[Path]:
    """Yield a temporary directory that replaces `out` when the block ends without an error. A link
    keeps leading there."""
    out = real_path(out)
    former = removal_path(out)
    if former.exists() and not out.exists():  # an earlier call was killed between two renames
        os.rename(former, out)
    refuse_all_but_report(out)
    remove_abandoned(out)
    try:
        with directory_written_aside(out) as folder:
            yield folder
            if out.exists():
                remove_directory(former)
                os.rename(out, former)
    except BaseException:
        if former.exists() and not out.exists():
            os.rename(former, out)
        raise
    remove_directory(former)


def refuse_all_but_report(out: Path, option: str = "--out") -> None:
    """Raise InputError unless `out` is an earlier report and nothing else, since it is removed.

    option: the one that `out` was given with, for the message.
    """
    if not out.exists():
        return
    remedy = f"give {option} a new directory"
    if not out.is_dir():
        raise InputError(out, "is not a directory", remedy)
    names = {path.name for path in out.iterdir()}
    if not names:
        return
    index = out / PAGE_FILE
    if not index.is_file() or page.GENERATOR not in index.read_text(errors="replace"):
        raise InputError(out, "exists and is not an earlier report", remedy)
    if other := sorted(names - {PAGE_FILE, PLOTS_FOLDER, NUMBERS_FOLDER}):
        raise InputError(out, f"contains {other[0]}, which is not part of a report", remedy)
