"""Measure and check all of Megaphase on one GPU, in ten minutes.

    python benchmarks/gpu.py                        on a machine with an H100 or a similar GPU
    python benchmarks/gpu.py --rehearse             every part at tiny size, on the CPU
    python benchmarks/gpu.py --only step,variants   some parts; --skip leaves some out; --list

Each part runs in a process of its own with a time limit, so that one that crashes, hangs or runs
out of memory costs only itself. They run in their order of importance until the time is up. After
every part, the whole result is written to --output (JSON); a part that fails keeps what it had
found. What the parts print is in a .log file beside it. Needs no network; see gpu_wheels.sh for
machines that lack some packages. Exit code 0 if every part that ran has passed, otherwise 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_parts.catalogue import PARTS, Part

from megaphase.utils.process_lifetime import ends_with_this_process

POLL_SECONDS = 0.05
LOG_TAIL = 1500  # characters of a failed part's output in the result
ENDING_SECONDS = 5  # of the whole time, kept for the last result


class PartProcess:
    """A part's process, which imports what it needs and then waits for its turn."""

    def __init__(self, part: Part, folder: Path, rehearse: bool) -> None:
        self.part, self.folder = part, folder
        self.log = folder / f"{part.name}.log"
        command = [sys.executable, __file__, "--serve", part.name, "--folder", str(folder)]
        environment = os.environ | ends_with_this_process() | {"PYTHONUNBUFFERED": "1"}
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
        environment.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
        if rehearse:
            command.append("--rehearse")
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def run(self, limit: float) -> dict[str, Any]:
        """Let it begin, and wait for its end or its limit; returns the part's result."""
        began = time.monotonic()
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(b"begin\n")
            self._process.stdin.close()
        except BrokenPipeError:  # it has failed at its imports, which its log says
            pass
        while self._process.poll() is None and time.monotonic() - began < limit:
            time.sleep(POLL_SECONDS)
        code = self._process.poll()
        self.kill()
        status = "timed out" if code is None else "done" if code == 0 else "failed"
        outcome = {"status": status, "seconds": round(time.monotonic() - began, 1)}
        found = self.folder / f"{self.part.name}.json"
        results = json.loads(found.read_text()) if found.exists() else {}
        if status != "done":
            outcome["exit_code"] = code
            outcome["output"] = self.log.read_text(errors="replace")[-LOG_TAIL:]
        elif wrong := results.get("wrong"):
            outcome |= {"status": "wrong", "wrong": wrong}
        return outcome | {"results": results}

    def kill(self) -> None:
        """Kill it and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def write_json(path: Path, value: Any) -> None:
    """Write it aside and rename, so that the file is always whole."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(aside, path)


def measure(chosen: list[Part], asked: argparse.Namespace) -> dict[str, Any]:
    """Run the parts one after the other; returns the whole result."""
    began = time.monotonic()
    result: dict[str, Any] = {
        "command": sys.argv[1:],
        "rehearsal": asked.rehearse,
        "began": time.strftime("%Y-%m-%d %H:%M:%S"),
        "parts": {},
    }
    log = asked.output.with_suffix(".log")
    log.write_text("")
    folder = Path(tempfile.mkdtemp(prefix="megaphase-gpu-"))
    waiting: list[PartProcess] = []
    try:
        for number, part in enumerate(chosen):
            left = 60 * asked.minutes - ENDING_SECONDS - (time.monotonic() - began)
            if left < (1 if asked.rehearse else part.seconds):
                outcome = {"status": "skipped", "reason": f"{max(0, left):.0f} s are left"}
            else:
                ready = next((each for each in waiting if each.part is part), None)
                current = ready or PartProcess(part, folder, asked.rehearse)
                # The next one imports its packages meanwhile.
                waiting = [PartProcess(p, folder, asked.rehearse) for p in chosen[number + 1 :][:1]]
                try:
                    limit = left if asked.rehearse else min(left, part.limit)
                    outcome = current.run(limit)
                finally:
                    current.kill()
                with open(log, "a") as file:
                    file.write(f"==== {part.name}\n{current.log.read_text(errors='replace')}\n")
            result["parts"][part.name] = {"title": part.title} | outcome
            result["seconds"] = round(time.monotonic() - began, 1)
            write_json(asked.output, result)
            print_part(part, result["parts"][part.name])
    finally:
        for each in waiting:
            each.kill()
        shutil.rmtree(folder, ignore_errors=True)
    return result


def print_part(part: Part, outcome: dict[str, Any]) -> None:
    """One line of its status, and one for each of its results."""
    seconds = f", {outcome['seconds']} s" if "seconds" in outcome else ""
    reason = f": {outcome['reason']}" if "reason" in outcome else ""
    print(f"{part.name}: {outcome['status']}{seconds}{reason}  ({part.title})")
    for name, value in outcome.get("results", {}).items():
        text = json.dumps(value)
        print(f"    {name}: {text if len(text) < 300 else text[:300] + ' …'}")
    if outcome["status"] in ("failed", "timed out"):
        print("    " + "\n    ".join(outcome["output"].splitlines()[-8:]))
    sys.stdout.flush()


def names(text: str) -> set[str]:
    """Parse names of parts between commas."""
    given = {name for name in text.split(",") if name}
    if unknown := given - {part.name for part in PARTS}:
        raise argparse.ArgumentTypeError(f"no part is called {', '.join(sorted(unknown))}")
    return given


def there_is_a_gpu() -> bool:
    """Asked in another process: this one has no use for torch, and must not hold a GPU."""
    asking = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", asking]).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=names, help="parts to run, between commas")
    parser.add_argument("--skip", type=names, default=set(), help="parts to leave out")
    parser.add_argument("--minutes", type=float, default=10, help="for everything (default 10)")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="the result")
    parser.add_argument("--list", action="store_true", help="print the parts")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.list:
        for part in PARTS:
            print(f"{part.name:14} {part.seconds:4} s  {part.title}")
        return 0
    if asked.serve:
        from gpu_parts.serving import serve

        return serve(asked.serve, asked.folder, asked.rehearse)
    if not asked.rehearse and not there_is_a_gpu():
        parser.error("there is no GPU here; --rehearse runs every part at tiny size on the CPU")
    # So that `finally` is reached, and no part is left running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    chosen = [part for part in PARTS if asked.only is None or part.name in asked.only]
    result = measure([part for part in chosen if part.name not in asked.skip], asked)
    statuses = [part["status"] for part in result["parts"].values()]
    counts = {status: statuses.count(status) for status in dict.fromkeys(statuses)}
    print(f"{result['seconds']} s; {counts}; {asked.output}")
    return 0 if set(statuses) <= {"done", "skipped"} else 1


if __name__ == "__main__":
    sys.exit(main())
