"""From the answers to everything that the run file says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megaphase.config.load import run_config
from megaphase.config.run import RunConfig
from megaphase.init.base_model import AUTO, BaseModel, named_model, preset_model, published_model
from megaphase.init.base_model import with_length as shape_of
from megaphase.init.found_corpora import FoundCorpus
from megaphase.init.layout import GPUs, Layout, find_layout, need_more
from megaphase.init.recipe import (
    CHAT_EPOCHS,
    FEWEST_STEPS,
    MOST_CHAT,
    TOKENS_PER_PARAMETER,
    Phase,
    Recipe,
    Task,
    batch_tokens,
    chat_phase,
    for_published,
    from_scratch,
    held_out_fraction,
    most_tokens,
)
from megaphase.model.presets import PRESETS
from megaphase.plan.task_corpora import open_streams, open_task_corpus
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError

HOUR = 3600.0
# Sequence lengths: of models from so many parameters on; of published models at most; at least.
LENGTHS = ((5e9, 4096), (1e8, 2048), (1e7, 1024), (0, 512))
PUBLISHED_LENGTH, SHORTEST = 4096, 16
# Samples that an epoch of the smallest task has at least, where that is possible.
FEWEST_SAMPLES = 20
MORE_HELD_OUT, MOST_HELD_OUT = 1.5, 0.5


@dataclass(frozen=True)
class Answers:
    """What the user has said.

    Attributes:
        low: names of low-resource tasks; of a published model, those that are new to it.
        model: a preset, a size or `auto`; None if a checkpoint is given.
        out: the run file, whose place is used for messages and paths.
        wants_no_low: whether the user has said that no task is low-resource.
    """

    corpora: list[FoundCorpus]
    low: list[str]
    gpus: GPUs
    hours: float
    tokenizer: Tokenizer
    out: Path
    model: str | None = None
    checkpoint: str | None = None
    wants_no_low: bool = False

    def chats(self) -> set[str]:
        """Return the names of the corpora of conversations, which get a phase of their own: all of
        them, unless a model would be trained from scratch on nothing else."""
        found = {each.name for each in self.corpora if each.manifest.kind == "chat"}
        is_all = self.checkpoint is None and len(found) == len(self.corpora)
        return set() if is_all else found


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        held_out: fraction of every task's documents, and the number of those documents.
        notes: warnings, one sentence each.
    """

    answers: Answers
    model: BaseModel
    seq_len: int
    tasks: list[Task]
    held_out: dict[str, tuple[float, int]]
    recipe: Recipe
    layout: Layout
    notes: list[str] = field(default_factory=list)

    @property
    def batch(self) -> int:
        """Tokens of a step."""
        return self.layout.setup.samples * self.seq_len

    @property
    def hours(self) -> float:
        """The time of all phases at the speed that is to be expected."""
        return self.recipe.tokens / self.layout.tokens_per_second / HOUR


def choose(answers: Answers) -> Choice:
    """Return what suits the answers.

    Raises:
        InputError: a checkpoint does not suit the corpora, nothing fits, or the text is too little.
    """
    notes: list[str] = []
    vocab = answers.tokenizer.vocab_size
    if answers.checkpoint is not None:
        model = published_model(answers.checkpoint, answers.tokenizer)
    elif answers.model == AUTO:
        model = _suggested(answers)
    else:
        model = named_model(answers.model or "", vocab)
    notes += [model.note] if model.note else []
    seq_len = _sequence_length(model, answers.corpora, notes)
    config, held_out = _held_out(answers, seq_len)
    tasks = _tasks(answers, config)
    recipe, layout = _recipe_and_layout(answers, model, seq_len, tasks)
    choice = Choice(answers, model, seq_len, tasks, held_out, recipe, layout, notes)
    notes += _remarks(choice)
    return choice


