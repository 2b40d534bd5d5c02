"""`megaphase convert ...`; the commands import what they need, so that `--help` stays fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

convert_app = typer.Typer(
    help="Write checkpoints for other layouts and other programs, and read theirs.",
    no_args_is_help=True,
)

Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CKPT",
        help="RUN@NAME (a phase's name for its end, latest, best-hi, step-00001000), or a path.",
    ),
]
Out = Annotated[Path, typer.Option(help="The new folder; it must not exist.", metavar="DIR")]
Workers = Annotated[int, typer.Option(min=1, help="Threads that read, and that write.")]
DEFAULT_WORKERS = 4


@convert_app.command("reshape")
def reshape_command(
    checkpoint: Checkpoint,
    out: Out,
    tensor: Annotated[int | None, typer.Option(min=1, help="Tensor-parallel size.")] = None,
    data: Annotated[int | None, typer.Option(min=1, help="Data-parallel size.")] = None,
    zero: Annotated[
        int | None, typer.Option(min=0, max=3, help="ZeRO stage; 3 if left out.")
    ] = None,
    portable: Annotated[
        bool, typer.Option("--portable", help="A file for every parameter, of any layout.")
    ] = False,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="fp32 weights without optimizer state.")
    ] = False,
    workers: Workers = DEFAULT_WORKERS,
) -> None:
    """Write a checkpoint for another layout.

    Training goes on from any checkpoint on any layout without this; it spares every rank the
    reading of other ranks' files, and `--portable` makes them readable by other programs.

    Example: megaphase convert reshape runs/a@pretrain --tensor 4 --data 8 --out reshaped/
    """
    from rich.console import Console

    from megaphase.convert.partition import Layout
    from megaphase.convert.reshape import reshape
    from megaphase.errors import InputError

    if portable == (tensor is not None or data is not None or zero is not None):
        problem = (
            "excludes --tensor, --data and --zero" if portable else "is not given, nor a layout"
        )
        raise InputError("--portable", problem, "give --tensor and --data, or --portable alone")
    layout = None if portable else Layout(tensor or 1, data or 1, 3 if zero is None else zero)
    reshape(
        checkpoint,
        out,
        layout,
        weights_only=weights_only,
        workers=workers,
        console=Console(stderr=True, highlight=False),
    )
    print(f"Checkpoint: {out}")
