"""A part's own process: imports, the wait for its turn, and results that are written at once."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from gpu_parts.catalogue import PARTS
from megaphase.training.deepspeed_import import import_deepspeed
from megaphase.utils.process_lifetime import end_with_parent


class Results:
    """What a part has found so far; the file of it is whole at every moment.

    folder: of this measurement, removed at its end. rehearse: whether sizes are tiny.
    """

    def __init__(self, part: str, folder: Path, rehearse: bool) -> None:
        self.folder, self.rehearse = folder, rehearse
        self._path = folder / f"{part}.json"
        self.values: dict[str, Any] = {}

    def record(self, name: str, value: Any) -> None:
        self.values[name] = value
        aside = self._path.with_suffix(".tmp")
        aside.write_text(json.dumps(self.values, default=float))
        os.replace(aside, self._path)

    def expect(self, holds: bool, sentence: str) -> None:
        """Record that something which must hold does not; the other checks follow all the same."""
        if not holds:
            self.record("wrong", [*self.values.get("wrong", []), sentence])


def serve(name: str, folder: Path, rehearse: bool) -> int:
    """Import the part, wait until it may begin, and run it."""
    end_with_parent()
    part = next(each for each in PARTS if each.name == name)
    function = getattr(importlib.import_module(f"gpu_parts.{part.module}"), name)
    import_deepspeed()
    if sys.stdin.readline().strip() != "begin":
        return 1  # the measurement has ended before
    function(Results(name, folder, rehearse))
    return 0