def _suggested(answers: Answers) -> BaseModel:
    """Return the largest preset that fits and sees enough tokens for its parameters, in these hours
    and of this text; the smallest one if none does."""
    vocab = answers.tokenizer.vocab_size
    chats = answers.chats()
    text = [
        Task(each.name, each.name in answers.low, each.manifest.tokens)
        for each in answers.corpora
        if each.name not in chats
    ]
    there = most_tokens(text, published=False)
    for name in reversed(PRESETS):
        model = preset_model(name, vocab)
        wanted = TOKENS_PER_PARAMETER * model.parameters
        if there < wanted:
            continue
        seq_len = _sequence_length(model, answers.corpora, [])
        samples = _samples(batch_tokens(model.parameters), seq_len, answers.gpus)
        layout = find_layout(
            shape_of(model.shape, seq_len), answers.gpus, samples, masked=_masked(answers)
        )
        if layout is None or layout.setup.offload != "none":
            continue
        if layout.tokens_per_second * answers.hours * HOUR >= wanted:
            return model
    return preset_model(next(iter(PRESETS)), vocab)


def suggested_model(answers: Answers) -> str:
    """Return the name of the preset that `auto` takes."""
    return str(_suggested(answers).section["preset"])


def _masked(answers: Answers) -> bool:
    return any(each.manifest.kind != "lm" for each in answers.corpora)


def _sequence_length(model: BaseModel, corpora: Sequence[FoundCorpus], notes: list[str]) -> int:
    """Return a length of which the smallest corpus has enough samples."""
    if model.checkpoint is not None:
        if model.shape.position == "learned":
            return model.shape.seq_len
        length = min(PUBLISHED_LENGTH, model.shape.seq_len)
    else:
        length = next(length for least, length in LENGTHS if model.parameters >= least)
    usual = length
    # Pairs and conversations are packed: each is a document of a sample.
    texts = [each for each in corpora if each.manifest.kind == "lm"] or corpora
    fewest = min(each.manifest.tokens for each in texts)
    while length > SHORTEST and length * FEWEST_SAMPLES > fewest:
        length //= 2
    if length < usual:
        smallest = min(texts, key=lambda each: each.manifest.tokens)
        notes.append(
            f"seq_len is {length} in place of {usual}, since {smallest.name} has only "
            f"{fewest:,} tokens"
        )
    return length


def _held_out(answers: Answers, seq_len: int) -> tuple[RunConfig, dict[str, tuple[float, int]]]:
    """Return a provisional run file with held-out fractions under which every task has documents to
    train on and to validate on, and the fractions with the documents that they hold out."""
    fractions = {each.name: held_out_fraction(each.manifest.documents) for each in answers.corpora}
    while True:
        config = provisional_config(answers, seq_len, fractions)
        corpora = {name: open_task_corpus(config, name, answers.tokenizer) for name in config.tasks}
        held_out = open_streams(config, corpora, None, "validation")
        short = [
            name
            for name, stream in held_out.items()
            if (stream.tokens < 2 or not stream.has_target(config.validation.samples))
            and fractions[name] < MOST_HELD_OUT
        ]
        if not short:
            found = {name: (fractions[name], stream.documents) for name, stream in held_out.items()}
            return config, found
        for name in short:
            more = float(f"{fractions[name] * MORE_HELD_OUT:.1e}")
            fractions[name] = min(MOST_HELD_OUT, more)


def provisional_config(answers: Answers, seq_len: int, fractions: dict[str, float]) -> RunConfig:
    """Return a run file with the tasks and a phase that stands for all."""
    first = answers.corpora[0].name
    data: dict[str, Any] = {
        "output": "runs/provisional",
        "tokenizer": str(answers.tokenizer.path.absolute()),
        "tasks": {
            each.name: {
                "corpus": str(each.prefix.absolute()),
                "kind": each.manifest.kind,
                "held_out": fractions[each.name],
            }
            for each in answers.corpora
        },
        "model": {"preset": next(iter(PRESETS)), "seq_len": seq_len},
        "batch": {"samples": 1, "micro": 1},
        "phases": [
            {
                "name": "any",
                "steps": 1,
                "mixture": {"rates": {first: 1.0}},
                "learning_rate": {"peak": 1e-4},
            }
        ],
    }
    return run_config(answers.out, data)


