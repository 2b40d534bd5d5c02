"""The run file, with comments, and the lines that say what was chosen."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from math import gcd
from pathlib import Path
from textwrap import wrap
from typing import Any

import yaml

from megaphase.estimate.hardware import EXPECTED
from megaphase.estimate.memory_table import in_unit, memory_unit
from megaphase.estimate.suggestions import RESERVE
from megaphase.init.choices import Choice
from megaphase.init.layout import GFLOPS_A_CORE
from megaphase.init.recipe import (
    FINAL,
    HELD_OUT_DOCUMENTS,
    MAX_EPOCHS,
    MILLION,
    MOST_HELD_OUT,
    TEMPERATURE,
    Phase,
    rounded,
)
from megaphase.utils.cores import available_cores

WIDTH, MINUTE = 100, 60
# Validations of a run, steps between two of them at most, and seconds between checkpoints at most.
VALIDATIONS, MOST_BETWEEN, CHECKPOINT_SECONDS = 20, 1000, 1800.0
VALIDATION_SAMPLES = 256
# On a CPU: validations of a run, the part of the training's time that they take if that leaves
# them the fewest samples; a validation takes a third of a step on as many samples.
CPU_VALIDATIONS, CPU_VALIDATION_PART, FEWEST_SAMPLES = 10, 0.1, 16
CHECKPOINTS = 4  # of a run, at least
PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./-]*")
# Words that YAML 1.1 or 1.2 does not read as text.
RESERVED = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}


def number(value: float) -> str:
    """Return a number as it is written in run files: 3e-4, 0.05, 12."""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    if abs(value) < 0.001:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.6g}"


def amount(tokens: float) -> str:
    """Return a number of tokens or parameters in words: 12.3 billion."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if tokens >= size:
            return f"{tokens / size:.3g} {word}"
    return f"{tokens:,.0f}"


def duration(seconds: float) -> str:
    """Return a time in words: 3.2 days."""
    for unit, word in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {word}"
    return f"{seconds:.0f} seconds" if seconds >= 1 else "less than a second"


def text(value: str) -> str:
    """Return text as a YAML scalar for a flow mapping."""
    if PLAIN.fullmatch(value) and value.lower() not in RESERVED:
        return value
    return json.dumps(value, ensure_ascii=False)


def path_in(path: Path, out: Path) -> str:
    """Return a path as the run file has it: relative to it where it lies below its directory."""
    whole, folder = Path(os.path.abspath(path)), Path(os.path.abspath(out.parent))
    inside = whole.is_relative_to(folder) and whole != folder
    relative = str(whole.relative_to(folder)) if inside else str(whole)
    return text(f"./{relative}" if relative.startswith("~") else relative)


def write_run(choice: Choice, output: Path) -> str:
    """Return the text of the run file; output: the run directory."""
    parts = [
        _head(choice, output),
        _tasks(choice),
        _sizes(choice),
        _phases(choice),
        _rest(choice),
    ]
    return "\n".join(line for part in parts for line in part) + "\n"


def _comment(sentence: str, indent: int = 0) -> list[str]:
    start = " " * indent + "# "
    lines = wrap(sentence, WIDTH - len(start), break_long_words=False, break_on_hyphens=False)
    return [start + line for line in lines]


def _head(choice: Choice, output: Path) -> Iterator[str]:
    answers = choice.answers
    yield from _comment(
        f"Written by `megaphase init` for {answers.gpus.describe()} and {answers.hours:g} hours. "
        "What every key means: docs/run-file.md."
    )
    if answers.gpus.is_cpu:
        yield from _comment(f"Hours: {assumed_speed()}.")
    yield from (f"# {line}" for line in next_commands(choice))
    yield "seed: 1234"
    yield f"output: {path_in(output, answers.out)}"
    yield f"tokenizer: {path_in(answers.tokenizer.path, answers.out)}"


def assumed_speed() -> str:
    """Return what the hours of a run on a CPU rest on."""
    return (
        f"assumed, not measured: {GFLOPS_A_CORE:g} GFLOP/s of matrix products a core in fp32, of "
        f"{available_cores()} cores, of which a run reaches two thirds; the first progress lines "
        "of `megaphase train` show the speed"
    )


def roles(choice: Choice) -> tuple[str, str]:
    """Return the role of the tasks that are not low-resource, and that of those that are."""
    return ("old", "new") if choice.model.checkpoint is not None else ("high", "low")


