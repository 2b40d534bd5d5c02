"""`megaphase demo`: the whole pipeline on synthetic languages, using the commands themselves."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megaphase.data_tools.synthetic.languages import DEFAULT_LANGUAGES, write_languages
from megaphase.utils.errors import InputError, RunError, Stopped
from megaphase.utils.files import atomic_write_text
from megaphase.utils.process_lifetime import ends_with_this_process
from megaphase.utils.signals import recorded_signals, signal_name, signals_blocked
from megaphase.utils.standard_streams import new_console

SEED = 1234
VOCAB_SIZE = 2048
PROCESSES = 2
POLL_SECONDS = 0.1

RUN_FILE = """\
# Two languages with much text, two with little: pretraining on the former, then on all.
seed: 1234
output: run
tokenizer: tok
tasks:
{tasks}
model: {{preset: gpt-1m, seq_len: 128}}
parallel: {{tensor: 2, zero: 3}}
precision: fp32
batch: {{samples: 16, micro: 16}}
phases:
  - name: pretrain
    steps: 260
    mixture: {{proportional: true, over: [{high}]}}
    learning_rate: {{schedule: cosine, peak: 3e-3, final: 3e-4, warmup_steps: 20}}
  - name: joint
    steps: 140
    mixture: {{temperature: 3.3}}
    optimizer_state: reset
    learning_rate: {{schedule: cosine, peak: 2e-3, final: 2e-4, warmup_steps: 10}}
validation: {{every_steps: 40, samples: 32, fraction: 0.1}}
checkpoint: {{every_steps: 100, keep: 2}}
logging: {{every_steps: 20}}
"""


def run_demo(folder: Path) -> None:
    """Generate the languages in `folder`/text and run every command of the pipeline on them.

    Raises:
        InputError: the folder exists already.
        RunError: a command failed; it has reported why.
    """
    console = new_console(highlight=False)
    began = time.monotonic()
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise InputError(folder, "exists already", "remove it or name another folder") from None
    except OSError as error:
        raise InputError(folder, f"cannot be created ({error.strerror})") from None
    texts = write_languages(folder / "text", seed=SEED)
    high = [name for name, size in DEFAULT_LANGUAGES.items() if size > 1_000_000]
    low = [name for name in texts if name not in high]
    console.print(
        f"Synthetic languages in {folder / 'text'}: much text in {' and '.join(high)}, "
        f"little in {' and '.join(low)}."
    )
    tasks = "\n".join(f"  {name}: {{corpus: data/{name}}}" for name in texts)
    run_file = folder / "run.yaml"
    atomic_write_text(run_file, RUN_FILE.format(tasks=tasks, high=", ".join(high)))
    for command in _commands(folder, texts, run_file):
        console.print(f"\n$ megaphase {shlex.join(command)}", style="bold cyan", soft_wrap=True)
        code, stopped_by = _run(command)
        if stopped_by is not None:
            raise Stopped(
                f"{stopped_by} came: the demo ends with this command; run it and those that follow "
                f"by hand, or remove {folder} and start again"
            )
        if code:
            raise RunError(f"the demo stopped: megaphase {command[0]} failed (see above)")
    console.print(f"\nThe demo took {time.monotonic() - began:.0f} seconds.")


def _run(command: Sequence[str]) -> tuple[int, str | None]:
    """Run a command and forward signals to it; return its exit code and the first signal's name.

    A terminal sends Ctrl-C to both processes, and the command handles it itself.
    """
    first: str | None = None
    with recorded_signals() as received:
        with signals_blocked():
            process = subprocess.Popen(
                [sys.executable, "-m", "megaphase", *command],
                env=os.environ | ends_with_this_process(),
            )
        while process.poll() is None:
            while received:
                number = received.pop(0)
                first = first or signal_name(number)
                if number != signal.SIGINT or not sys.stdin.isatty():
                    process.send_signal(number)
            time.sleep(POLL_SECONDS)
    return process.returncode, first


def _commands(folder: Path, texts: dict[str, Path], run_file: Path) -> list[list[str]]:
    inputs = [part for name, path in texts.items() for part in ("--input", f"{name}={path}")]
    tokenizer = str(folder / "tok")
    train_tokenizer = ["tokenizer", "train", *inputs, "--vocab-size", str(VOCAB_SIZE)]
    corpora = {name: str(folder / "data" / name) for name in texts}
    tokenize = [
        ["data", "tokenize", str(path), "--tokenizer", tokenizer, "--out", corpora[name]]
        for name, path in texts.items()
    ]
    return [
        [*train_tokenizer, "--out", tokenizer],
        *tokenize,
        ["plan", str(run_file)],
        ["launch", "local", str(run_file), "--processes", str(PROCESSES)],
        ["report", str(folder / "run"), "--out", str(folder / "report")],
    ]
