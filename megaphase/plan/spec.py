"""What determines a plan: the streams of all tasks and the length and mixture of every phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any, Literal

from megaphase.config.run import RunConfig
from megaphase.corpus import Corpus
from megaphase.corpus.integrity import check_files
from megaphase.plan.batch_schedule import BatchSchedule
from megaphase.plan.build_pool import ReportProgress
from megaphase.plan.built_folder import Say
from megaphase.plan.corpus_counts import CorpusCounts
from megaphase.plan.mixture import MixtureConfig, TaskSupply, requested_rates
from megaphase.plan.position import SampleKind, StreamPosition
from megaphase.plan.stream import Stream
from megaphase.plan.task_corpora import bos_token, check_task, check_task_corpus, open_streams
from megaphase.plan.task_stream import TaskStream
from megaphase.tokenizer import Tokenizer
from megaphase.utils.decimals import as_written
from megaphase.utils.errors import InputError
from megaphase.utils.files import hash_json
from megaphase.utils.seeds import derive_key

FORMAT_VERSION = 3

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
        kind: of its samples.
    """

    name: str
    steps: int
    batch: BatchSchedule
    mixture: MixtureConfig
    where: str
    order: Literal["balanced", "random"]
    order_key: int
    kind: SampleKind

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
        segments: of the tasks of which samples of another length than `seq_len` are used.
        held_out, test: the documents for validation, and the test split of the tasks that have one.
        seq_len: of the `model` section of the run file; phases may have others.
        bos: the input from which the first token of a document is predicted; None: the EOD of the
            document before it.
        known: numbers of the corpora.
    """

    streams: dict[str, Stream]
    held_out: dict[str, Stream]
    phases: list[PhaseSpec]
    seq_len: int
    fingerprint: str
    used: dict[str, int]
    bos: int | None = None
    segments: dict[str, StreamPosition] = field(default_factory=dict)
    test: dict[str, Stream] = field(default_factory=dict)
    known: CorpusCounts = field(default_factory=CorpusCounts)

    def tokens_at(self, phase: int, step: int) -> int:
        """The tokens of a step's global batch; step: 0-based in the phase."""
        return self.phases[phase].batch.samples_at(step) * self.phases[phase].kind.seq_len

    @property
    def kind(self) -> SampleKind:
        """The kind of samples that a plain number counts, in `used` and in stored positions."""
        return SampleKind(self.seq_len)

    @cached_property
    def starts(self) -> list[StreamPosition]:
        """The positions from which the tasks' streams continue in the first phase."""
        return [
            self.segments.get(task) or StreamPosition().after(self.kind, samples)
            for task, samples in self.used.items()
        ]

    @cached_property
    def has_one_kind(self) -> bool:
        """Whether all samples are of one kind, also those of the runs that this one continues."""
        first = self.phases[0].kind
        return (
            first.cut == "tokens"
            and all(phase.kind == first for phase in self.phases)
            and all(start.is_plain(first) for start in self.starts)
        )

    @cached_property
    def task_streams(self) -> dict[str, TaskStream]:
        """The streams over changes of the samples' length."""
        kinds = [phase.kind for phase in self.phases]
        return {task: TaskStream.of(stream, kinds) for task, stream in self.streams.items()}

    def store_tables(
        self,
        folder: Path | None,
        say: Say = lambda _: None,
        progress: ReportProgress = lambda *_: None,
        *,
        whole: bool = False,
        read_only: bool = False,
    ) -> None:
        """Say where tables of packed documents are stored, what to call while they are built, and
        whether to verify them whole, and to store no others; see DocumentTables."""
        for stream in self.streams.values():
            stream.tables.folder, stream.tables.read_only = folder, read_only
            stream.tables.whole = whole
            stream.tables.say, stream.tables.progress = say, progress

    def supply(self, phase: int, positions: Sequence[StreamPosition]) -> dict[str, TaskSupply]:
        """Return every task's supply for the mixture of a phase; `positions`: at its start."""
        return supply(self.task_streams, self.phases[phase].kind, positions)

    @property
    def has_plain_kind(self) -> bool:
        """Whether all samples are of `kind`, so that numbers of samples say everything."""
        return self.has_one_kind and self.phases[0].kind == self.kind

    @property
    def stream_fingerprints(self) -> dict[str, str]:
        """Return the streams' fingerprints with samples of `seq_len`, see the next method."""
        return self.stream_fingerprints_at(self.seq_len)

    def stream_fingerprints_at(self, seq_len: int) -> dict[str, str]:
        """Return, for every task, a hash of everything that determines its training samples.

        If a task's hash is equal in two runs, they read the same sample for the same position.
        """
        return {
            task: hash_json([FORMAT_VERSION, stream.fingerprint_at(seq_len)])
            for task, stream in self.streams.items()
        }


