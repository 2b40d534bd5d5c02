"""`megaphase data ...`: parse, call, print."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from megaphase.data_tools.options import JsonKey, Overwrite
from megaphase.errors import InputError

if TYPE_CHECKING:
    from megaphase.corpus import Manifest

data_app = typer.Typer(
    help="Turn text into tokenized corpora; look at, check and join them.", no_args_is_help=True
)


class OnError(StrEnum):
    """What to do at a document that cannot be read."""

    stop = "stop"
    skip = "skip"


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@data_app.command("tokenize")
def tokenize_command(
    inputs: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Text files, in order.")],
    tokenizer: Annotated[Path, typer.Option(help="The tokenizer's directory.")],
    out: Annotated[Path, typer.Option(help="Prefix of the corpus: PREFIX.bin, PREFIX.idx ...")],
    workers: Annotated[
        int | None, typer.Option(help="Processes that encode; as many as cores if not given.")
    ] = None,
    json_key: JsonKey = "text",
    on_error: Annotated[
        OnError,
        typer.Option(help="At a document that cannot be read: stop, or skip it and say so."),
    ] = OnError.stop,
    overwrite: Overwrite = False,
) -> None:
    """Tokenize text into a corpus in Megatron-LM's format.

    A document is a line of a .jsonl file, or what stands between blank lines of a .txt file; both
    may be compressed (.gz, .zst). What --on-error skip leaves out stands in PREFIX.skipped.jsonl.

    Example: megaphase data tokenize en.jsonl.gz --tokenizer tok/ --out data/en
    """
    from megaphase.data_tools.skipped import SKIPPED_SUFFIX
    from megaphase.data_tools.tokenize import tokenize

    manifest = tokenize(
        inputs,
        tokenizer,
        out,
        json_key=json_key,
        workers=_available_cores() if workers is None else workers,
        skip_wrong=on_error is OnError.skip,
        overwrite=overwrite,
        console=Console(stderr=True),
    )
    Console().print(_corpus_table(out, manifest))
    if manifest.skipped_wrong:
        typer.echo(f"Skipped, wrong: {manifest.skipped_wrong:,}, see {out}{SKIPPED_SUFFIX}")


@data_app.command("from-megatron")
def from_megatron_command(
    source: Annotated[Path, typer.Argument(metavar="PREFIX", help="Of its .bin and .idx.")],
    tokenizer: Annotated[Path, typer.Option(help="The tokenizer that made the tokens.")],
    out: Annotated[Path, typer.Option(help="Prefix of the corpus: PREFIX.bin, PREFIX.idx ...")],
    workers: Annotated[
        int | None, typer.Option(help="Processes that work; as many as cores if not given.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Copy a corpus that Megatron-LM's preprocess_data wrote into one of ours.

    Megatron-LM reads ours as they are, by the same prefix.

    Example: megaphase data from-megatron old/en_text_document --tokenizer tok/ --out data/en
    """
    from megaphase.data_tools.from_megatron import from_megatron

    manifest = from_megatron(
        source,
        tokenizer,
        out,
        workers=_available_cores() if workers is None else workers,
        overwrite=overwrite,
        console=Console(stderr=True),
    )
    Console().print(_corpus_table(out, manifest))


@data_app.command("inspect")
def inspect_command(
    prefix: Annotated[Path, typer.Argument(help="The corpus's prefix.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="The tokenizer's directory; needed for --document.")
    ] = None,
    document: Annotated[
        int | None, typer.Option(help="Print this document's text, counted from 0.")
    ] = None,
) -> None:
    """Show a corpus's figures, or one of its documents as text.

    Example: megaphase data inspect data/en --tokenizer tok/ --document 7
    """
    from megaphase.data_tools.inspect_corpus import describe, document_text

    if document is None:
        Console().print(describe(prefix))
    elif tokenizer is None:
        raise InputError("--document", "a document's text needs the tokenizer", "add --tokenizer")
    else:
        typer.echo(document_text(prefix, tokenizer, document))


@data_app.command("verify")
def verify_command(
    prefixes: Annotated[list[Path], typer.Argument(metavar="PREFIX...", help="The corpora.")],
) -> None:
    """Read all of each corpus and check its hashes, lengths, offsets and tokens.

    Example: megaphase data verify data/en data/hi
    """
    from megaphase.data_tools.verify import verify

    for prefix in prefixes:
        manifest = verify(prefix, Console(stderr=True))
        typer.echo(f"{prefix}: whole, {manifest.documents:,} documents, {manifest.tokens:,} tokens")


@data_app.command("merge")
def merge_command(
    prefixes: Annotated[
        list[Path], typer.Argument(metavar="PREFIX...", help="The corpora, in order.")
    ],
    out: Annotated[Path, typer.Option(help="Prefix of the new corpus.")],
    overwrite: Overwrite = False,
) -> None:
    """Join corpora that were made with the same tokenizer.

    Example: megaphase data merge data/en-1 data/en-2 --out data/en
    """
    from megaphase.data_tools.merge import merge

    manifest = merge(prefixes, out, overwrite=overwrite, console=Console(stderr=True))
    Console().print(_corpus_table(out, manifest))


def _corpus_table(prefix: Path, manifest: Manifest) -> Table:
    table = Table()
    table.add_column("corpus", overflow="fold")
    for column in ("documents", "tokens", "bytes of text", "bytes per token"):
        table.add_column(column, justify="right")
    table.add_row(
        str(prefix),
        f"{manifest.documents:,}",
        f"{manifest.tokens:,}",
        f"{manifest.text_bytes:,}",
        f"{manifest.text_bytes / manifest.tokens:.2f}",
    )
    return table