def common_fraction(choice: Choice) -> float:
    """Return the smallest held-out fraction, which tasks have that name none."""
    return min(fraction for fraction, _ in choice.held_out.values())


def _tasks(choice: Choice) -> Iterator[str]:
    rest, low = roles(choice)
    common = common_fraction(choice)
    yield ""
    yield from _comment(
        "Tasks with the tokens that are trained on in an epoch. A part of each task's documents is "
        f"held out for validation: {number(common)} of them, or `held_out`."
    )
    yield "tasks:"
    corpora = {each.name: each for each in choice.answers.corpora}
    for task in choice.tasks:
        corpus = corpora[task.name]
        fraction, documents = choice.held_out[task.name]
        kind = corpus.manifest.kind
        keys = [] if kind == "lm" else [f"kind: {kind}"]
        keys.append(f"corpus: {path_in(corpus.prefix, choice.answers.out)}")
        keys += [] if task.chat else [f"role: {low if task.low else rest}"]
        keys += [f"held_out: {number(fraction)}"] if fraction != common else []
        line = f"  {text(task.name)}: {{{', '.join(keys)}}}"
        comment = f"# {amount(task.tokens)} tokens; {documents:,} documents held out"
        if len(line) + 2 + len(comment) <= WIDTH:
            yield f"{line}  {comment}"
        else:
            yield from (f"  {comment}", line)


def _sizes(choice: Choice) -> Iterator[str]:
    setup, model = choice.layout.setup, choice.model
    yield ""
    yield from _comment(f"{model.name}, {amount(model.parameters)} parameters with embeddings.")
    section: dict[str, Any] = {**model.section, "seq_len": choice.seq_len}
    if setup.shape.activation_checkpointing != "none":
        section["activation_checkpointing"] = setup.shape.activation_checkpointing
    yield from _section("model", section)
    yield ""
    if choice.answers.gpus.is_cpu:
        yield from _comment(f"One process in fp32, which needs {memory_of(choice)} of memory.")
        yield "parallel: {zero: 0}"
        yield "precision: fp32"
        yield f"batch: {_batch(choice)}"
        return
    yield from _comment(
        f"The quickest layout found that fits {choice.answers.gpus.describe()}: "
        f"{memory_of(choice)} on each with {RESERVE:.0%} in reserve. `megaphase plan RUN_FILE "
        f"--processes {choice.answers.gpus.count} --layouts` shows others."
    )
    parallel: dict[str, Any] = {"tensor": setup.tensor}
    if setup.sequence:
        parallel["sequence"] = True
    parallel["zero"] = setup.zero
    if setup.offload != "none":
        parallel["offload"] = setup.offload
    yield from _section("parallel", parallel)
    yield "precision: bf16"
    yield f"batch: {_batch(choice)}"


def _batch(choice: Choice) -> str:
    setup = choice.layout.setup
    return f"{{samples: {setup.samples}, micro: {setup.micro}}}  # {choice.batch:,} tokens a step"


def _section(key: str, values: dict[str, Any]) -> Iterator[str]:
    """Yield a section, on one line if that is possible."""
    flow = yaml.safe_dump(
        values, default_flow_style=True, width=10_000, sort_keys=False, allow_unicode=True
    )
    line = f"{key}: {flow.strip()}"
    if len(line) <= WIDTH and not any(isinstance(each, float) for each in values.values()):
        yield line
        return
    yield f"{key}:"
    block = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    yield from (f"  {each}" for each in block.splitlines())


def _phases(choice: Choice) -> Iterator[str]:
    yield ""
    yield "phases:"
    for place, phase in enumerate(choice.recipe.phases):
        yield from _comment(reason(choice, phase), 2)
        yield f"  - name: {phase.name}"
        if phase.trained != "all":
            yield f"    trained: {phase.trained}"
        if place or choice.model.checkpoint is not None:
            yield "    optimizer_state: reset"
        yield f"    tokens: {phase.tokens:_}  # {phase.steps:,} steps"
        if phase.samples not in (None, choice.layout.setup.samples):
            yield f"    batch: {_smaller_batch(choice, phase.samples)}"
        yield "    mixture:"
        yield from _rates(phase)
        yield f"      max_epochs: {number(MAX_EPOCHS)}  # over the run"
        epochs = phase.epochs(choice.tasks)
        parts = ", ".join(f"{name} {count:.2g}" for name, count in epochs.items())
        yield from _comment(f"Epochs in this phase: {parts}", 6)
        schedule = "constant" if phase.trained != "all" else "cosine"
        keys = [f"schedule: {schedule}", f"peak: {number(phase.peak)}"]
        if schedule == "cosine":
            keys.append(f"final: {number(rounded(phase.peak * FINAL))}")
        keys.append(f"warmup_steps: {phase.warmup_steps}")
        yield f"    learning_rate: {{{', '.join(keys)}}}"


