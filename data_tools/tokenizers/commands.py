"""The `megaphase tokenizer ...` commands: they parse options, call the tools, print results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megaphase.data_tools.options import (
    JsonKey,
    Overwrite,
    Separator,
    Template,
    by_language,
    reading_of,
)
from megaphase.utils.arguments import MOST, MOST_SEED, finite, named
from megaphase.utils.errors import InputError
from megaphase.utils.standard_streams import new_console

if TYPE_CHECKING:
    from megaphase.data_tools.text import InputPath
    from megaphase.tokenizer import Fertility, Tokenizer

DEFAULT_TEMPERATURE = 3.3
TAGS_SHOWN = 12

MaxSentences = Annotated[
    int, typer.Option(min=1, max=MOST, help="Maximum number of training lines.")
]
Alpha = Annotated[
    float | None,
    typer.Option(
        callback=finite,
        help="Share of a language with n characters: p ∝ n^alpha (1 / temperature).",
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        min=1.0,
        callback=finite,
        help="Smooths the languages' shares of the text; 1 leaves them unchanged.",
        show_default=str(DEFAULT_TEMPERATURE),
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, max=MOST_SEED, help="Seed for the choice of training lines.")
]

tokenizer_app = typer.Typer(help="Train, inspect and measure tokenizers.", no_args_is_help=True)


class Algorithm(StrEnum):
    """The training algorithms of sentencepiece that can be chosen."""

    unigram = "unigram"
    bpe = "bpe"


class Library(StrEnum):
    """The libraries that train."""

    sentencepiece = "sentencepiece"
    tokenizers = "tokenizers"


@tokenizer_app.command("train")
def train_tokenizer_command(
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input",
            metavar="LANGUAGE=FILE",
            help="Text to train on, a file or a quoted pattern; repeatable.",
        ),
    ],
    vocab_size: Annotated[
        int, typer.Option(min=1, max=MOST, help="Number of token ids, all kinds together.")
    ],
    out: Annotated[Path, typer.Option(callback=named, help="The tokenizer's directory.")],
    library: Annotated[
        Library,
        typer.Option(help="sentencepiece, or tokenizers for a byte-level BPE (tokenizer.json)."),
    ] = Library.sentencepiece,
    model_type: Annotated[
        Algorithm | None,
        typer.Option(help="The algorithm.", show_default="unigram, bpe with tokenizers"),
    ] = None,
    json_key: JsonKey = "text",
    template: Template = None,
    separator: Separator = None,
    tag: Annotated[
        list[str], typer.Option(help="A task tag, such as a target language; repeatable.")
    ] = [],  # noqa: B006
    reserved_tags: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="Number of spare tags.")
    ] = 16,
    user_symbol: Annotated[
        list[str],
        typer.Option(help="Text that gets its own token and is never split; repeatable."),
    ] = [],  # noqa: B006
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Add the control tokens `<system>`, `<user>`, `<assistant>` and `<end>`, and a "
            "chat template for them; with --library tokenizers.",
        ),
    ] = False,
    split_digits: Annotated[
        bool, typer.Option("--split-digits/--no-split-digits", help="Make every digit a token.")
    ] = True,
    max_sentences: MaxSentences = 2_000_000,
    alpha: Alpha = None,
    temperature: Temperature = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Train a tokenizer on several languages.

    Files may be .jsonl or .txt, also .gz or .zst, or .parquet; a language may have several. To
    train on both sides of translation pairs, use --template "{src}\\n{tgt}".

    Example: megaphase tokenizer train --input en=en.jsonl.gz --input hi=hi.jsonl.gz
    --vocab-size 16000 --out tok/
    """
    from megaphase.data_tools.text import check_options
    from megaphase.data_tools.text.reading import unescape
    from megaphase.data_tools.tokenizers.train import train_tokenizer

    reading = reading_of(json_key, template, separator)
    files = _files_by_language(inputs)
    check_options(chain(*files.values()), reading)
    record = train_tokenizer(
        files,
        out,
        vocab_size=vocab_size,
        library=library.value,
        model_type=None if model_type is None else model_type.value,
        reading=reading,
        tags=tag,
        reserved_tags=reserved_tags,
        user_symbols=[unescape(symbol) for symbol in user_symbol],
        chat=chat,
        split_digits=split_digits,
        max_sentences=max_sentences,
        temperature=_temperature(alpha, temperature),
        seed=seed,
        overwrite=overwrite,
        console=new_console(stderr=True),
    )
    console = new_console()
    _print_fertility(console, record.languages)
    console.print(f"{record.vocab_size:,} tokens in {out}", soft_wrap=True, highlight=False)


