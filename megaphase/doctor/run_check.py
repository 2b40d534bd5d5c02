"""A check in a process of its own: `python -m megaphase.doctor.run_check FUNCTION DIRECTORY GPU`.

It prints its findings as JSON. What libraries write goes to standard error, also what they write
past Python.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from megaphase.doctor.finding import Finding, Settings, fault, first_line

MODULE, FUNCTION = "megaphase.doctor.checks", "check_"


def findings_of(function: str, settings: Settings) -> list[Finding]:
    """Run a check, named as `system.slurm`; what it raises is a fault of the machine."""
    # Only the module of this check is imported, since others import torch.
    module, _, name = function.partition(".")
    check: Callable[[Settings], Iterator[Finding]] = getattr(
        importlib.import_module(f"{MODULE}.{module}"), FUNCTION + name
    )
    found: list[Finding] = []
    try:
        found.extend(check(settings))
    except Exception as error:
        reason = first_line(error) or type(error).__name__
        found.append(fault(f"the check failed ({type(error).__name__}: {reason})", "see the error"))
    return found


def main(function: str, directory: str, gpu: str) -> None:
    """Print the findings of a check."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that files are removed
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    found = findings_of(function, Settings(Path(directory), gpu == "gpu"))
    with answer:
        json.dump([asdict(each) for each in found], answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