def supply(
    streams: Mapping[str, TaskStream], kind: SampleKind, positions: Sequence[StreamPosition]
) -> dict[str, TaskSupply]:
    """Return every task's supply of samples of a kind for a mixture, after these positions."""
    return {
        task: stream.supply(kind, position)
        for (task, stream), position in zip(streams.items(), positions, strict=True)
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
        return batch.steps_for(-(-phase.tokens // config.phase_model(number).seq_len))
    assert phase.epochs is not None
    rates = requested_rates(mixture, supply)
    for task in phase.epochs:
        if rates[task] == 0:
            raise InputError(
                config.where(f"phases[{number}].epochs.{task}"),
                f"{phase.name} never sees {task}, whose rate is 0",
                "give it a rate in the mixture, or leave it out here",
            )
    needed = {
        task: ceil(_samples(epochs, supply[task]) / rates[task])
        for task, epochs in phase.epochs.items()
    }
    task = min(needed, key=needed.__getitem__)
    if needed[task] > MOST_SAMPLES:
        raise InputError(
            config.where(f"phases[{number}].epochs.{task}"),
            f"{phase.name} would have more than {MOST_SAMPLES:,} samples, as the rate of {task} is "
            f"{float(rates[task]):.1g}",
            "raise that rate in the mixture, or ask for fewer epochs",
        )
    return batch.steps_for(needed[task])


def _samples(epochs: float, supply: TaskSupply) -> int:
    """Return the samples of a task in `epochs` epochs."""
    return ceil(as_written(epochs) * supply.samples_per_epoch)


def _splits_of_tasks(config: RunConfig) -> dict[str, Any]:
    """Return the splits that differ from the default; nothing if none does."""
    held_out = {task: config.held_out_fraction(task) for task in config.tasks}
    test = {task: config.test_fraction(task) for task in config.tasks}
    subsample = {task: settings.trained_on for task, settings in config.tasks.items()}
    facts = {
        "held_out_fractions": _other_than(config.validation.fraction, held_out),
        "test_fractions": _other_than(0, test),
        "subsample": _other_than(1, subsample),
    }
    return {name: of_tasks for name, of_tasks in facts.items() if of_tasks}


def _other_than(usual: float, of_tasks: dict[str, float]) -> dict[str, float]:
    return {task: value for task, value in of_tasks.items() if value != usual}


def phase_specs(config: RunConfig, supplies: Sequence[Mapping[str, TaskSupply]]) -> list[PhaseSpec]:
    """Return what determines the plan of every phase; supplies: of every phase."""
    phases: list[PhaseSpec] = []
    tokens = 0
    for number, supply in enumerate(supplies):
        batch = config.phase_batch(number)
        phases.append(_phase_spec(config, number, batch.schedule(tokens), supply))
        tokens += phases[-1].samples * batch.seq_len
    return phases


def _phase_spec(
    config: RunConfig, number: int, batch: BatchSchedule, supply: Mapping[str, TaskSupply]
) -> PhaseSpec:
    phase, mixture = config.phases[number], config.phases[number].mixture
    if mixture.over is not None:
        mixture = mixture.model_copy(update={"over": config.selected_tasks(mixture.over)})
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
        _phase_kind(config, number),
    )


def _phase_kind(config: RunConfig, number: int) -> SampleKind:
    return SampleKind(config.phase_model(number).seq_len, config.phases[number].cut)


def _batches(phases: Sequence[PhaseSpec]) -> dict[str, Any]:
    """Return the batches of all steps, in one number where there is one."""
    stages = [phase.batch.within(phase.steps) for phase in phases]
    sizes = {stage.samples for of_phase in stages for stage, _ in of_phase}
    return {"samples_per_step": sizes.pop()} if len(sizes) == 1 else {"batches": stages}


def _check_schedule(config: RunConfig, number: int, steps: int) -> None:
    """Reject a warm-up or decay that is longer than the phase, and an average that never begins."""
    rate = config.phases[number].learning_rate
    problem = rate.too_long_for(steps) if rate.steps is None else None
    if problem is not None:
        raise InputError(config.where(f"phases[{number}].learning_rate"), problem)
    average = config.phases[number].average
    if average is None:
        return
    for key, value, remedy in [
        ("from_step", average.from_step, "begin the average earlier"),
        ("every_steps", average.every_steps, "take the weights more often"),
    ]:
        if value > steps:
            raise InputError(
                config.where(f"phases[{number}].average.{key}"),
                f"is {value:,}, but the phase has {steps:,} step{'' if steps == 1 else 's'}",
                remedy,
            )


def _check_new_tokens(config: RunConfig, vocab_size: int) -> None:
    """Reject a phase that would train the rows of no token."""
    for number, phase in enumerate(config.phases):
        if phase.first_new_token is not None and phase.first_new_token >= vocab_size:
            raise InputError(
                config.where(f"phases[{number}].first_new_token"),
                f"is {phase.first_new_token:,}, but the tokenizer has {vocab_size:,} tokens",
                "give the id of the first token to train",
            )


def open_corpora(config: RunConfig) -> dict[Path, Corpus]:
    """Open the corpora of all tasks, by prefix.

    Raises:
        InputError: a corpus is missing, or its files do not fit each other.
    """
    prefixes = dict.fromkeys(config.corpus(task) for task in config.tasks)
    return {prefix: Corpus.open(prefix) for prefix in prefixes}


def verified_corpora(config: RunConfig) -> dict[Path, Corpus]:
    """Open the corpora of all tasks, by prefix, and compare their files with the manifests, see
    `megaphase.corpus.integrity`.

    Raises:
        InputError: a corpus is missing, or one of its files was altered.
    """
    corpora = open_corpora(config)
    check_files(list(corpora.values()))
    return corpora


def plan_spec(
    config: RunConfig,
    tokenizer: Tokenizer,
    used: Mapping[str, int | StreamPosition] | None = None,
    *,
    corpora: Mapping[Path, Corpus] | None = None,
    known: CorpusCounts | None = None,
    checked: bool = False,
) -> PlanSpec:
    """Return what determines the plan.

    Args:
        corpora: those of all tasks, by prefix; they are opened by default.
        known: numbers of corpora that are known already; gets the others.
        checked: whether another process has found the corpora fit for the run file.
        used: samples of each task used by the run from which this one starts, in number, if they
            have the length of the `model` section; none by default.

    Raises:
        InputError: a corpus is missing, damaged, too short, of another kind or tokenizer; no
            document of a task is held out, or in its test split; the tokenizer lacks the token that
            `bos` asks for or the first one that a phase trains; or a phase never reaches the epochs
            that end it.
    """
    _check_new_tokens(config, tokenizer.vocab_size)
    seq_len = config.model.seq_len
    starts = _starts(config, used or {})
    counts = {task: start.samples for task, start in starts.items()}
    segments = {t: start for t, start in starts.items() if not start.is_plain(SampleKind(seq_len))}
    known = known or CorpusCounts()
    opened = open_corpora(config) if corpora is None else corpora
    of_tasks = {task: opened[config.corpus(task)] for task in config.tasks}
    for task, corpus in of_tasks.items():
        check_task_corpus(config, task, tokenizer, corpus)
    bos = bos_token(config, tokenizer)
    training = open_streams(config, of_tasks, bos, "training", known)
    held_out = open_streams(config, of_tasks, bos, "validation", known)
    test = open_streams(config, of_tasks, bos, "test", known)
    if not checked:
        for task in config.tasks:
            check_task(config, task, training[task], held_out[task], test.get(task), known)
    kinds = [_phase_kind(config, number) for number in range(len(config.phases))]
    streams = {task: TaskStream.of(stream, kinds) for task, stream in training.items()}
    phases = phase_specs(config, [supply(streams, kind, list(starts.values())) for kind in kinds])
    fingerprint = hash_json(
        ({"used": counts} if any(counts.values()) else {})
        | ({"segments": _as_json(segments)} if segments else {})
        | ({"kinds": kinds} if any(kind != (seq_len, "tokens") for kind in kinds) else {})
        | ({} if bos is None else {"bos": bos})
        | _splits_of_tasks(config)
        | {
            "format": FORMAT_VERSION,
            "seed": config.seed,
            "seq_len": seq_len,
            **_batches(phases),
            "held_out_fraction": config.validation.fraction,
            "corpora": {task: corpus.fingerprint for task, corpus in of_tasks.items()},
            "tags": {task: corpus.manifest.tag for task, corpus in of_tasks.items()},
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
    return PlanSpec(
        training, held_out, phases, seq_len, fingerprint, counts, bos, segments, test, known
    )


def _starts(
    config: RunConfig, used: Mapping[str, int | StreamPosition]
) -> dict[str, StreamPosition]:
    """Return the positions of all tasks; plain numbers count samples of the `model` section."""
    kind, given = (
        SampleKind(config.model.seq_len),
        {task: used.get(task, 0) for task in config.tasks},
    )
    return {
        task: StreamPosition().after(kind, start) if isinstance(start, int) else start
        for task, start in given.items()
    }


def _as_json(segments: Mapping[str, StreamPosition]) -> dict[str, Any]:
    return {task: position.to_json() for task, position in segments.items()}