def _smaller_batch(choice: Choice, samples: int) -> str:
    """Return the `batch` of a phase with fewer samples: with the largest micro-batch that goes."""
    of_rank, micro = samples // choice.layout.setup.data, choice.layout.setup.micro
    return f"{{samples: {samples}, micro: {gcd(micro, of_rank)}}}"


def _rates(phase: Phase) -> Iterator[str]:
    pairs = [f"{text(name)}: {number(rate / MILLION)}" for name, rate in phase.rates.items()]
    start = "      rates: {"
    lines = wrap(
        ", ".join(pairs), WIDTH - len(start) - 1, break_long_words=False, break_on_hyphens=False
    )
    for place, line in enumerate(lines):
        end = "}" if place == len(lines) - 1 else ""
        yield f"{start if not place else ' ' * len(start)}{line}{end}"


def reason(choice: Choice, phase: Phase) -> str:
    """Return what a phase is for and why its rates are what they are."""
    low = [task.name for task in choice.tasks if task.low]
    if phase.name == "chat" and any(task.chat for task in choice.tasks):
        return (
            "Conversations alone, from fresh optimizer state, at a tenth of a pre-training's peak: "
            "the loss is on the assistant's turns. Two epochs, or what a tenth of the time allows."
        )
    if phase.trained != "all":
        return (
            "The rows of the new tokens alone, so that they disturb nothing else; all other "
            "weights stay as they are."
        )
    if choice.model.checkpoint is not None:
        replay = choice.recipe.replay
        kept = (
            f"{replay:.0%} of the samples are of what the model knows (replay); " if replay else ""
        )
        return (
            f"{kept}the learning rate warms up again, to a third of a pre-training's peak. "
            "See docs/continued-pretraining.md."
        )
    if sum(phase.name != "chat" for phase in choice.recipe.phases) == 1:
        texts = "all texts" if len(choice.recipe.phases) > 1 else "all tasks"
        return f"One phase, {texts} in proportion to their tokens."
    if phase.name == "pretrain":
        return "High-resource tasks alone, in proportion to their tokens."
    share = sum(phase.rates[name] for name in low) / MILLION
    return (
        "All tasks, from fresh optimizer state, at a third of the peak. The low-resource tasks "
        f"are raised to {share:.2g} of the samples: tokens^(1/{TEMPERATURE:g}), with at most "
        f"{MAX_EPOCHS:g} epochs of each, and half of the samples for all of them."
    )


