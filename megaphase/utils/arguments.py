"""Command-line arguments shared by several commands."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

# Upper limits of numbers on the command line: of counts, of processes and threads on a machine,
# and of seeds.
MOST = 2**31 - 1
MOST_PROCESSES = 4096
MOST_SEED = 2**63 - 1


def finite(value: float | None) -> float | None:
    """Callback for every float option: reject NaN, which passes all bounds, and infinity.

    Raises typer.BadParameter, which ends the command with exit code 2.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def named(path: Path | None) -> Path | None:
    """Callback for every option with an output path: reject "", . and /, which name nothing new.

    Raises typer.BadParameter, which ends the command with exit code 2.
    """
    if path is not None and not path.name:
        raise typer.BadParameter(f"'{path}' has no name of its own.")
    return path


RunFile = Annotated[Path, typer.Argument(metavar="RUN_FILE", help="The run file (YAML).")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY.PATH=VALUE", help="Values that replace the run file's."),
]

Processes = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST,
        help="Number of GPUs; by default WORLD_SIZE, else the fewest of the layout.",
    ),
]

Source = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="RUN@NAME",
        help="Start from another run's checkpoint: runs/base@pretrain (the end of that phase), "
        "@best-hi, @latest, @step-00001000, or a path; RUN may be a URL (s3://…). The run file "
        "then describes what follows.",
    ),
]

Profile = Annotated[
    bool,
    typer.Option(
        "--profile",
        help="Trace a few steps with torch's profiler, print where the time went, and continue "
        "training; see docs/profiling.md.",
    ),
]
ProfileSteps = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST,
        metavar="N",
        help="Number of traced steps, after two warm-up steps; implies --profile. [default: 3]",
    ),
]


def train_options(source: str | None, profile: bool, profile_steps: int | None) -> list[str]:
    """Return these options as arguments for starting a `megaphase train` command."""
    options = [] if source is None else ["--from", source]
    options += ["--profile"] if profile else []
    options += [] if profile_steps is None else ["--profile-steps", str(profile_steps)]
    return options


Average = Annotated[
    bool,
    typer.Option(
        "--average", help="Take the average that the checkpoint holds instead of its weights."
    ),
]

Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CKPT",
        help="RUN@NAME (a phase's name for its end, latest, best-hi, step-00001000), or a path.",
    ),
]
