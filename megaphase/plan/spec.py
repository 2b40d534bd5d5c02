"""What determines a plan: the streams of all tasks and the length and mixture of every phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import numpy as np

from megaphase.config.run import RunConfig
from megaphase.corpus import Corpus
from megaphase.corpus.integrity import check_files
from megaphase.corpus.manifest import MANIFEST_SUFFIX, corpus_file
from megaphase.plan.batch_schedule import BatchSchedule
from megaphase.plan.mixture import MixtureConfig, TaskSupply, requested_rates
from megaphase.plan.packed_stream import PackedStream
from megaphase.plan.stream import Stream
from megaphase.tokenizer import Tokenizer
from megaphase.utils.decimals import as_written
from megaphase.utils.errors import InputError
from megaphase.utils.files import hash_json
from megaphase.utils.seeds import derive_key

FORMAT_VERSION = 3
HELD_OUT_SEED = 0

# Per phase; with 64-bit arithmetic on weights and ordinals it can never overflow.
MOST_SAMPLES = 1 << 48


@dataclass(frozen=True)
class PhaseSpec:
    """The part of a phase that determines its plan.

    Attributes:
        steps: optimizer steps.
        batch: the samples of each of them.
        mixture: its `over` is a list of tasks, not a role.
        where: the mixture's place in the run file, for messages.
        order_key: for `order: random`.
    """

    name: str
    steps: int
    batch: BatchSchedule
    mixture: MixtureConfig
    where: str
    order: Literal["balanced", "random"]
    order_key: int

    @property
    def samples(self) -> int:
        """The samples of all its steps."""
        return self.batch.samples_before(self.steps)


@dataclass(frozen=True)
class PlanSpec:
    """Everything that determines a plan, and nothing else: equal specs have equal plans.

    Attributes:
        used: samples of each task used by the run from which this one starts; the first phase's
            ordinals begin there.
        bos: the input from which the first token of a document is predicted; None: the EOD of the
            document before it.
    """

    streams: dict[str, Stream]
    held_out: dict[str, Stream]
    phases: list[PhaseSpec]
    seq_len: int
    fingerprint: str
    used: dict[str, int]
    bos: int | None = None

    def tokens_at(self, phase: int, step: int) -> int:
        """The tokens of a step's global batch; step: 0-based in the phase."""
        return self.phases[phase].batch.samples_at(step) * self.seq_len

    @property
    def stream_fingerprints(self) -> dict[str, str]:
        """Return, for every task, a hash of everything that determines its training samples.

        If a task's hash is equal in two runs, they read the same sample for the same ordinal.
        """
        return {
            task: hash_json([FORMAT_VERSION, stream.fingerprint])
            for task, stream in self.streams.items()
        }


def task_supply(streams: Mapping[str, Stream], used: Mapping[str, int]) -> dict[str, TaskSupply]:
    """Return the supply of every task for mixtures; `used`: its samples that are already used."""
    return {
        task: TaskSupply(stream.tokens, stream.samples_per_epoch, used[task])
        for task, stream in streams.items()
    }


