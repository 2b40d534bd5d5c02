"""Command-line options that several data commands share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from megaphase.utils.arguments import MOST_PROCESSES, MOST_SEED
from megaphase.utils.errors import InputError

if TYPE_CHECKING:
    from megaphase.data_tools.text import Reading

JsonKey = Annotated[
    str, typer.Option(help="The key of each JSON object, or the column, that holds the text.")
]
Template = Annotated[
    str | None,
    typer.Option(help='Several keys joined, such as "{title}\\n\\n{text}"; replaces --json-key.'),
]
Separator = Annotated[
    str | None,
    typer.Option(help="The line that ends a document in a .txt file; a blank line by default."),
]
Dedup = Annotated[bool, typer.Option("--dedup", help="Leave out repeated documents.")]
Shuffle = Annotated[
    int | None,
    typer.Option(
        metavar="SEED", min=0, max=MOST_SEED, help="Put the documents into a random order."
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1, max=MOST_PROCESSES, help="Number of worker processes; one per core by default."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing --out.")]


def by_language(arguments: Sequence[str], option: str) -> dict[str, list[str]]:
    """Return what an option's `LANGUAGE=FILE` arguments name, by language: one may have several.

    Raises:
        InputError: an argument is of another form.
    """
    named: dict[str, list[str]] = {}
    for argument in arguments:
        language, equals, file = argument.partition("=")
        if not (language and equals and file):
            raise InputError(option, f"{argument!r} is not LANGUAGE=FILE", "write en=en.jsonl.gz")
        named.setdefault(language, []).append(file)
    return named


def reading_of(
    json_key: str,
    template: str | None,
    separator: str | None,
    *,
    source_key: str | None = None,
    target_key: str | None = None,
    messages_key: str | None = None,
    stdin_kind: str = "jsonl",
) -> Reading:
    """The Reading that the options describe; InputError where they contradict each other."""
    from megaphase.data_tools.text import Reading
    from megaphase.data_tools.text.reading import DEFAULT_KEY, unescape

    if (source_key is None) != (target_key is None):
        missing = "--target-key" if target_key is None else "--source-key"
        raise InputError(missing, "a pair has two keys", "give both or none")
    others = {"--template": template, "--source-key": source_key, "--messages-key": messages_key}
    other = next((option for option, value in others.items() if value is not None), None)
    if json_key != DEFAULT_KEY and other is not None:
        raise InputError("--json-key", f"cannot be combined with {other}", "leave one out")
    pair = (source_key, target_key) if source_key is not None and target_key is not None else None
    return Reading(
        key=json_key,
        template=None if template is None else unescape(template),
        pair=pair,
        separator=separator,
        stdin_kind="txt" if stdin_kind == "txt" else "jsonl",
        messages=messages_key,
    )
