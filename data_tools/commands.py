"""The `megaphase data ...` commands: they parse options, call the tools and print results."""

from __future__ import annotations

import os
from collections.abc import Collection
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megaphase.data_tools.corpora import commands as corpora
from megaphase.data_tools.options import (
    Dedup,
    JsonKey,
    Overwrite,
    Separator,
    Shuffle,
    Template,
    Workers,
    reading_of,
)
from megaphase.utils.arguments import named
from megaphase.utils.cores import available_cores
from megaphase.utils.errors import InputError
from megaphase.utils.remote_files import is_url
from megaphase.utils.standard_streams import new_console

if TYPE_CHECKING:
    from megaphase.data_tools.tokenization.slurm import ArrayOfShards

data_app = typer.Typer(
    help="Turn text into tokenized corpora; inspect, verify, merge and split them.",
    no_args_is_help=True,
)

_PAIRS = "Translation pairs"
_CHATS = "Conversations"
_MACHINES = "Several machines"
_SLURM_OPTIONS = {"inputs", "slurm", "tasks", "sbatch", "dry_run", "shard"}
# Options that need the whole corpus: a shard does not see the other shards' documents.
_MERGE_ONLY_OPTIONS = {"dedup", "shuffle"}
_MERGE_OPTIONS = {*_MERGE_ONLY_OPTIONS, "out", "overwrite"}


class OnError(StrEnum):
    """What to do with a document that cannot be read."""

    stop = "stop"
    skip = "skip"


class StdinKind(StrEnum):
    """The formats accepted on standard input."""

    jsonl = "jsonl"
    txt = "txt"


@data_app.command("tokenize")
def tokenize_command(
    context: typer.Context,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE", help='Text files in order, also as "*" patterns and URLs; or -.'
        ),
    ],
    tokenizer: Annotated[Path, typer.Option(help="The tokenizer's directory, or a .model file.")],
    out: Annotated[
        Path, typer.Option(callback=named, help="Prefix of the corpus: PREFIX.bin, PREFIX.idx ...")
    ],
    workers: Workers = None,
    json_key: JsonKey = "text",
    template: Template = None,
    separator: Separator = None,
    source_key: Annotated[
        str | None, typer.Option(help="The key of the source.", rich_help_panel=_PAIRS)
    ] = None,
    target_key: Annotated[
        str | None, typer.Option(help="The key of the target.", rich_help_panel=_PAIRS)
    ] = None,
    tag: Annotated[
        str | None,
        typer.Option(
            help="The tokenizer's tag to put between source and target.", rich_help_panel=_PAIRS
        ),
    ] = None,
    messages_key: Annotated[
        str | None,
        typer.Option(
            help='The key of the messages, [{"role": ..., "content": ...}, ...]: documents are '
            "then conversations, rendered by the tokenizer's chat template.",
            rich_help_panel=_CHATS,
        ),
    ] = None,
    stdin_kind: Annotated[StdinKind, typer.Option(help="What - holds.")] = StdinKind.jsonl,
    on_error: Annotated[
        OnError,
        typer.Option(help="At a document that cannot be read: stop, or skip it and say so."),
    ] = OnError.stop,
    dedup: Dedup = False,
    shuffle: Shuffle = None,
    overwrite: Overwrite = False,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Tokenize the Ith of N parts, from 0; then merge them.",
            rich_help_panel=_MACHINES,
        ),
    ] = None,
    slurm: Annotated[
        bool,
        typer.Option(
            "--slurm",
            help="Submit a SLURM job array over shards, and the merge that waits for it.",
            rich_help_panel=_MACHINES,
        ),
    ] = False,
    tasks: Annotated[
        int | None,
        typer.Option(help="How many shards; with --slurm.", rich_help_panel=_MACHINES),
    ] = None,
    sbatch: Annotated[
        str,
        typer.Option(
            help='Options of sbatch, such as "--partition=cpu"; with --slurm.',
            rich_help_panel=_MACHINES,
        ),
    ] = "",
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the scripts; with --slurm.", rich_help_panel=_MACHINES
        ),
    ] = False,
) -> None:
    """Tokenize text into a corpus in Megatron-LM's format.

    A document is a line of a .jsonl file, a row of a .parquet or .arrow file or of a folder that
    Hugging Face datasets saved, or a block of lines between blank lines in a .txt file; .jsonl and
    .txt files may be compressed (.gz, .zst). FILE may be a URL (s3://, gs://, hf://). With
    --source-key, --target-key and --tag, documents are translation pairs; with --messages-key they
    are conversations. Documents left out by
    --on-error skip are listed in PREFIX.skipped.jsonl. If the command is killed, run it again to
    resume.

    Example: megaphase data tokenize "en/*.jsonl.gz" --tokenizer tok/ --out data/en
    """
    from megaphase.corpus.writer import refuse_existing, refuse_own_input
    from megaphase.data_tools.shards import MOST_SHARDS, WHOLE, ShardChoice, refuse_other_shards
    from megaphase.data_tools.text import STDIN, check_options, expand_inputs
    from megaphase.data_tools.tokenization.tokenize import check_tokenization, tokenize

    reading = reading_of(
        json_key,
        template,
        separator,
        source_key=source_key,
        target_key=target_key,
        messages_key=messages_key,
        stdin_kind=stdin_kind.value,
    )
    files = expand_inputs(inputs)
    if stdin_kind is not StdinKind.jsonl and STDIN not in files:
        raise InputError("--stdin-kind", "there is no - among the files", "leave it out")
    check_options(files, reading)
    if slurm:
        if shard is not None:
            raise InputError("--shard", "--slurm chooses the shards itself", "leave one out")
        if tasks is None:
            raise InputError("--tasks", "--slurm needs to know how many shards", "add --tasks 16")
        if not 2 <= tasks <= MOST_SHARDS:
            remedy = f"give 2 to {MOST_SHARDS:,}"
            raise InputError("--tasks", f"{tasks} is not a number of shards", remedy)
        check_tokenization(files, tokenizer, reading, tag, ShardChoice(tasks - 1, tasks))
        refuse_own_input(out, files)
        if not overwrite:
            refuse_existing(out)
        refuse_other_shards(out, tasks)
        _submit(_array_of_shards(context.params), dry_run)
        return
    for option, given in (("--tasks", tasks), ("--sbatch", sbatch), ("--dry-run", dry_run)):
        if given:
            raise InputError(option, "means nothing without --slurm", "add that or leave it out")
    part = WHOLE if shard is None else ShardChoice.parse(shard)
    manifest = tokenize(
        files,
        tokenizer,
        out,
        reading=reading,
        tag=tag,
        workers=available_cores() if workers is None else workers,
        shard=part,
        drop_duplicates=dedup,
        shuffle_seed=shuffle,
        skip_wrong=on_error is OnError.skip,
        overwrite=overwrite,
        console=new_console(stderr=True),
    )
    corpora.print_corpora({part.prefix(out): manifest})


