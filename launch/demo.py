"""`megaphase demo`: the whole pipeline on synthetic languages, using the commands themselves.

It ends with the comparison for which the project exists: two phases beside static mixtures of the
same budget, with three seeds, by a sweep and its report.
"""

from __future__ import annotations

import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megaphase.data_tools.synthetic.languages import DEFAULT_LANGUAGES, write_languages
from megaphase.utils.errors import InputError, RunError, Stopped
from megaphase.utils.files import atomic_write_text
from megaphase.utils.process_lifetime import ends_with_this_process
from megaphase.utils.python_command import python_command
from megaphase.utils.signals import recorded_signals, signal_name, signals_blocked
from megaphase.utils.standard_streams import new_console

SEED = 1234
VOCAB_SIZE = 1024
PROCESSES = 2  # of the run that shows the phases; the runs of the comparison have one each
POLL_SECONDS = 0.1

# Of the languages with little text, half of the documents are held out, to measure their loss well,
# and a few of the others are trained on: 2,700 tokens.
RUN_FILE = """\
# Two languages with much text, two with little: pretraining on the former, then on all.
seed: 1234
output: run
tokenizer: tok
tasks:
{tasks}
model: {{layers: 3, hidden: 96, heads: 4, seq_len: 64}}
parallel: {{tensor: 2, zero: 3}}
precision: fp32
batch: {{samples: 16, micro: 16}}
phases:
  - name: pretrain
    steps: 40
    mixture: {{proportional: true, over: [{high}]}}
    learning_rate: {{schedule: cosine, peak: 4e-3, final: 4e-4, warmup_steps: 10}}
  - name: joint
    steps: 20
    mixture: {{temperature: 3.3}}
    optimizer_state: reset
    learning_rate: {{schedule: cosine, peak: 2e-3, final: 2e-4, warmup_steps: 4}}
validation: {{every_steps: 90, samples: 128}}
checkpoint: {{every_steps: 1000, keep: 1}}
logging: {{every_steps: 20}}
"""
HIGH_TASK = "  {name}: {{corpus: data/{name}, role: high, held_out: 0.05}}"
LOW_TASK = "  {name}: {{corpus: data/{name}, role: low, held_out: 0.5, subsample: 0.06}}"

SWEEP_FILE = """\
# Two phases beside static mixtures: the same model, budget and learning rate at every step but the
# first few after the switch. The low-resource rates of both are 5 % and 15 % of the whole run: a
# quarter of it at 20 % and 60 %. What differs is the order, and the reset of the optimizer state.
run: run.yaml
output: comparison
high: high
low: low
settings: {parallel.tensor: 1, parallel.zero: 0}
steps: 360
learning_rate: {schedule: wsd, warmup: 0.05, decay: 0.25, final: 0.05, peaks: [4e-3]}
seeds: [1, 2, 3]
arms:
  two-phase:
    phases:
      - {share: 0.75, rate: 0, learning_rate: {schedule: constant, warmup: 0.0667}}
      - {rate: [0.2, 0.6], learning_rate: {schedule: linear, warmup: 0.05}}
  static: {rates: [0.05, 0.15]}
"""
CLOSING = """\
What was compared: the same model, texts and budget, so many tokens of each group, and the same
learning rate; two-phase trains on the low-resource languages in the last quarter alone. A run of a
minute has hardly converged on its high-resource languages, which the method presupposes, so this
says how to ask the question, not how your languages answer it: docs/sweeps.md. Real text:
docs/experiments.md."""


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
    tasks = "\n".join((HIGH_TASK if name in high else LOW_TASK).format(name=name) for name in texts)
    run_file, sweep_file = folder / "run.yaml", folder / "comparison.yaml"
    atomic_write_text(run_file, RUN_FILE.format(tasks=tasks, high=", ".join(high)))
    atomic_write_text(sweep_file, SWEEP_FILE)
    devices = _devices()
    if devices:
        console.print(f"It runs on the CPU: {PROCESSES} processes need as many GPUs, or none.")
    for command in _commands(folder, texts, run_file, sweep_file):
        console.print(f"\n$ megaphase {shlex.join(command)}", style="bold cyan", soft_wrap=True)
        code, stopped_by = _run(command, devices)
        if stopped_by is not None:
            raise Stopped(
                f"{stopped_by} came: the demo ends with this command; run it and those that follow "
                f"by hand, or remove {folder} and start again"
            )
        if code:
            raise RunError(f"the demo stopped: megaphase {command[0]} failed (see above)")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    console.print(CLOSING, soft_wrap=True)
    console.print(
        f"\nThe demo took {time.monotonic() - began:.0f} seconds, "
        f"{used.ru_utime + used.ru_stime:.0f} of a processor. Look at "
        f"{folder / 'report' / 'index.html'}",
        soft_wrap=True,
    )


def _devices() -> dict[str, str]:
    """Return the environment variables with which each process has a GPU of its own, or none."""
    import torch

    return {"CUDA_VISIBLE_DEVICES": ""} if 0 < torch.cuda.device_count() < PROCESSES else {}


def _run(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str | None]:
    """Run a command and forward signals to it; return its exit code and the first signal's name.

    A terminal sends Ctrl-C to both processes, and the command handles it itself.
    """
    first: str | None = None
    with recorded_signals() as received:
        with signals_blocked():
            process = subprocess.Popen(
                python_command("megaphase", *command),
                env={**os.environ, **environment, **ends_with_this_process()},
            )
        while process.poll() is None:
            while received:
                number = received.pop(0)
                first = first or signal_name(number)
                if number != signal.SIGINT or not sys.stdin.isatty():
                    process.send_signal(number)
            time.sleep(POLL_SECONDS)
    return process.returncode, first


def _commands(
    folder: Path, texts: dict[str, Path], run_file: Path, sweep_file: Path
) -> list[list[str]]:
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
        ["report", str(folder / "run"), "--out", str(folder / "run-report")],
        ["sweep", str(sweep_file), "--jobs", str(PROCESSES)],
        ["report", str(folder / "comparison"), "--out", str(folder / "report")],
    ]
