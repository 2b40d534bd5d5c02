"""What `megaphase train` does until its first step is trained: `python benchmarks/startup.py`.

Trains a tiny model on 1 and on 8 processes over gloo and prints, for each part of the start,
processor seconds and wall seconds of a process: the median over the rounds of the mean over the
ranks. A part's time is without that of the parts within it. `--before TREE` runs another checkout
in turn with this one. The floor is Python with `import torch`, measured in every round.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

# (module, attribute, part): a call of the attribute belongs to the part.
CALLS = [
    ("megaphase.config.load", "load_run_file", "run file"),
    ("megaphase.distributed.process_grid", "join_processes", "process groups"),
    ("megaphase.training.run_parts", "start_process_grid", "process groups"),
    ("megaphase.training.run_parts", "ControlGroup", "process groups"),
    ("megaphase.training.run_parts", "check_inputs", "corpora, tokenizer, checks"),
    ("megaphase.training.run_parts", "open_plan", "plan"),
    ("megaphase.training.run_parts", "Engine", "engine"),
    ("megaphase.training.trainer.Trainer", "validate", "validation of step 0"),
    ("megaphase.training.trainer.Trainer", "train_step", "first step"),
]
# (package, part): an import of the package belongs to the part.
IMPORTS = [
    ("torch._dynamo", "torch's compiler"),
    ("torch._inductor", "torch's compiler"),
    ("torch", "import torch"),
    ("deepspeed", "import deepspeed"),
    ("mlflow", "import mlflow"),
    ("triton", "import triton"),
    ("megaphase", "import megaphase and other packages"),
]
REST = "rest"
PARTS = ["python", *dict.fromkeys(part for *_, part in (*IMPORTS[::-1], *CALLS)), REST]
FLOOR = "import torch"


class Clock:
    """Adds up processor and wall seconds by part; the innermost part counts."""

    def __init__(self) -> None:
        self.seconds = {part: [0.0, 0.0] for part in PARTS}
        self._stack = ["python"]
        self._last = [0.0, time.time() - self._age()]

    @staticmethod
    def _age() -> float:
        """Return the seconds since this process was started."""
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")

    def _mark(self) -> None:
        now = [time.process_time(), time.time()]
        for number in range(2):
            self.seconds[self._stack[-1]][number] += now[number] - self._last[number]
        self._last = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._mark()
        self._stack.append(name)
        try:
            yield
        finally:
            self._mark()
            self._stack.pop()


class TimedImports(importlib.abc.MetaPathFinder):
    """Counts the import of a package as its part, and wraps functions that are called later."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._finding = False

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """Return the spec that the other finders return, with a loader that is timed."""
        part = next((p for root, p in IMPORTS if f"{name}.".startswith(f"{root}.")), None)
        if part is None or self._finding:
            return None
        self._finding = True
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            spec = None
        finally:
            self._finding = False
        if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
            self._time(spec.loader, name, part)
        return spec

    def _time(self, loader: Any, name: str, part: str) -> None:
        execute = loader.exec_module

        def timed(module: ModuleType) -> None:
            with self._clock.part(part):
                execute(module)
            for where, attribute, called in CALLS:
                owner = where.removeprefix(f"{name}.")
                if where == name or (where.startswith(f"{name}.") and hasattr(module, owner)):
                    wrap(self._clock, getattr(module, owner, module), attribute, called)

        loader.exec_module = timed


def wrap(clock: Clock, owner: Any, attribute: str, part: str) -> None:
    """Count calls of an attribute to a part."""
    really: Callable[..., Any] = getattr(owner, attribute)

    def timed(*arguments: Any, **named: Any) -> Any:
        with clock.part(part):
            result = really(*arguments, **named)
        if attribute == "train_step":
            report(clock)
        return result

    setattr(owner, attribute, timed)


def report(clock: Clock) -> None:
    """Write the seconds of this process."""
    path = Path(f"{os.environ['STARTUP_TIMES']}.{os.environ.get('RANK', '0')}")
    path.write_text(json.dumps(clock.seconds))


def child(arguments: list[str]) -> None:
    """Run `megaphase` in this process, and time it."""
    clock = Clock()
    sys.meta_path.insert(0, TimedImports(clock))
    sys.argv = ["megaphase", *arguments]
    sys.path.pop(0)
    with clock.part(REST):
        from megaphase.cli import main

        main()


