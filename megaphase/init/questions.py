"""The questions of `megaphase init`: options answer them, else the user does, on a terminal."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megaphase.estimate.gpu_specs import CARDS, card_of_device
from megaphase.estimate.hardware import USUAL_CARD, USUAL_NODE
from megaphase.init.base_model import AUTO, named_model, published_model
from megaphase.init.choices import Answers, suggested_model
from megaphase.init.found_corpora import (
    FoundCorpus,
    find_corpora,
    find_tokenizer,
    suggested_low,
)
from megaphase.init.layout import CPU, GPUs
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError
from megaphase.utils.names import shown
from megaphase.utils.nvidia_smi import query_gpus
from megaphase.utils.validation_errors import hint

NONE = "none"
MOST_GPUS, MOST_HOURS = 1 << 16, 1e6
T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """The command's options; None where one was not given."""

    out: Path
    corpora: list[str] = field(default_factory=list)
    low: list[str] = field(default_factory=list)
    model: str | None = None
    checkpoint: str | None = None
    card: str | None = None
    gpus: int | None = None
    per_node: int | None = None
    hours: float | None = None
    tokenizer: Path | None = None

    def missing(self) -> list[str]:
        """Return the options that a script has to give and that were not given."""
        needed = {
            "--corpus": self.corpora,
            "--low": self.low,
            "--model or --checkpoint": self.model or self.checkpoint,
            "--card": self.card,
            "--gpus": self.gpus or self.card == CPU,
            "--hours": self.hours,
        }
        return [name for name, given in needed.items() if not given]


def is_interactive() -> bool:
    """Return whether there is a user to ask."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def answers_of(options: Options, console: Console) -> Answers:
    """Return the answers of options and user.

    Raises:
        InputError: an option is wrong, or is missing where there is no terminal.
    """
    asks = bool(options.missing()) and is_interactive()
    if options.missing() and not asks:
        raise InputError(
            "",
            f"there is no terminal to ask on, and these options are missing: "
            f"{', '.join(options.missing())}",
            "give them (--low auto and --model auto take what is suggested)",
        )
    if options.model is not None and options.checkpoint is not None:
        raise InputError("--model", "does not go with --checkpoint", "leave one of them out")
    say: list[str] = []
    corpora = _ask_unless(
        find_corpora(options.corpora, say) if options.corpora else None,
        "Corpora (prefixes or globs, separated by spaces)",
        None,
        lambda text: find_corpora(_words(text), say),
        console,
    )
    for line in say:
        console.print(line, soft_wrap=True)
    if asks:
        console.print(corpora_table(corpora))
    near = [Path(options.checkpoint)] if options.checkpoint else []
    tokenizer = _tokenizer(options, corpora, near, console, asks=asks)
    published = options.checkpoint is not None
    suggested = suggested_low(corpora)
    what = "Tasks that are new to the model" if published else "Low-resource tasks"
    low = _ask_unless(
        _low(options.low, corpora) if options.low else None,
        f"{what} (names separated by spaces, or {NONE})",
        " ".join(suggested) or NONE,
        lambda text: _low(_words(text), corpora),
        console,
    )
    gpus = _gpus(options, console)
    hours = _ask_unless(options.hours, "Hours that the run may take", "24", _hours, console)
    answers = Answers(
        corpora,
        low,
        gpus,
        hours,
        tokenizer,
        options.out,
        options.model,
        options.checkpoint,
        wants_no_low=options.low == [NONE],
    )
    if options.model is not None or published:
        return answers
    return _ask_model(answers, console)


def _ask_unless(
    given: T | None,
    question: str,
    default: str | None,
    parse: Callable[[str], T],
    console: Console,
) -> T:
    """Return what is given, or the user's answer; a wrong answer is asked for again."""
    if given is not None:
        return given
    while True:
        text = typer.prompt(question, default=default)
        try:
            return parse(text)
        except InputError as error:
            console.print(str(error), style="red", soft_wrap=True)


def _tokenizer(
    options: Options,
    corpora: Sequence[FoundCorpus],
    near: Sequence[Path],
    console: Console,
    *,
    asks: bool,
) -> Tokenizer:
    def checked(path: Path) -> Tokenizer:
        tokenizer = Tokenizer.load(path)
        if tokenizer.fingerprint != corpora[0].manifest.tokenizer_hash:
            raise InputError(
                f"--tokenizer {path}",
                "is not the tokenizer of the corpora",
                "give the one that `megaphase data tokenize` was given",
            )
        return tokenizer

    if options.tokenizer is not None:
        return checked(options.tokenizer)
    beside = [path / "tokenizer" for path in near]
    found = find_tokenizer(corpora, [*near, *beside])
    if found is not None:
        return Tokenizer.load(found)
    if not asks:
        raise InputError(
            "--tokenizer",
            "the tokenizer of the corpora is not found near them",
            "give the one that `megaphase data tokenize` was given",
        )
    return _ask_unless(
        None, "Tokenizer of the corpora", None, lambda text: checked(Path(text)), console
    )


