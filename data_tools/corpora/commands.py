"""`megaphase data` commands that work on corpora: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from megaphase.data_tools.options import Dedup, Overwrite, Shuffle, Workers, available_cores
from megaphase.utils.arguments import finite, named
from megaphase.utils.errors import InputError
from megaphase.utils.files import real_path
from megaphase.utils.standard_streams import new_console

if TYPE_CHECKING:
    from megaphase.corpus import Manifest

Prefixes = Annotated[list[Path], typer.Argument(metavar="PREFIX", help="The corpora.")]


def corpus_from_megatron_command(
    source: Annotated[Path, typer.Argument(metavar="PREFIX", help="Of its .bin and .idx.")],
    tokenizer: Annotated[Path, typer.Option(help="The tokenizer that made the tokens.")],
    out: Annotated[
        Path, typer.Option(callback=named, help="Prefix of the corpus: PREFIX.bin, PREFIX.idx ...")
    ],
    workers: Workers = None,
    overwrite: Overwrite = False,
) -> None:
    """Copy a corpus that Megatron-LM's preprocess_data wrote into one of ours.

    Megatron-LM reads ours as they are, by the same prefix.

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
            help="Print this document's text, counted from 0, and on standard error its own id "
            "and its file."
        ),
    ] = None,
) -> None:
    """Show a corpus's figures, or one of its documents as text.

    Example: megaphase data inspect data/en --tokenizer tok/ --document 7
    """
    from megaphase.data_tools.corpora.inspect import describe, document_text

    if document is None:
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
        Path | None, typer.Option(help="The tokenizer that made them: names the common tokens.")
    ] = None,
) -> None:
    """Read all of each corpus: sizes side by side, duplicates, use of the vocabulary.

    Example: megaphase data stats data/en data/hi --tokenizer tok/
    """
    from megaphase.data_tools.corpora.stats import corpus_stats, stats_tables

    stats = {prefix: corpus_stats(prefix, new_console(stderr=True)) for prefix in prefixes}
    new_console().print(stats_tables(stats, tokenizer))


def verify_command(prefixes: Prefixes) -> None:
    """Read all of each corpus and check its hashes, lengths, offsets and tokens.

    What is wrong is named with the document where it is.

    Example: megaphase data verify data/en data/hi
    """
    from megaphase.data_tools.corpora.verify import verify_corpus

    for prefix in prefixes:
        manifest = verify_corpus(prefix, new_console(stderr=True))
        typer.echo(f"{prefix}: whole, {manifest.documents:,} documents, {manifest.tokens:,} tokens")


def merge_command(
    out: Annotated[Path, typer.Option(callback=named, help="Prefix of the new corpus.")],
    prefixes: Annotated[
        list[Path] | None, typer.Argument(metavar="PREFIX", help="The corpora, in order.")
    ] = None,
    shards: Annotated[
        bool, typer.Option("--shards", help="Merge all shards of --out, which lie beside it.")
    ] = False,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove what was merged, once the whole is there.")
    ] = False,
    dedup: Dedup = False,
    shuffle: Shuffle = None,
    overwrite: Overwrite = False,
) -> None:
    """Join corpora that were made with the same tokenizer; each is verified on the way.

    Example: megaphase data merge data/en-1 data/en-2 --out data/en --dedup
    """
    from megaphase.data_tools.corpora.merge import merge, remove_corpus
    from megaphase.data_tools.shards import existing_shards

    if shards == bool(prefixes):
        raise InputError("--shards", "it takes the place of the prefixes", "give one of them")
    chosen = existing_shards(out) if shards else prefixes or []
    manifest = merge(
        chosen,
        out,
        drop_duplicates=dedup,
        shuffle_seed=shuffle,
        overwrite=overwrite,
        console=new_console(stderr=True),
    )
    if remove:
        for prefix in chosen:
            if real_path(prefix) != real_path(out):
                remove_corpus(prefix)
    print_corpora({out: manifest})


def split_command(
    prefix: Annotated[Path, typer.Argument(help="The corpus's prefix.")],
    train: Annotated[Path, typer.Option(callback=named, help="Prefix of the larger part.")],
    held_out: Annotated[
        Path, typer.Option(callback=named, help="Prefix of the part that is held out.")
    ],
    fraction: Annotated[
        float, typer.Option(callback=finite, help="Of the documents that is held out.")
    ] = 0.01,
    overwrite: Overwrite = False,
) -> None:
    """Divide a corpus by the documents' hashes, as training does with validation.fraction.

    The same text, of translation pairs the same source, is always on the same side.

    Example: megaphase data split data/en --train data/en-train --held-out data/en-test
    """
    from megaphase.data_tools.corpora.split import split

    parts = split(
        prefix, train, held_out, fraction, overwrite=overwrite, console=new_console(stderr=True)
    )
    print_corpora(dict(zip((train, held_out), parts, strict=True)))


def print_corpora(manifests: dict[Path, Manifest]) -> None:
    """Print the sizes of new corpora, and what was left out of them."""
    from megaphase.corpus.manifest import SKIPPED_SUFFIX

    table = Table()
    table.add_column("corpus", overflow="fold")
    for column in ("documents", "tokens", "bytes of text", "bytes per token"):
        table.add_column(column, justify="right")
    for prefix, manifest in manifests.items():
        table.add_row(
            str(prefix),
            f"{manifest.documents:,}",
            f"{manifest.tokens:,}",
            f"{manifest.text_bytes:,}",
            f"{manifest.text_bytes / max(manifest.tokens, 1):.2f}",
        )
    new_console().print(table)
    for prefix, manifest in manifests.items():
        if manifest.skipped_duplicates:
            typer.echo(f"Left out, duplicates: {manifest.skipped_duplicates:,}")
        if manifest.skipped_wrong:
            typer.echo(f"Skipped, wrong: {manifest.skipped_wrong:,}, see {prefix}{SKIPPED_SUFFIX}")
