"""What a plan is made of: the streams of all tasks and the length and mixture of every phase."""

from __future__ import annotations

from dataclasses import dataclass

from megaphase.config import MixtureConfig, PhaseConfig, RunConfig
from megaphase.corpus import Corpus
from megaphase.errors import InputError
from megaphase.files import hash_json
from megaphase.plan.stream import Stream
from megaphase.tokenizer import Tokenizer

FORMAT_VERSION = 1


@dataclass(frozen=True)
class PhaseSpec:
    """A phase's name, its optimizer steps, its mixture and the mixture's key in the run file."""

    name: str
    steps: int
    mixture: MixtureConfig
    where: str


@dataclass(frozen=True)
class PlanSpec:
    """Everything that determines a plan, and nothing else: same spec, same plan."""

    streams: dict[str, Stream]
    held_out: dict[str, Stream]
    phases: list[PhaseSpec]
    samples_per_step: int
    seq_len: int
    fingerprint: str


def phase_steps(phase: PhaseConfig, tokens_per_step: int) -> int:
    """Optimizer steps of a phase; a budget in tokens is rounded up to whole steps."""
    if phase.steps is not None:
        return phase.steps
    assert phase.tokens is not None
    return -(-phase.tokens // tokens_per_step)


def _open_corpus(config: RunConfig, task: str, tokenizer: Tokenizer) -> Corpus:
    corpus = Corpus.open(config.tasks[task].corpus)
    if corpus.manifest.tokenizer_hash != tokenizer.fingerprint:
        raise InputError(
            config.where(f"tasks.{task}.corpus"),
            f"{corpus.prefix} was tokenized with another tokenizer than {config.tokenizer}",
            "tokenize it again with that one, or name the other one under tokenizer",
        )
    return corpus


def _streams(config: RunConfig, corpora: dict[str, Corpus], held_out: bool) -> dict[str, Stream]:
    return {
        task: Stream(
            task,
            corpus,
            seed=config.seed,
            seq_len=config.model.seq_len,
            fraction=config.validation.fraction,
            held_out=held_out,
        )
        for task, corpus in corpora.items()
    }


def _check_task(config: RunConfig, task: str, training: Stream, held_out: Stream) -> None:
    """Refuse a corpus whose index is damaged, and one that is too small to train or validate on."""
    where, corpus = config.where(f"tasks.{task}.corpus"), training.corpus
    found, said = training.tokens + held_out.tokens, corpus.manifest.tokens
    if found != said:
        raise InputError(
            f"{corpus.prefix}.idx",
            f"its lengths sum to {found:,} tokens, the manifest says {said:,}",
            "tokenize again",
        )
    if said <= training.seq_len:
        raise InputError(
            where,
            f"{corpus.prefix} has {said:,} tokens, fewer than one sample of seq_len + 1 = "
            f"{training.seq_len + 1:,}",
            "add text or lower model.seq_len",
        )
    fraction = config.validation.fraction
    of_documents = f"of the {corpus.manifest.documents:,} documents of {corpus.prefix}"
    if held_out.tokens < 2:
        raise InputError(
            config.where("validation.fraction"),
            f"{fraction:g} holds out none {of_documents}",
            "raise it",
        )
    if training.tokens <= training.seq_len:
        raise InputError(
            config.where("validation.fraction"),
            f"{fraction:g} holds out {held_out.documents:,} {of_documents}, and the "
            f"{training.tokens:,} tokens that are left are fewer than one sample of seq_len + 1 = "
            f"{training.seq_len + 1:,}",
            "lower it, add text or lower model.seq_len",
        )


def plan_spec(config: RunConfig, tokenizer: Tokenizer) -> PlanSpec:
    """Open the corpora and put together what the plan is made of.

    Raises:
        InputError: a corpus is missing, damaged, too short or of another tokenizer, or no document
            of a task is held out.
    """
    seq_len = config.model.seq_len
    corpora = {task: _open_corpus(config, task, tokenizer) for task in config.tasks}
    training = _streams(config, corpora, held_out=False)
    held_out = _streams(config, corpora, held_out=True)
    for task in config.tasks:
        _check_task(config, task, training[task], held_out[task])
    phases = [
        PhaseSpec(
            phase.name,
            phase_steps(phase, config.batch.samples * seq_len),
            phase.mixture,
            config.where(f"phases[{i}].mixture"),
        )
        for i, phase in enumerate(config.phases)
    ]
    fingerprint = hash_json(
        {
            "format": FORMAT_VERSION,
            "seed": config.seed,
            "seq_len": seq_len,
            "samples_per_step": config.batch.samples,
            "held_out_fraction": config.validation.fraction,
            "corpora": {task: corpus.fingerprint for task, corpus in corpora.items()},
            "phases": [[p.name, p.steps, p.mixture.model_dump(mode="json")] for p in phases],
            "order_of_tasks": list(config.tasks),
        }
    )
    return PlanSpec(training, held_out, phases, config.batch.samples, seq_len, fingerprint)
