"""The `megaphase data` commands on corpora: they parse options, call the tools, print results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from megaphase.data_tools.options import Dedup, Overwrite, Shuffle, Workers
from megaphase.utils.arguments import finite, named
from megaphase.utils.cores import available_cores
from megaphase.utils.errors import InputError
from megaphase.utils.standard_streams import new_console

if TYPE_CHECKING:
    from megaphase.corpus import Manifest

Prefixes = Annotated[list[Path], typer.Argument(metavar="PREFIX", help="Prefixes of the corpora.")]


def corpus_from_megatron_command(
    source: Annotated[
        Path, typer.Argument(metavar="PREFIX", help="Prefix of the .bin and .idx files.")
    ],
    tokenizer: Annotated[Path, typer.Option(help="The tokenizer that made the tokens.")],
    out: Annotated[
        Path, typer.Option(callback=named, help="Prefix of the corpus: PREFIX.bin, PREFIX.idx ...")
    ],
    workers: Workers = None,
    overwrite: Overwrite = False,
) -> None:
    """Convert a corpus written by Megatron-LM's preprocess_data.

    The conversion is only needed in this direction: Megatron-LM reads Megaphase's corpora as they
    are, by the same prefix.

    Example: megaphase data from-megatron old/en_text_document --tokenizer tok/ --out data/en
    """
    from megaphase.data_tools.corpora.from_megatron import corpus_from_megatron

    manifest = corpus_from_megatron(
        source,
        tokenizer,
        out,
        workers=available_cores() if workers is None else workers,
        overwrite=overwrite,
        console=new_console(stderr=True),
    )
    print_corpora({out: manifest})


def inspect_corpus_command(
    prefix: Annotated[Path, typer.Argument(help="The corpus's prefix.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="The tokenizer's directory; needed for --document.")
    ] = None,
    document: Annotated[
        int | None,
        typer.Option(
            help="Print the text of this document (from 0), and its id and source file on standard "
            "error."
        ),
    ] = None,
) -> None:
    """Show the statistics of a corpus, or the text of one of its documents.

    Example: megaphase data inspect data/en --tokenizer tok/ --document 7
    """
    from megaphase.data_tools.corpora.inspect import describe, document_text

    if document is None:
        if tokenizer is not None:
            raise InputError("--tokenizer", "is for --document", "give that, too, or leave it out")
        new_console().print(describe(prefix))
    elif tokenizer is None:
        raise InputError("--document", "a document's text needs the tokenizer", "add --tokenizer")
    else:
        text, origin = document_text(prefix, tokenizer, document)
        typer.echo(origin, err=True)
        typer.echo(text)


def stats_command(
    prefixes: Prefixes,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The corpora's tokenizer, to list the most common tokens.")
    ] = None,
) -> None:
    """Read each corpus completely and compare sizes, duplicates and use of the vocabulary.

    Example: megaphase data stats data/en data/hi --tokenizer tok/
    """
    from megaphase.data_tools.corpora.stats import corpus_stats, stats_tables, tokenizer_of

    words = None if tokenizer is None else tokenizer_of(prefixes, tokenizer)
    stats = {prefix: corpus_stats(prefix, new_console(stderr=True)) for prefix in prefixes}
    new_console().print(stats_tables(stats, words))


def verify_command(prefixes: Prefixes) -> None:
    """Read each corpus completely and check its hashes, lengths, offsets and tokens.

    An error names the document in which it was found.

    Example: megaphase data verify data/en data/hi
    """
    from megaphase.data_tools.corpora.verify import verify_corpus

    for prefix in prefixes:
        manifest = verify_corpus(prefix, new_console(stderr=True))
        typer.echo(f"{prefix}: OK, {manifest.documents:,} documents, {manifest.tokens:,} tokens")


def merge_command(
    out: Annotated[Path, typer.Option(callback=named, help="Prefix of the new corpus.")],
    prefixes: Annotated[
        list[Path] | None,
        typer.Argument(metavar="PREFIX", help="Prefixes of the corpora, in order."),
    ] = None,
    shards: Annotated[
        bool, typer.Option("--shards", help="Merge all shards of --out, which are next to it.")
    ] = False,
    remove: Annotated[
        bool,
        typer.Option("--remove", help="Remove the inputs when the result is complete."),
    ] = False,
    dedup: Dedup = False,
    shuffle: Shuffle = None,
    overwrite: Overwrite = False,
) -> None:
    """Merge corpora that were made with the same tokenizer; each is verified while it is read.

    Example: megaphase data merge data/en-1 data/en-2 --out data/en --dedup
    """
    from megaphase.data_tools.corpora.input_removal import merge_and_remove
    from megaphase.data_tools.corpora.merge import merge
    from megaphase.data_tools.shards import existing_shards

    if shards == bool(prefixes):
        raise InputError("--shards", "cannot be combined with prefixes", "give one of them")
    options: dict[str, Any] = {
        "drop_duplicates": dedup,
        "shuffle_seed": shuffle,
        "overwrite": overwrite,
        "console": new_console(stderr=True),
    }
    if remove:
        manifest = merge_and_remove(prefixes or None, out, **options)
    else:
        manifest = merge(prefixes or existing_shards(out), out, **options)
    print_corpora({out: manifest})


def split_command(
    prefix: Annotated[Path, typer.Argument(help="The corpus's prefix.")],
    train: Annotated[Path, typer.Option(callback=named, help="Prefix of the larger part.")],
    held_out: Annotated[Path, typer.Option(callback=named, help="Prefix of the held-out part.")],
    fraction: Annotated[
        float, typer.Option(callback=finite, help="Fraction of the documents to hold out.")
    ] = 0.01,
    overwrite: Overwrite = False,
) -> None:
    """Split a corpus by the documents' hashes, as training does with validation.fraction.

    Documents with the same text (translation pairs: the same source) end up in the same part.

    Example: megaphase data split data/en --train data/en-train --held-out data/en-test
    """
    from megaphase.data_tools.corpora.split import split

    parts = split(
        prefix, train, held_out, fraction, overwrite=overwrite, console=new_console(stderr=True)
    )
    print_corpora(dict(zip((train, held_out), parts, strict=True)))


def print_corpora(manifests: dict[Path, Manifest]) -> None:
    """Print the sizes of new corpora and the number of documents that were left out."""
    from megaphase.corpus.manifest import SKIPPED_SUFFIX

    table = Table()
    table.add_column("corpus", overflow="fold")
    for column in ("documents", "tokens", "bytes of text", "bytes per token"):
        table.add_column(column, justify="right")
    for prefix, manifest in manifests.items():
        text_tokens = manifest.tokens - manifest.documents  # without EOD, as `data stats`
        table.add_row(
            str(prefix),
            f"{manifest.documents:,}",
            f"{manifest.tokens:,}",
            f"{manifest.text_bytes:,}",
            f"{manifest.text_bytes / max(text_tokens, 1):.2f}",
        )
    new_console().print(table)
    for prefix, manifest in manifests.items():
        if manifest.skipped_duplicates:
            typer.echo(f"Duplicates left out: {manifest.skipped_duplicates:,}")
        if manifest.skipped_wrong:
            skipped = f"{manifest.skipped_wrong:,}, see {prefix}{SKIPPED_SUFFIX}"
            typer.echo(f"Invalid documents skipped: {skipped}")
