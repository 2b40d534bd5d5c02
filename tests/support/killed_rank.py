"""A rank of a small "training" that never ends, started by a launcher."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from pathlib import Path

OUTLOOK = "The same command resumes from step-00000002"


def main(folder: Path, rank: str) -> None:
    # As in the program: the signals blocked by its launcher are received from here on.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    (folder / f"starting-{rank}").write_text(str(os.getpid()))

    import torch
    import torch.distributed as dist

    from megaphase.distributed.all_ranks import leaving_processes, process_group
    from megaphase.fault_tolerance.stop_signals import StopSignals
    from megaphase.fault_tolerance.watchdog import Watchdog

    with (
        StopSignals() as signals,
        leaving_processes(),
        process_group(),
        Watchdog(2.0, 600.0) as watchdog,
    ):
        watchdog.resume_point = OUTLOOK
        signals.begin_training(lambda: "")
        for step in itertools.count():
            watchdog.at(f"in step {step}")
            # Half of the errors of a broken connection are raised by torch's own files.
            if step % 2:
                dist.all_reduce(torch.ones(4))
            else:
                dist.all_reduce(torch.ones(4), async_op=True).wait()
            if step == 2:
                (folder / f"training-{rank}").write_text(str(os.getpid()))
            time.sleep(0.001)


if __name__ == "__main__":
    main(Path(sys.argv[1]), os.environ["RANK"])