def _words(text: str) -> list[str]:
    """Cut an answer into words as a shell does."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InputError("", f"the answer cannot be read ({error})", "close the quotes") from None


def _low(given: Sequence[str], corpora: Sequence[FoundCorpus]) -> list[str]:
    names = [name for each in given for name in each.replace(",", " ").split()]
    if names == [AUTO]:
        return suggested_low(corpora)
    if names == [NONE]:
        return []
    known = {each.name for each in corpora}
    for name in names:
        if name not in known:
            raise InputError(
                "--low", f"no corpus of {shown(name)}", hint(name, known, "the tasks are")
            )
    for each in corpora:
        if each.name in names and each.manifest.kind == "chat":
            problem = f"{each.name} holds conversations, which get a phase of their own"
            raise InputError("--low", problem, "leave it out")
    return [each.name for each in corpora if each.name in names]


def _gpus(options: Options, console: Console) -> GPUs:
    def card(text: str) -> str:
        if text not in CARDS and text != CPU:
            names = [*CARDS, CPU]
            raise InputError(
                f"--card {text}", "is not in the table", hint(text, names, "the cards are")
            )
        return text

    given = None if options.card is None else card(options.card)
    here = given or (_card_here() if is_interactive() else None)
    name = _ask_unless(given, f"GPU (or {CPU})", here or USUAL_CARD, card, console)
    if name == CPU:
        for option, count in (("--gpus", options.gpus), ("--gpus-per-node", options.per_node)):
            if count is not None:
                raise InputError(option, f"does not go with --card {CPU}", "leave it out")
        return GPUs(CPU, 1, 1)
    count = _ask_unless(
        options.gpus, "Number of GPUs", "8", lambda text: _count("--gpus", text), console
    )
    usual = min(count, USUAL_NODE)
    per_node = options.per_node
    if per_node is None and options.gpus is None:
        per_node = _ask_unless(
            None,
            "GPUs of a node",
            str(usual),
            lambda text: _count("--gpus-per-node", text),
            console,
        )
    per_node = min(per_node or usual, count)
    if count % per_node:
        raise InputError(
            f"--gpus {count}",
            f"is no multiple of the {per_node} GPUs of a node",
            "give whole nodes (--gpus-per-node)",
        )
    return GPUs(name, count, per_node)


def _count(where: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= MOST_GPUS:
        raise InputError(where, f"{shown(text)} is no number of GPUs", "give a number such as 8")
    return int(text)


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = math.nan
    if not 0 < hours <= MOST_HOURS:
        raise InputError("--hours", f"{shown(text)} is no number of hours", "give one such as 24")
    return hours


def _card_here() -> str | None:
    """Return the name of this machine's GPU in the table of cards; None if it has none."""
    found = card_of_device(next(iter(query_gpus("name")), ""))
    return next((name for name, card in CARDS.items() if card == found), None)


def _ask_model(answers: Answers, console: Console) -> Answers:
    """Ask for a preset, a size or a checkpoint."""

    def parse(text: str) -> Answers:
        if Path(text).is_dir() or "/" in text or "@" in text:
            published_model(text, answers.tokenizer)
            return _with(answers, None, text)
        named_model(text, answers.tokenizer.vocab_size)
        return _with(answers, text, None)

    question = "Model (a preset, a size such as 500m, or the directory of a checkpoint)"
    return _ask_unless(None, question, suggested_model(answers), parse, console)


def _with(answers: Answers, model: str | None, checkpoint: str | None) -> Answers:
    return replace(answers, model=model, checkpoint=checkpoint)


def corpora_table(corpora: Sequence[FoundCorpus]) -> Table:
    """Return the corpora with their sizes."""
    table = Table(box=box.SIMPLE, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task", overflow="fold")
    for column in ("tokens", "documents"):
        table.add_column(column, justify="right")
    table.add_column("corpus", overflow="fold")
    for each in sorted(corpora, key=lambda each: -each.manifest.tokens):
        sizes = f"{each.manifest.tokens:,}", f"{each.manifest.documents:,}"
        table.add_row(Text(each.name), *sizes, Text(str(each.prefix)))
    return table
