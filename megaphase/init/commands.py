"""The `megaphase init` command; imports are inside the functions to keep `--help` fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megaphase.utils.arguments import finite, named


def init_command(
    out: Annotated[
        Path, typer.Argument(metavar="RUN_FILE", callback=named, help="The run file to write.")
    ] = Path("run.yaml"),
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PREFIX",
            help="A corpus: the prefix that `data tokenize --out` was given, or NAME=PREFIX, or a "
            "glob in quotes; give it once for each.",
        ),
    ] = None,
    low: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK",
            help="A low-resource task; with --checkpoint, one that is new to the model; auto for "
            "those with few tokens, or none.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|SIZE",
            help="A preset such as gpt-1.3b, a number of parameters such as 500m, or auto.",
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="In place of --model: a published model, as `convert from-hf` wrote it or as it "
            "was downloaded.",
        ),
    ] = None,
    card: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The GPU, such as h100-sxm or a100-80gb; or cpu."),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, max=1 << 16, help="Number of GPUs; not with cpu.")
    ] = None,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(min=1, max=1 << 10, help="GPUs of a node; 8 by default, or all if fewer."),
    ] = None,
    hours: Annotated[
        float | None,
        typer.Option(min=1e-3, max=1e6, callback=finite, help="Hours that the run may take."),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="The tokenizer of the corpora; looked for near them by default."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            callback=named, help="The run directory; by default runs/NAME beside the run file."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace RUN_FILE if it exists.")] = False,
) -> None:
    """Write a commented run file for corpora, a model, GPUs and hours, and explain each choice.

    On a terminal it asks for what is not given. Phases are the paper's: high-resource tasks first,
    then, from fresh optimizer state, all tasks with the low-resource ones raised; or the joint
    phase alone for a published model. The layout fits the GPUs' memory.

    Example: megaphase init run.yaml --corpus "data/*" --low auto --model auto --card h100-sxm
    --gpus 8 --hours 24

    Example: megaphase init run.yaml --corpus "data/*" --low auto --model auto --card cpu --hours 1
    """
    from megaphase.init.questions import Options
    from megaphase.init.write import write_run_file

    options = Options(
        out,
        corpus or [],
        low or [],
        model,
        checkpoint,
        card,
        gpus,
        gpus_per_node,
        hours,
        tokenizer,
    )
    write_run_file(options, output, force=force)
