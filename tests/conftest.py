"""Settings and fixtures of all tests."""

from __future__ import annotations

import os
import signal

from hypothesis import HealthCheck, settings

# No example is too slow, since the machine may be loaded. A fixture's folder may serve many
# examples.
settings.register_profile(
    "unhurried",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("unhurried")

# A shell makes its background jobs ignore Ctrl-C, which all processes of the tests would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Variables of a terminal, a launcher or a Slurm job around the tests must not reach the commands in
# them: they change the form of output, or make a command one rank of a job.
OF_A_TERMINAL = ("COLUMNS", "LINES", "TERMINAL_WIDTH", "FORCE_COLOR", "NO_COLOR")
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
for name in list(os.environ):
    if name in OF_A_TERMINAL + OF_A_RANK or name.startswith(("SLURM_", "SBATCH_", "SRUN_")):
        del os.environ[name]

# More threads only slow down the small matrices of the tests. torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Leave bytes out of a test's name: all workers must give it the same name, and the bytes may
    contain the time, as those of a gzip file do."""
    return argname if isinstance(val, bytes) else None
