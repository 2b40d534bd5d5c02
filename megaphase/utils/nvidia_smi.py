"""What NVIDIA's driver says, without torch."""

from __future__ import annotations

import shutil
import subprocess

ANSWER_SECONDS = 15  # a driver that hangs does not answer at all


def query_gpus(field: str) -> list[str]:
    """Return a field of `nvidia-smi --query-gpu` for each GPU of this machine.

    Empty if there is no nvidia-smi, or the driver does not answer.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        asked = subprocess.run(
            ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
        )
    except (subprocess.TimeoutExpired, OSError):
        return []
    return [] if asked.returncode else [line.strip() for line in asked.stdout.splitlines()]
