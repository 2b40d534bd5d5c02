"""`megaphase tokenizer ...` and `megaphase data ...`: parse, call, print."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from megaphase.errors import InputError

if TYPE_CHECKING:
    from megaphase.corpus import Manifest
    from megaphase.tokenizer import TokenizerRecord

tokenizer_app = typer.Typer(help="Train a tokenizer.", no_args_is_help=True)
data_app = typer.Typer(
    help="Turn text into tokenized corpora; look at, check and join them.", no_args_is_help=True
)


class Algorithm(StrEnum):
    """sentencepiece's algorithms that this project offers."""

    unigram = "unigram"
    bpe = "bpe"


class OnError(StrEnum):
    """What to do at a document that cannot be read."""

    stop = "stop"
    skip = "skip"


JsonKey = Annotated[str, typer.Option(help="The key of each JSON object that holds the text.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what --out names.")]


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@tokenizer_app.callback()
def _tokenizer() -> None:
    # With a callback the only command keeps its name: `tokenizer train`.
    pass


@tokenizer_app.command("train")
def train(
    inputs: Annotated[
        list[str],
        typer.Option("--input", metavar="LANGUAGE=FILE", help="Text to train on; repeatable."),
    ],
    vocab_size: Annotated[int, typer.Option(help="Number of token ids, all kinds together.")],
    out: Annotated[Path, typer.Option(help="The tokenizer's directory.")],
    model_type: Annotated[Algorithm, typer.Option(help="The algorithm.")] = Algorithm.unigram,
    json_key: JsonKey = "text",
    tag: Annotated[
        list[str], typer.Option(help="A task tag, for example a target language; repeatable.")
    ] = [],  # noqa: B006
    reserved_tags: Annotated[int, typer.Option(help="Tags to keep room for.")] = 16,
    max_sentences: Annotated[int, typer.Option(help="Most lines to train on.")] = 2_000_000,
    temperature: Annotated[
        float, typer.Option(help="Smooths the languages' shares of the text; 1 does not.")
    ] = 3.3,
    seed: Annotated[int, typer.Option(help="Chooses the lines to train on.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Train a sentencepiece tokenizer on several languages.

    Files may be .jsonl or .txt, also .gz or .zst; a language may have several.

    Example: megaphase tokenizer train --input en=en.jsonl.gz --input hi=hi.jsonl.gz
    --vocab-size 16000 --out tok/
    """
    from megaphase.data_tools.train_tokenizer import train_tokenizer

    record = train_tokenizer(
        _by_language(inputs),
        out,
        vocab_size=vocab_size,
        model_type=model_type.value,
        json_key=json_key,
        tags=tag,
        reserved_tags=reserved_tags,
        max_sentences=max_sentences,
        temperature=temperature,
        seed=seed,
        overwrite=overwrite,
        console=Console(stderr=True),
    )
    console = Console()
    console.print(_tokenizer_table(record))
    console.print(f"{record.vocab_size:,} tokens in {out}", soft_wrap=True, highlight=False)


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


def _by_language(inputs: list[str]) -> dict[str, list[Path]]:
    """The files of each language, from `LANGUAGE=FILE` arguments."""
    files: dict[str, list[Path]] = {}
    for text in inputs:
        language, equals, file = text.partition("=")
        if not (language and equals and file):
            raise InputError("--input", f"{text!r} is not LANGUAGE=FILE", "write en=en.jsonl.gz")
        files.setdefault(language, []).append(Path(file))
    return files


def _tokenizer_table(record: TokenizerRecord) -> Table:
    table = Table(title="How the vocabulary serves each language", title_justify="left")
    table.add_column("language")
    for column in ("bytes per token", "tokens per word", "measured on"):
        table.add_column(column, justify="right")
    for language, fertility in record.languages.items():
        kind = "held-out text" if fertility.held_out else "training text"
        table.add_row(
            language,
            f"{fertility.bytes_per_token:.2f}",
            f"{fertility.tokens_per_word:.2f}",
            f"{fertility.sample_bytes / 1000:,.0f} kB of {kind}",
        )
    return table


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