@tokenizer_app.command("extend")
def extend_tokenizer_command(
    base: Annotated[
        Path,
        typer.Argument(help="A tokenizer directory, .model file or Hugging Face directory."),
    ],
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input",
            metavar="LANGUAGE=FILE",
            help="Text of a new language, a file or a quoted pattern; repeatable.",
        ),
    ],
    add: Annotated[int, typer.Option(min=1, max=MOST, help="Number of new tokens.")],
    out: Annotated[Path, typer.Option(callback=named, help="The new tokenizer's directory.")],
    check: Annotated[
        list[str],
        typer.Option(
            metavar="LANGUAGE=FILE",
            help="Text of another language, to compare its encoding only; repeatable.",
        ),
    ] = [],  # noqa: B006
    json_key: JsonKey = "text",
    template: Template = None,
    separator: Separator = None,
    max_sentences: MaxSentences = 2_000_000,
    alpha: Alpha = None,
    temperature: Temperature = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Extend a tokenizer by tokens of new languages; all its ids stay what they are.

    Text in whose encoding no new token occurs is encoded as before; the table says how much of each
    language's is. `megaphase convert extend-vocab` gives a model the new tokens.

    Example: megaphase tokenizer extend Llama-3.1-8B/ --input gl=gl.jsonl.gz --check en=en.jsonl.gz
    --add 4000 --out tok/
    """
    from megaphase.data_tools.text import check_options
    from megaphase.data_tools.tokenizers.compare import comparison_table
    from megaphase.data_tools.tokenizers.extend import extend_tokenizer

    reading = reading_of(json_key, template, separator)
    files, checks = _files_by_language(inputs), _files_by_language(check, "--check")
    check_options(chain(*files.values(), *checks.values()), reading)
    record, languages = extend_tokenizer(
        base,
        files,
        out,
        add=add,
        checks=checks,
        reading=reading,
        max_sentences=max_sentences,
        temperature=_temperature(alpha, temperature),
        seed=seed,
        overwrite=overwrite,
        console=new_console(stderr=True),
    )
    console = new_console()
    console.print(comparison_table(languages))
    texts = sum(it.texts for it in languages.values())
    unexplained = sum(it.unexplained for it in languages.values())
    without = unexplained + sum(it.same_texts for it in languages.values())
    if unexplained:
        result = f"{unexplained:,} of the {without:,} texts without a new token are not"
    else:
        result = f"All {without:,} texts without a new token are"
    first = record.vocab_size - add
    for line in (
        f"{result} encoded as before; {texts:,} texts compared",
        f"{record.vocab_size:,} tokens in {out}, new from id {first:,} on",
    ):
        console.print(line, soft_wrap=True, highlight=False)


@tokenizer_app.command("inspect")
def inspect_tokenizer_command(
    path: Annotated[
        Path, typer.Argument(help="A tokenizer directory, .model file or Hugging Face directory.")
    ],
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input",
            metavar="LANGUAGE=FILE",
            help="Text to measure it on: 10,000 lines of each language; repeatable.",
        ),
    ] = [],  # noqa: B006
    json_key: JsonKey = "text",
    template: Template = None,
    separator: Separator = None,
) -> None:
    """Show a tokenizer's properties, and how well it serves each language.

    Example: megaphase tokenizer inspect tok/ --input en=en.jsonl.gz --input hi=hi.jsonl.gz
    """
    from megaphase.data_tools.text import check_options
    from megaphase.data_tools.tokenizers.fertility import measure_fertility
    from megaphase.data_tools.tokenizers.sample import first_sentences
    from megaphase.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(path)
    reading = reading_of(json_key, template, separator)
    files = _files_by_language(inputs)
    check_options(chain(*files.values()), reading)
    measured = {
        language: measure_fertility(
            tokenizer, first_sentences(language, of_language, reading), held_out=False
        )
        for language, of_language in files.items()
    }
    console = new_console()
    console.print(_tokenizer_table(tokenizer))
    if measured or tokenizer.record.languages:
        record = tokenizer.record
        _print_fertility(
            console,
            measured or record.languages,
            given=bool(measured),
            trained_here=bool(record.languages) and record.extends is None,
        )


def _files_by_language(inputs: list[str], option: str = "--input") -> dict[str, list[InputPath]]:
    """Group the files of an option's `LANGUAGE=FILE` arguments by language."""
    from megaphase.data_tools.text import expand_inputs

    named = by_language(inputs, option)
    return {language: expand_inputs(names) for language, names in named.items()}