def _rest(choice: Choice) -> Iterator[str]:
    gpus = choice.answers.gpus
    steps = sum(phase.steps for phase in choice.recipe.phases)
    validations = CPU_VALIDATIONS if gpus.is_cpu else VALIDATIONS
    every = max(1, min(MOST_BETWEEN, steps // validations))
    seconds = choice.layout.step_seconds / EXPECTED
    save = max(1, min(int(CHECKPOINT_SECONDS / seconds), steps // CHECKPOINTS))
    if save >= 100:
        save = int(rounded(save))
    yield ""
    common = number(common_fraction(choice))
    samples = _cpu_samples(choice, steps // every) if gpus.is_cpu else VALIDATION_SAMPLES
    yield f"validation: {{every_steps: {every}, samples: {samples}, fraction: {common}}}"
    if any(task.low for task in choice.tasks):
        yield f"monitor: {{tasks: {roles(choice)[1]}}}  # the best weights of each are kept"
    between = save * seconds
    how_often = f"  # every {duration(between)}" if between >= MINUTE else ""
    yield f"checkpoint: {{every_steps: {save}, keep: 3}}{how_often}"
    if gpus.is_cpu:
        return
    yield from _comment("What `megaphase plan` estimates memory and time for.")
    yield f"hardware: {{card: {gpus.card}, gpus_per_node: {gpus.per_node}}}"


def _cpu_samples(choice: Choice, validations: int) -> int:
    """Return the samples of each task that validations measure."""
    part = 3 * CPU_VALIDATION_PART * choice.recipe.tokens
    samples = int(part / (validations * len(choice.tasks) * choice.seq_len))
    return max(FEWEST_SAMPLES, min(samples, VALIDATION_SAMPLES))


def memory_of(choice: Choice) -> str:
    """Return the memory of each GPU in words."""
    needed = choice.layout.memory
    unit = memory_unit(needed)
    return f"{in_unit(needed, unit)} {unit}"


def next_commands(choice: Choice) -> list[str]:
    """Return the commands that follow, for a shell."""
    answers, checkpoint = choice.answers, choice.model.checkpoint
    out, gpus = shlex.quote(str(answers.out)), answers.gpus
    source = "" if checkpoint is None else f" --from {shlex.quote(checkpoint)}"
    commands = [*choice.model.first, f"megaphase plan {out} --processes {gpus.count}"]
    if gpus.is_cpu:
        commands.append(f"megaphase train {out}{source}")
    elif gpus.count <= gpus.per_node:
        commands.append(f"megaphase launch local {out} --processes {gpus.count}{source}")
    else:
        nodes = gpus.count // gpus.per_node
        commands.append(
            f"megaphase launch slurm {out} --nodes {nodes} --gpus-per-node {gpus.per_node}{source}"
        )
    return commands


def explanation(choice: Choice) -> Iterator[tuple[str, str]]:
    """Yield what was chosen and why, a line each: its name and the sentence."""
    answers, setup, recipe = choice.answers, choice.layout.setup, choice.recipe
    rest, low = roles(choice)
    for role in (rest, low):
        texts = [task for task in choice.tasks if not task.chat]
        names = [task for task in texts if task.low == (role == low)]
        if names:
            total = amount(sum(task.tokens for task in names))
            shown = ", ".join(task.name for task in names[:6]) + (" …" if len(names) > 6 else "")
            yield f"{role} tasks", f"{shown}: {total} tokens to train on"
    if chats := [task for task in choice.tasks if task.chat]:
        total = amount(sum(task.tokens for task in chats))
        yield "conversations", f"{', '.join(task.name for task in chats)}: {total} tokens"
    least, most = common_fraction(choice), max(each for each, _ in choice.held_out.values())
    fewest = min(choice.held_out, key=lambda name: choice.held_out[name][1])
    yield (
        "held out",
        f"{number(least)}{f' to {number(most)}' if most > least else ''} of a task's documents, "
        f"for {HELD_OUT_DOCUMENTS} of each where that is at most {number(MOST_HELD_OUT)} of them; "
        f"fewest: {choice.held_out[fewest][1]:,} of {fewest}",
    )
    yield "model", f"{choice.model.name}: {amount(choice.model.parameters)} parameters"
    yield "seq_len", f"{choice.seq_len:,}"
    yield "layout", _layout(choice)
    yield (
        "batch",
        f"{setup.samples:,} sample{'s' * (setup.samples != 1)}, {choice.batch:,} tokens: by the "
        "model's size, smaller where the run is short",
    )
    seconds = recipe.tokens / choice.layout.tokens_per_second
    limit = (
        f"the text ends before the {answers.hours:g} hours do, at {MAX_EPOCHS:g} epochs"
        if recipe.limited_by_text
        else f"what {answers.hours:g} hours allow"
    )
    yield (
        "length",
        f"{amount(recipe.tokens)} tokens in {duration(seconds)} at two thirds of the estimated "
        f"speed: {limit}",
    )
    if answers.gpus.is_cpu:
        yield "speed", assumed_speed()
    for phase in recipe.phases:
        yield (
            phase.name,
            f"{phase.steps:,} steps, peak {number(phase.peak)}. {reason(choice, phase)}",
        )


def _layout(choice: Choice) -> str:
    setup, gpus = choice.layout.setup, choice.answers.gpus
    if gpus.is_cpu:
        return f"one process, fp32, micro {setup.micro}: {memory_of(choice)} of memory"
    recomputed = setup.shape.activation_checkpointing
    return (
        f"tensor {setup.tensor} × data {setup.data}, ZeRO {setup.zero}, micro {setup.micro}"
        + (f", {recomputed} recomputation" if recomputed != "none" else "")
        + (", optimizer offloaded" if setup.offload != "none" else "")
        + f": {memory_of(choice)} on each GPU; the quickest found that fits {gpus.memory_gb:g} GB"
    )