def prepare(folder: Path) -> Path:
    """Make three small corpora and a run file; return it."""
    import yaml

    from megaphase.data_tools.synthetic.languages import write_languages
    from megaphase.data_tools.tokenization.tokenize import tokenize
    from megaphase.data_tools.tokenizers.train import train_tokenizer

    sizes = {"alda": 90_000, "boreth": 60_000, "cimri": 12_000}
    texts = write_languages(folder / "text", seed=5, languages=sizes)
    train_tokenizer({name: [path] for name, path in texts.items()}, folder / "tok", vocab_size=500)
    for name, path in texts.items():
        tokenize([path], folder / "tok", folder / name, workers=1)
    run = {
        "seed": 11,
        "output": "run",
        "tokenizer": "tok",
        "tasks": {name: {"corpus": name} for name in sizes},
        "model": {"layers": 2, "hidden": 32, "heads": 4, "ffn": 64, "seq_len": 32},
        "parallel": {"tensor": 1, "zero": 1},
        "precision": "fp32",
        "batch": {"samples": 8, "micro": 1},
        "phases": [
            {
                "name": "only",
                "steps": 20,
                "mixture": {"proportional": True},
                "learning_rate": {"schedule": "cosine", "peak": 1e-3},
            }
        ],
        "validation": {"every_steps": 20, "samples": 8, "fraction": 0.1},
        "checkpoint": {"every_steps": 20, "end_after": 1},
        "logging": {"tensorboard": False},
        "faults": {"silent_seconds": 600.0},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder / "run.yaml"


def start(tree: Path, run_file: Path, ranks: int, changes: list[str]) -> dict[str, list[float]]:
    """Train one step with the code of a checkout; return the mean seconds of a rank by part."""
    from megaphase.launch.local import free_port, rank_environment

    with tempfile.TemporaryDirectory() as scratch:
        port, times = free_port(), Path(scratch) / "times"
        argv = [sys.executable, __file__, "--child", "train", str(run_file), *changes]
        argv += [f"output={scratch}/run"]
        shared = {"PYTHONPATH": str(tree), "STARTUP_TIMES": str(times), "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(
                argv,
                env=os.environ | (rank_environment(n, ranks, port) if ranks > 1 else {}) | shared,
                stdout=subprocess.DEVNULL,
            )
            for n in range(ranks)
        ]
        codes = [process.wait() for process in processes]
        if any(codes):
            sys.exit(f"{tree}: a process failed")
        found = [json.loads(Path(f"{times}.{n}").read_text()) for n in range(ranks)]
    return {
        part: [statistics.mean(each[part][i] for each in found) for i in range(2)] for part in PARTS
    }


def floor() -> list[float]:
    """Return processor and wall seconds of Python with `import torch`."""
    began = time.time()
    code = "import time, torch; print(time.process_time())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return [float(done.stdout), time.time() - began]


def median(rounds: list[list[float]]) -> list[float]:
    return [statistics.median(each) for each in zip(*rounds, strict=True)]


def print_table(sides: dict[str, list[dict[str, list[float]]]], floors: list[list[float]]) -> None:
    """Print the parts of every side."""
    print("| part | " + " | ".join(f"{side}, CPU s | wall s" for side in sides) + " |")
    print("| --- |" + " --- | --- |" * len(sides))
    rows = {
        part: [median([each[part] for each in rounds]) for rounds in sides.values()]
        for part in PARTS
    }
    rows["all until the first step is trained"] = [
        median([[sum(p[i] for p in each.values()) for i in range(2)] for each in rounds])
        for rounds in sides.values()
    ]
    rows["floor: python, import torch"] = [median(floors)] * len(sides)
    for part, found in rows.items():
        if any(cpu > 0.005 for cpu, _ in found):
            print(f"| {part} | " + " | ".join(f"{c:.2f} | {w:.2f}" for c, w in found) + " |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", type=Path, help="another checkout, built in place")
    parser.add_argument("changes", nargs="*", help="overrides of the run file: parallel.zero=3")
    arguments = parser.parse_args()
    here = Path(__file__).resolve().parents[1]
    trees = {"now": here}
    if arguments.before is not None:
        trees = {"before": arguments.before.resolve(), **trees}
    with tempfile.TemporaryDirectory() as folder:
        run_file = prepare(Path(folder))
        for ranks in arguments.ranks:
            sides: dict[str, list[dict[str, list[float]]]] = {side: [] for side in trees}
            floors = []
            for _ in range(arguments.rounds):
                floors.append(floor())
                for side, tree in trees.items():
                    sides[side].append(start(tree, run_file, ranks, arguments.changes))
            print(f"\n{ranks} process{'es' * (ranks > 1)}, {arguments.rounds} rounds\n")
            print_table(sides, floors)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main()
