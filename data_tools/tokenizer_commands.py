"""`megaphase tokenizer ...`: parse, call, print."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from megaphase.data_tools.options import JsonKey, Overwrite
from megaphase.errors import InputError

if TYPE_CHECKING:
    from megaphase.tokenizer import TokenizerRecord

tokenizer_app = typer.Typer(help="Train a tokenizer.", no_args_is_help=True)


class Algorithm(StrEnum):
    """sentencepiece's algorithms that this project offers."""

    unigram = "unigram"
    bpe = "bpe"


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
    from megaphase.data_tools.text import Reading
    from megaphase.data_tools.train_tokenizer import train_tokenizer

    record = train_tokenizer(
        _by_language(inputs),
        out,
        vocab_size=vocab_size,
        model_type=model_type.value,
        reading=Reading(json_key),
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
