"""The entry point of `megaphase` and `python -m megaphase`.

Signals are handled before any slow import. Until the command has started, a signal ends the program
at once.
"""

from __future__ import annotations

import gc
import os
import signal

from megaphase.utils.errors import EXIT_INTERRUPTED, EXIT_REQUEUE

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def main() -> None:
    """Run the command line."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end_at_once)
    # A launcher starts its processes with these signals blocked, so that none arrives earlier.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        from megaphase.cli import main as run

        run()
    finally:
        # The exit code is decided, and Python's own shutdown takes a while.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        gc.freeze()  # or all objects of all packages are looked through once more


def _end_at_once(number: int, _frame: object) -> None:
    interrupted = number == signal.SIGINT
    if os.environ.get("RANK", "0") == "0":
        name = "Ctrl-C" if interrupted else signal.Signals(number).name
        line = f"megaphase: {name} came before anything had begun; nothing is lost"
        reports = os.environ.get("MEGAPHASE_REPORTS")  # see distributed/dist_env.py
        report = line if reports is None else f'{{"rank": null, "lines": ["{line}"]}}'
        os.write(2 if reports is None else int(reports), f"{report}\n".encode())
    os._exit(EXIT_INTERRUPTED if interrupted else EXIT_REQUEUE)


if __name__ == "__main__":
    main()