def _tasks(answers: Answers, config: RunConfig) -> list[Task]:
    """Return the tasks with the tokens of an epoch of their training samples."""
    corpora = {name: open_task_corpus(config, name, answers.tokenizer) for name in config.tasks}
    streams = open_streams(config, corpora, None, "training")
    tasks = []
    for name, stream in streams.items():
        # Samples of packed pairs are not full; the last sample of a text is not either.
        whole = stream.samples_per_epoch * stream.seq_len
        tokens = min(stream.tokens, whole)
        if stream.samples_per_epoch < 2:
            raise InputError(
                f"--corpus {corpora[name].prefix}",
                f"has {stream.tokens:,} tokens to train on, too few for {name} to be a task",
                "add text, or leave it out",
            )
        tasks.append(Task(name, name in answers.low, tokens, name in answers.chats()))
    return sorted(tasks, key=lambda task: (task.chat, task.low, -task.tokens))


def _samples(tokens: int, seq_len: int, gpus: GPUs) -> int:
    """Return the samples of a batch of about so many tokens, a multiple of the number of GPUs by a
    power of two."""
    samples = gpus.count
    while samples * 2 * seq_len <= tokens:
        samples *= 2
    return samples


def _recipe_and_layout(
    answers: Answers, model: BaseModel, seq_len: int, tasks: list[Task]
) -> tuple[Recipe, Layout]:
    """Return the phases and the layout; the batch is made smaller where the run is short."""
    gpus, shape = answers.gpus, shape_of(model.shape, seq_len)
    published = model.checkpoint is not None
    samples = _samples(batch_tokens(model.parameters), seq_len, gpus)
    chats = [task for task in tasks if task.chat]
    texts = [task for task in tasks if not task.chat]
    of_chats = CHAT_EPOCHS * sum(task.tokens for task in chats)
    there = most_tokens(texts, published) if texts else of_chats
    layout = find_layout(shape, gpus, samples, masked=_masked(answers))
    if layout is None:
        raise need_more(shape, gpus, f"a model of {model.parameters:,} parameters")
    usual, wanted = samples, layout.tokens_per_second * answers.hours * HOUR
    while min(wanted, there) < FEWEST_STEPS * samples * seq_len and samples > gpus.count:
        samples //= 2
    if samples < usual:
        # Smaller batches need no more memory, but are slower.
        layout = find_layout(shape, gpus, samples, masked=_masked(answers)) or layout
        wanted = layout.tokens_per_second * answers.hours * HOUR
    where, batch = "--hours" if gpus.is_cpu else f"--gpus {gpus.count}", samples * seq_len
    last: list[Phase] = []
    if chats:
        most, smallest = (MOST_CHAT if texts else 1.0) * wanted, layout.setup.data
        last = [chat_phase(chats, most, samples, seq_len, smallest, model.parameters, where)]
        wanted -= last[0].tokens
    if not texts:
        return Recipe(last, of_chats < most), layout
    if published:
        recipe = for_published(
            texts, wanted, batch, model.parameters, where, new_rows=model.new_tokens
        )
    else:
        recipe = from_scratch(texts, wanted, batch, model.parameters, where)
    return replace(recipe, phases=[*recipe.phases, *last]), layout


def _remarks(choice: Choice) -> list[str]:
    """Return what the user should know of what was chosen."""
    remarks, model = [], choice.model
    high = [task for task in choice.tasks if not task.low and not task.chat]
    low = [task for task in choice.tasks if task.low]
    per_parameter = choice.recipe.tokens / model.parameters
    if model.checkpoint is None:
        if not high or (not low and not choice.answers.wants_no_low):
            what = "low" if not low else "high"
            remarks.append(
                f"no task is {what}-resource, so there is one phase; two phases are for corpora of "
                "very different sizes"
            )
        if per_parameter < TOKENS_PER_PARAMETER / 2:
            remarks.append(
                f"the model sees {per_parameter:.1f} tokens a parameter where about "
                f"{TOKENS_PER_PARAMETER} are usual: hours or text are too little for its size"
            )
    elif not high:
        remarks.append(
            "there is no text of the model's own languages, which it will forget; add corpora of "
            "them, and of code, for replay"
        )
    elif not low:
        remarks.append("no task is new to the model: name those that it is to learn with --low")
    if choice.layout.setup.offload != "none":
        remarks.append(
            "optimizer state is offloaded to the nodes' memory, which takes time that is not "
            "estimated: expect more hours, or take more GPUs"
        )
    few = [name for name, (_, documents) in choice.held_out.items() if documents < 100]
    if few:
        remarks.append(
            f"the validation losses of {', '.join(few)} are of fewer than 100 documents each, and "
            "noisy"
        )
    return remarks
