"""Calls of every command with odd values for every option and argument, and their outcomes."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import typer
import yaml
from run_support import make_corpora, run_settings, write_run_file
from sweep_run_support import open_sweep
from warm_commands import run_well
from warm_process import WarmProcess

from megaphase.cli import app
from megaphase.launch.local import free_port, rank_environment
from megaphase.utils.errors import EXIT_WRONG_INPUT, InputError
from megaphase.utils.locale_settings import require_utf8

DEADLINE_SECONDS = 300.0
EXIT_CODES = (0, 1, 2, 75)

NUMBERS = [
    *("nan", "inf", "-inf", "1e400", "1e-320", "-1", "0", "1.5", "", " ", "x", "0x10", "٣"),
    *("99999999999999999999", "9" * 5000, "\udce9"),
]
WORDS = [
    *("", " ", "a\tb\x01\nc", "x" * 300, "x/" * 3000, "caf\udce9", "\u202e×", "~nosuchuser/x"),
    # Files in the folder in which the command is run.
    *("folder", "file", "file/x", "fifo", "dangling", "loop", "full", "null", "memory", "nowhere"),
    *("-", "@", "run@", "=", "a=", "a=fifo", "a=folder", "output=fifo", "seed=nan", "tasks=[", "*"),
    *("{", "[/x]", "[bold", "%n", "nan", "-1", "0/0", "1/99999999999999999999"),
]
CHOICES = ["", "x", "\udce9"]

# A call of every command that succeeds, or fails late; arguments by parameter name.
TOKENIZE = {"--tokenizer": "tok", "--out": "new", "--workers": "1"}
RUN = {"run_file": ["run.yaml"]}
CHECKPOINT = {"checkpoint": ["run@joint"]}
CALLS: dict[str, tuple[dict[str, list[str]], dict[str, str]]] = {
    "tokenizer train": ({}, {"--input": "a=text.jsonl", "--vocab-size": "400", "--out": "new"}),
    "tokenizer extend": (
        {"base": ["tok"]},
        {"--input": "a=text.jsonl", "--add": "20", "--out": "new"},
    ),
    "tokenizer inspect": ({"path": ["tok"]}, {}),
    "data tokenize": ({"inputs": ["text.jsonl"]}, TOKENIZE),
    "data from-megatron": ({"source": ["data/cimri"]}, TOKENIZE),
    "data inspect": ({"prefix": ["data/cimri"]}, {"--tokenizer": "tok", "--document": "0"}),
    "data stats": ({"prefixes": ["data/cimri"]}, {}),
    "data verify": ({"prefixes": ["data/cimri"]}, {}),
    "data merge": ({"prefixes": ["data/cimri"]}, {"--out": "new"}),
    "data split": (
        {"prefix": ["data/cimri"]},
        {"--train": "new", "--held-out": "newer", "--fraction": "0.5"},
    ),
    "plan show": (RUN, {}),
    "plan trace": (RUN, {"--step": "1"}),
    "rehearse": (RUN, {}),
    "train": (RUN, {}),
    "evaluate": (RUN, {}),
    "generate": (CHECKPOINT, {"--prompt": "a", "--max-tokens": "2"}),
    "translate": (RUN, {"--max-tokens": "2", "--samples": "1"}),
    "convert average": ({"checkpoints": ["run@joint", "run@pretrain"]}, {"--out": "new"}),
    "convert reshape": (CHECKPOINT, {"--data": "1", "--out": "new"}),
    "convert extend-vocab": (CHECKPOINT, {"--tokenizer": "tok", "--out": "new"}),
    "convert to-hf": (CHECKPOINT, {"--out": "new"}),
    "convert from-hf": ({"directory": ["hf"]}, {"--out": "new"}),
    "convert to-megatron": (CHECKPOINT, {"--out": "new"}),
    "convert from-megatron": ({"directory": ["megatron"]}, {"--out": "new"}),
    "convert inspect": (CHECKPOINT, {}),
    "sweep": ({"sweep_file": ["sweep.yaml"]}, {"--dry-run": ""}),
    "report": ({"run_dirs": ["run"]}, {"--out": "new"}),
    "recommend": (
        {"sweeps": ["sweep"]},
        {"--run": "run.yaml", "--target": "{cimri: min}", "--out": "new"},
    ),
    "launch local": (RUN, {}),
    "launch slurm": (RUN, {"--dry-run": "", "--gpus-per-node": "0"}),
    "launch status": ({"run_dirs": ["run"]}, {}),
    "launch check-node": (RUN, {}),
    "launch next": (RUN, {}),
    "demo": ({"folder": ["file"]}, {}),
    "init": (
        {"out": ["new.yaml"]},
        {
            "--corpus": "data/cimri",
            "--low": "none",
            "--model": "gpt-1m",
            "--card": "l4",
            "--gpus": "1",
            "--hours": "1",
        },
    ),
    "doctor": ({}, {"--dir": "folder"}),
}


@dataclass(frozen=True)
class Case:
    """A call of a command in which one parameter has an odd value."""

    command: str
    parameter: str
    value: str
    argv: list[str] = field(compare=False)

    def __str__(self) -> str:
        return f"{self.command} {self.parameter} {self.value[:40]!a}"


@dataclass(frozen=True)
class Outcome:
    """The exit code of a command, None if it has not ended, and its output."""

    code: int | None
    said: str

    @property
    def is_right(self) -> bool:
        return self.code in EXIT_CODES and "Traceback" not in self.said


@cache
def commands() -> dict[str, Any]:
    """Return all commands of the program by name."""
    found: dict[str, Any] = {}

    def walk(command: Any, name: str) -> None:
        for each, inner in getattr(command, "commands", {}).items():
            walk(inner, f"{name} {each}".strip())
        if not hasattr(command, "commands"):
            found[name] = command

    walk(typer.main.get_command(app), "")
    return found


def cases() -> Iterator[Case]:
    """Yield every parameter of every command with every value of its kind."""
    for name, command in commands().items():
        arguments, options = CALLS[name]
        for parameter in command.params:
            if parameter.name == "help":
                continue
            is_option = parameter.param_type_name == "option"
            for value in _values(parameter):
                if is_option:
                    given = {**options, parameter.opts[0]: value}
                    argv = _argv(command, arguments, given)
                elif name == "demo" and not _is_no_new_folder(value):
                    continue  # it would run the whole demo
                else:
                    argv = _argv(command, {**arguments, parameter.name: [value]}, options)
                yield Case(name, parameter.opts[0], value, [*name.split(), *argv])


def is_number(parameter: Any) -> bool:
    """Return whether a parameter is a number."""
    return parameter.type_descriptor.annotation in (int, float)


def _values(parameter: Any) -> list[str]:
    if getattr(parameter, "is_flag", False):
        return [""]
    if is_number(parameter):
        return NUMBERS
    kind = parameter.type_descriptor.annotation
    return WORDS if kind in (str, Path, list[str], list[Path]) else CHOICES


def _is_no_new_folder(value: str) -> bool:
    return value in (
        "folder",
        "file",
        "file/x",
        "fifo",
        "loop",
        "full",
        "null",
        "memory",
        "x/" * 3000,
    )


def _argv(command: Any, arguments: dict[str, list[str]], options: dict[str, str]) -> list[str]:
    by_option = {option: each for each in command.params for option in each.opts}
    argv = []
    for option, value in options.items():
        argv += [option] if getattr(by_option[option], "is_flag", False) else [option, value]
    ordered = [each.name for each in command.params if each.param_type_name == "argument"]
    given = [value for name in ordered for value in arguments.get(name, [])]
    return [*argv, "--", *given] if given else argv


def make_inputs(folder: Path) -> Path:
    """Make all files that the calls use: texts, a tokenizer, corpora, a finished run, models."""
    made = make_corpora(folder)
    shutil.copy(made / "text" / "cimri.jsonl", folder / "text.jsonl")
    settings = run_settings(Path(), validation={"every_steps": 2, "samples": 4, "fraction": 0.1})
    for phase in settings["phases"]:
        phase["steps"] = 2
        phase["learning_rate"]["warmup_steps"] = 1
    write_run_file(folder, settings)
    run_well("train", folder / "run.yaml")
    run_well("convert", "to-hf", f"{folder}/run@joint", "--out", folder / "hf")
    run_well("convert", "to-megatron", f"{folder}/run@joint", "--out", folder / "megatron")
    arms = {"static": {"rates": [0.2]}}
    sweep = {"run": "run.yaml", "output": "sweep", "high": ["alda"], "low": ["cimri"], "steps": 2}
    sweep |= {"learning_rate": {"peaks": [1e-2]}, "arms": arms}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    open_sweep(folder / "sweep.yaml")
    return folder


def _add_odd_files(folder: Path) -> None:
    (folder / "folder").mkdir()
    (folder / "file").write_text("no file of any kind\n")
    os.mkfifo(folder / "fifo")
    for name, target in {
        "dangling": "nothing",
        "loop": "loop",
        # As links, since a command run by root can replace its input.
        "full": "/dev/full",
        "null": "/dev/null",
        "memory": "/proc/self/mem",
    }.items():
        (folder / name).symlink_to(target)


def is_refused_at_once(case: Case) -> bool:
    """Return whether the command line itself is invalid, so that no command is run."""
    try:
        require_utf8(case.argv)
        words = case.command.split()
        commands()[case.command].make_context(words[-1], case.argv[len(words) :])
    except InputError:
        return True
    except Exception as error:
        if getattr(error, "exit_code", None) == EXIT_WRONG_INPUT:  # typer's
            return True
        raise
    return False


def run_case(case: Case, inputs: Path, prepare: Callable[[], object] | None = None) -> Outcome:
    """Run a command in its own folder, a copy of the inputs.

    prepare: called in the process before the command.
    """
    if is_refused_at_once(case):
        return Outcome(EXIT_WRONG_INPUT, "")
    with tempfile.TemporaryDirectory(prefix="case-") as place:
        folder, stdout, stderr = (Path(place) / name for name in ("folder", "stdout", "stderr"))
        shutil.copytree(inputs, folder)
        _add_odd_files(folder)
        environment = {"OMP_NUM_THREADS": "1", **rank_environment(0, 1, free_port())}
        process = WarmProcess(
            "megaphase.cli:main",
            case.argv,
            stdout=stdout,
            stderr=stderr,
            env=environment,
            cwd=folder,
            prepare=prepare,
        )
        try:
            code: int | None = process.wait(DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            process.kill()
        said = stderr.read_text(errors="replace") if stderr.exists() else ""
        return Outcome(code, said)


def run_cases(chosen: Sequence[Case], inputs: Path) -> dict[Case, Outcome]:
    """Run all cases, two at a time, and return their outcomes."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(chosen, pool.map(lambda case: run_case(case, inputs), chosen), strict=True))