def _array_of_shards(options: dict[str, Any]) -> ArrayOfShards:
    """The jobs that do what this command was asked for."""
    from megaphase.data_tools.tokenization.slurm import NOT_FOR_SBATCH, ArrayOfShards
    from megaphase.utils.slurm import sbatch_options

    places = {"tokenizer": options["tokenizer"].absolute(), "out": options["out"].absolute()}
    files = [name if is_url(name) else os.path.abspath(name) for name in options["inputs"]]
    merge_arguments = _as_arguments(options | places, _MERGE_OPTIONS)
    names = options.keys() - _MERGE_ONLY_OPTIONS - _SLURM_OPTIONS
    shard_arguments = _as_arguments(options | places, names)
    return ArrayOfShards(
        out=options["out"],
        tasks=options["tasks"],
        tokenize=[*files, *shard_arguments],
        merge=merge_arguments,
        cores=options["workers"],
        options=sbatch_options(options["sbatch"], NOT_FOR_SBATCH),
    )


def _as_arguments(options: dict[str, Any], names: Collection[str]) -> list[str]:
    """Return the named options as command-line arguments, without those that are not set."""
    arguments = []
    for name, value in options.items():
        if name in names and value is not None and value is not False:
            arguments.append(f"--{name.replace('_', '-')}")
            arguments += [] if value is True else [str(value)]
    return arguments


def _submit(array: ArrayOfShards, dry_run: bool) -> None:
    if dry_run:
        typer.echo(f"{array.array_script}\n{array.merge_script}", nl=False)
        return
    submitted = array.submit()
    typer.echo(
        f"Submitted: array {submitted.array} of {array.tasks} shards, merge {submitted.merge}"
    )
    typer.echo(f"Output: {submitted.logs}")
    typer.echo(f"Follow: squeue --jobs {submitted.array},{submitted.merge}")


data_app.command("from-megatron")(corpora.corpus_from_megatron_command)
data_app.command("inspect")(corpora.inspect_corpus_command)
data_app.command("stats")(corpora.stats_command)
data_app.command("verify")(corpora.verify_command)
data_app.command("merge")(corpora.merge_command)
data_app.command("split")(corpora.split_command)
