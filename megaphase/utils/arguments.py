"""Command-line arguments that several commands take."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

# The largest values of numbers on the command line: of what is counted, of processes and threads
# on a machine, and of seeds.
MOST = 2**31 - 1
MOST_PROCESSES = 4096
MOST_SEED = 2**63 - 1


def finite(value: float | None) -> float | None:
    """The callback of every option that is a float: NaN passes all bounds, and infinity many.

    Raises typer.BadParameter, which ends the command with exit code 2.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def named(path: Path | None) -> Path | None:
    """The callback of every option that says where an output goes: "", . and / name nothing new.

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

Source = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="RUN@NAME",
        help="Begin with another run's checkpoint: runs/base@pretrain (the end of that phase), "
        "@best-hi, @latest, @step-00001000, or a path; the run file holds what follows.",
    ),
]

Profile = Annotated[
    bool,
    typer.Option(
        "--profile",
        help="Trace a few steps with torch's profiler, print where their time went, and train on; "
        "see docs/profiling.md.",
    ),
]
ProfileSteps = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST,
        metavar="N",
        help="How many, after two that warm up; implies --profile. [default: 3]",
    ),
]


def train_options(source: str | None, profile: bool, profile_steps: int | None) -> list[str]:
    """The options above as a command line has them, for a `megaphase train` that is started."""
    options = [] if source is None else ["--from", source]
    options += ["--profile"] if profile else []
    options += [] if profile_steps is None else ["--profile-steps", str(profile_steps)]
    return options


Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CKPT",
        help="RUN@NAME (a phase's name for its end, latest, best-hi, step-00001000), or a path.",
    ),
]