def _temperature(alpha: float | None, temperature: float | None) -> float:
    if alpha is None:
        return DEFAULT_TEMPERATURE if temperature is None else temperature
    if temperature is not None:
        raise InputError("--alpha", "cannot be combined with --temperature", "give one of them")
    if not 0 <= alpha <= 1:
        raise InputError(
            "--alpha", f"{alpha} is not between 0 and 1", "1 leaves the shares unchanged"
        )
    return 1 / alpha if alpha else math.inf


def _print_fertility(
    console: Console,
    languages: Mapping[str, Fertility],
    *,
    given: bool = False,
    trained_here: bool = True,
) -> None:
    from megaphase.data_tools.tokenizers.fertility import badly_served, fertility_table

    console.print(fertility_table(languages, given_text=given))
    if names := badly_served(languages):
        remedy = (
            "More of its text, a smaller --alpha or a larger --vocab-size helps."
            if trained_here
            else "`megaphase tokenizer extend` adds tokens for a language."
        )
        line = f"Badly served: {', '.join(names)}. {remedy}"
        console.print(line, soft_wrap=True, highlight=False)


def _chats(tokenizer: Tokenizer) -> str:
    from megaphase.chats.encoder import ChatEncoder

    chats = ChatEncoder.find(tokenizer) if tokenizer.path.is_dir() else None
    if chats is None:
        return "no chat template"
    end = "" if chats.turn_end is None else f"{tokenizer.piece(chats.turn_end)} ({chats.turn_end})"
    said = [f"{chats.template.source.name}; {end or 'no token'} ends a turn", *chats.remarks()]
    return ". ".join(said)


def _tokenizer_table(tokenizer: Tokenizer) -> Table:
    table = Table(show_header=False)
    record = tokenizer.record
    bos = "none" if record.bos is None else f"{tokenizer.piece(record.bos)} ({record.bos})"
    table.add_column("what")
    table.add_column("value", overflow="fold")
    tags = [f"{name} ({token})" for name, token in tokenizer.tags.items()]
    more = [f"and {len(tags) - TAGS_SHOWN:,} more"] if len(tags) > TAGS_SHOWN else []
    for what, value in (
        ("tokenizer", str(tokenizer.path)),
        ("library", " ".join(filter(None, (record.library, record.library_version)))),
        ("algorithm", record.algorithm),
        ("vocabulary", f"{tokenizer.vocab_size:,}"),
        ("end of document", f"{tokenizer.piece(tokenizer.eod)} ({tokenizer.eod})"),
        ("begin of document", f"{bos}{', of every document' if record.adds_bos else ''}"),
        ("changes of the text", ", ".join(record.normalization) or "none"),
        ("not used of its files", ", ".join(record.left_out) or "nothing"),
        ("tags", ", ".join([*tags[:TAGS_SHOWN], *more]) or "none"),
        ("reserved tags", f"{len(tokenizer.reserved_tags)}"),
        ("conversations", _chats(tokenizer)),
        ("byte fallback", "yes" if tokenizer.byte_fallback else "no"),
        ("fingerprint", tokenizer.fingerprint),
    ):
        table.add_row(what, Text(value))
    return table
