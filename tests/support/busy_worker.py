"""A worker's function for tests that end the main process while its workers are busy."""

import os
import time
from pathlib import Path


def be_busy(folder: str) -> None:
    """Write the process's number into the folder, and then do nothing for long."""
    Path(folder, str(os.getpid())).touch()
    time.sleep(1000)