def _phase_steps(
    config: RunConfig,
    number: int,
    batch: BatchSchedule,
    mixture: MixtureConfig,
    supply: Mapping[str, TaskSupply],
) -> int:
    """Return the optimizer steps of a phase; a budget in tokens or epochs is rounded up."""
    phase = config.phases[number]
    if phase.steps is not None:
        return phase.steps
    if phase.tokens is not None:
        return batch.steps_for(-(-phase.tokens // config.model.seq_len))
    assert phase.epochs is not None
    rates = requested_rates(mixture, supply)
    for task in phase.epochs:
        if rates[task] == 0:
            raise InputError(
                config.where(f"phases[{number}].epochs.{task}"),
                f"{phase.name} never sees {task}, whose rate is 0",
                "give it a rate in the mixture, or leave it out here",
            )
    return min(
        batch.steps_for(ceil(_samples(epochs, supply[task]) / rates[task]))
        for task, epochs in phase.epochs.items()
    )


def _samples(epochs: float, supply: TaskSupply) -> int:
    """Return the samples of a task in `epochs` epochs."""
    return ceil(as_written(epochs) * supply.samples_per_epoch)


def open_task_corpus(config: RunConfig, task: str, tokenizer: Tokenizer) -> Corpus:
    """Open a task's corpus.

    Raises:
        InputError: it is missing, damaged, or of another kind or tokenizer than in the run file.
    """
    corpus = Corpus.open(config.tasks[task].corpus)
    if corpus.manifest.tokenizer_hash != tokenizer.fingerprint:
        raise InputError(
            config.where(f"tasks.{task}.corpus"),
            f"{corpus.prefix} was tokenized with another tokenizer than {config.tokenizer}",
            "tokenize it again with that one, or name the other one under tokenizer",
        )
    _check_kind(config, task, corpus)
    return corpus


def _check_kind(config: RunConfig, task: str, corpus: Corpus) -> None:
    """Reject a corpus of texts for a task of translation pairs, and the reverse."""
    asked, found = config.tasks[task].kind, corpus.manifest.kind
    if asked != found:
        holds = {"lm": "texts", "translation": "translation pairs"}[found]
        raise InputError(
            config.where(f"tasks.{task}.kind"),
            f"is {asked}, but {corpus.prefix} holds {holds}",
            f"write kind: {found}, or name another corpus",
        )
    if (found == "translation") != (corpus.manifest.tag is not None):
        raise InputError(
            corpus_file(corpus.prefix, MANIFEST_SUFFIX),
            f"tag: {corpus.manifest.tag} does not go with kind: {found}",
            "tokenize again",
        )


def _bos(config: RunConfig, tokenizer: Tokenizer) -> int | None:
    """Return the token that `bos` puts at the start of documents; None if it puts none there.

    Raises:
        InputError: the tokenizer has no such token.
    """
    if not (tokenizer.adds_bos if config.bos is None else config.bos):
        return None
    if tokenizer.bos is None:
        raise InputError(
            config.where("bos"),
            f"is true, but {config.tokenizer} has no token that begins a document",
            "leave it out",
        )
    return tokenizer.bos


def _streams(
    config: RunConfig, corpora: dict[str, Corpus], bos: int | None, held_out: bool
) -> dict[str, Stream]:
    stream_classes = {"lm": Stream, "translation": PackedStream}
    return {
        task: stream_classes[config.tasks[task].kind](
            task,
            corpus,
            # Runs with different seeds are validated on the same samples, so they can be compared.
            seed=HELD_OUT_SEED if held_out else config.seed,
            seq_len=config.model.seq_len,
            fraction=config.held_out_fraction(task),
            held_out=held_out,
            subsample=config.tasks[task].trained_on,
            tag=corpus.manifest.tag,
            attend_across_documents=config.tasks[task].attends_across_documents,
            # A sample of translation pairs begins with a source, for which it has no place.
            bos=bos if config.tasks[task].kind == "lm" else None,
        )
        for task, corpus in corpora.items()
    }


def _check_task(config: RunConfig, task: str, training: Stream, held_out: Stream) -> None:
    """Reject a corpus with a damaged index, or too small to train or validate on."""
    corpus = training.corpus
    found, stated = int(np.sum(corpus.lengths, dtype=np.int64)), corpus.manifest.tokens
    if found != stated:
        raise InputError(
            f"{corpus.prefix}.idx",
            f"its lengths sum to {found:,} tokens, the manifest says {stated:,}",
            "tokenize again",
        )
    # With packing, a single document makes a sample.
    if not isinstance(training, PackedStream) and stated <= training.seq_len:
        raise InputError(
            config.where(f"tasks.{task}.corpus"),
            f"{corpus.prefix} has {stated:,} tokens, fewer than one sample of seq_len + 1 = "
            f"{training.seq_len + 1:,}",
            "add text or lower model.seq_len",
        )
    _check_held_out(config, task, held_out)
    _check_training(config, task, training, held_out)


def _documents(stream: Stream) -> str:
    return f"of the {stream.corpus.manifest.documents:,} documents of {stream.corpus.prefix}"


def _check_held_out(config: RunConfig, task: str, held_out: Stream) -> None:
    """Reject a held-out fraction that leaves nothing to validate on."""
    where = config.where(config.held_out_key(task))
    fraction, of_documents = config.held_out_fraction(task), _documents(held_out)
    if held_out.tokens < 2:
        raise InputError(where, f"{fraction:g} holds out none {of_documents}", "raise it")
    if not held_out.has_target(config.validation.samples):
        raise InputError(
            where,
            f"{fraction:g} holds out {held_out.documents:,} {of_documents}, and none of "
            "the validation samples has a target",
            "raise it, or tokenize again",
        )


def _check_training(config: RunConfig, task: str, training: Stream, held_out: Stream) -> None:
    """Reject a held-out fraction or a subsample that leaves too little to train on."""
    packed = isinstance(training, PackedStream)
    if training.tokens > (0 if packed else training.seq_len):
        return
    subsample, of_documents = config.tasks[task].subsample, _documents(training)
    if subsample is None:
        key, change = config.held_out_key(task), "lower it"
        fraction = config.held_out_fraction(task)
        taken = f"{fraction:g} holds out {held_out.documents:,} {of_documents}"
    else:
        key, change = f"tasks.{task}.subsample", "raise it"
        taken = f"{subsample:g} takes {training.documents:,} {of_documents}"
    if packed:
        left, remedy = "none is left to train on", f"{change} or add text"
    else:
        left = (
            f"the {training.tokens:,} tokens that are left are fewer than one sample of "
            f"seq_len + 1 = {training.seq_len + 1:,}"
        )
        remedy = f"{change}, add text or lower model.seq_len"
    raise InputError(config.where(key), f"{taken}, and {left}", remedy)


def _splits_of_tasks(config: RunConfig) -> dict[str, Any]:
    """Return the splits that differ from the default; nothing if none does."""
    held_out = {task: config.held_out_fraction(task) for task in config.tasks}
    subsample = {task: settings.trained_on for task, settings in config.tasks.items()}
    facts = {
        "held_out_fractions": _other_than(config.validation.fraction, held_out),
        "subsample": _other_than(1, subsample),
    }
    return {name: of_tasks for name, of_tasks in facts.items() if of_tasks}


def _other_than(usual: float, of_tasks: dict[str, float]) -> dict[str, float]:
    return {task: value for task, value in of_tasks.items() if value != usual}


def _phase_spec(config: RunConfig, number: int, supply: Mapping[str, TaskSupply]) -> PhaseSpec:
    phase, mixture = config.phases[number], config.phases[number].mixture
    if mixture.over is not None:
        mixture = mixture.model_copy(update={"over": config.selected_tasks(mixture.over)})
    batch = BatchSchedule.constant(config.batch.samples)
    steps = _phase_steps(config, number, batch, mixture, supply)
    samples = batch.samples_before(steps)
    if samples > MOST_SAMPLES:
        raise InputError(
            config.where(f"phases[{number}].{phase.length_key}"),
            f"{phase.name} has {samples:,} samples, more than {MOST_SAMPLES:,}",
            "shorten the phase",
        )
    _check_schedule(config, number, steps)
    return PhaseSpec(
        phase.name,
        steps,
        batch,
        mixture,
        config.where(f"phases[{number}].mixture"),
        phase.order,
        derive_key(config.seed, "order", phase.name),
    )


def _check_schedule(config: RunConfig, number: int, steps: int) -> None:
    """Reject a warm-up or decay that is longer than the phase."""
    rate = config.phases[number].learning_rate
    problem = rate.too_long_for(steps) if rate.steps is None else None
    if problem is not None:
        raise InputError(config.where(f"phases[{number}].learning_rate"), problem)


def check_corpora(config: RunConfig, number: int = 0, of: int = 1) -> None:
    """Compare the corpora's files with their manifests, see `megaphase.corpus.integrity`.

    Args:
        number: index of this process among the `of` processes that share the work.

    Raises:
        InputError: a corpus is missing, or one of its files was altered.
    """
    prefixes = dict.fromkeys(task.corpus for task in config.tasks.values())
    check_files([Corpus.open(prefix) for prefix in prefixes], number, of)


def plan_spec(
    config: RunConfig, tokenizer: Tokenizer, used: Mapping[str, int] | None = None
) -> PlanSpec:
    """Open the corpora, see `check_corpora`, and return what determines the plan.

    Args:
        used: samples of each task used by the run from which this one starts; none by default.

    Raises:
        InputError: a corpus is missing, damaged, too short, of another kind or tokenizer; no
            document of a task is held out; the tokenizer lacks the token that `bos` asks for; or a
            phase never reaches the epochs that end it.
    """
    used = {task: (used or {}).get(task, 0) for task in config.tasks}
    seq_len = config.model.seq_len
    corpora = {task: open_task_corpus(config, task, tokenizer) for task in config.tasks}
    bos = _bos(config, tokenizer)
    training = _streams(config, corpora, bos, held_out=False)
    held_out = _streams(config, corpora, bos, held_out=True)
    for task in config.tasks:
        _check_task(config, task, training[task], held_out[task])
    supply = task_supply(training, used)
    phases = [_phase_spec(config, i, supply) for i in range(len(config.phases))]
    fingerprint = hash_json(
        ({"used": used} if any(used.values()) else {})
        | ({} if bos is None else {"bos": bos})
        | _splits_of_tasks(config)
        | {
            "format": FORMAT_VERSION,
            "seed": config.seed,
            "seq_len": seq_len,
            "samples_per_step": config.batch.samples,
            "held_out_fraction": config.validation.fraction,
            "corpora": {task: corpus.fingerprint for task, corpus in corpora.items()},
            "tags": {task: corpus.manifest.tag for task, corpus in corpora.items()},
            "attend_across_documents": {
                name: task.attends_across_documents for name, task in config.tasks.items()
            },
            "phases": [
                [phase.name, phase.steps, phase.mixture.model_dump(mode="json"), phase.order]
                for phase in phases
            ],
            "order_of_tasks": list(config.tasks),
        }
    )
    return PlanSpec(training, held_out, phases, seq_len, fingerprint, used, bos)
