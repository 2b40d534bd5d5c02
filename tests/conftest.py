"""What all tests need."""

from __future__ import annotations

import os
import signal

from hypothesis import HealthCheck, settings

# A machine may have much else to do: no example is too slow. A fixture's folder may serve many.
settings.register_profile(
    "unhurried",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("unhurried")

# A shell lets what it starts in the background ignore Ctrl-C, and so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What a terminal, a launcher or a Slurm job has set around the tests is not meant for the commands
# in them: it changes the form of output, or makes a command one rank of a job.
OF_A_TERMINAL = ("COLUMNS", "LINES", "TERMINAL_WIDTH", "FORCE_COLOR", "NO_COLOR")
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
for name in list(os.environ):
    if name in OF_A_TERMINAL + OF_A_RANK or name.startswith(("SLURM_", "SBATCH_", "SRUN_")):
        del os.environ[name]

# Threads only get in each other's way where matrices are as small as in the tests. torch reads this
# when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are no part of a test's name: all workers must give it the same, and they may hold the
    time, as those of a gzip file do."""
    return argname if isinstance(val, bytes) else None
