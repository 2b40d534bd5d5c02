"""Runs that continue from another run's checkpoint, without a copy of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaphase.checkpoint.names import find_checkpoint
from megaphase.checkpoint.state import (
    ADAMW,
    AVERAGE,
    OPTIMIZER,
    STATE_FILE,
    read_state,
    state_or_nothing,
)
from megaphase.config.run import RunConfig
from megaphase.model.config import PhaseModelConfig
from megaphase.optim.parameter_state import stored_by
from megaphase.plan.origin import (
    RunOrigin,
    StreamRecord,
    read_records,
    read_segments,
    recorded_origin,
    write_origin,
)
from megaphase.plan.position import SampleKind, StreamPosition
from megaphase.plan.same_run import bos_in_words
from megaphase.plan.spec import PlanSpec
from megaphase.utils.errors import InputError
from megaphase.utils.run_files import ORIGIN_FILE, RUN_FILE


@dataclass(frozen=True)
class Branch:
    """The checkpoint of another run from which this one starts, and the samples used by then.

    Attributes:
        source: as the user named the checkpoint.
        step: steps done over the whole of that run, and the runs that it continues.
        tokens: likewise.
        used: samples of each task, likewise.
        state: the checkpoint's state; empty if the checkpoint no longer exists.
        is_new: whether the run has not begun yet.
        segments, streams: see RunOrigin.
    """

    source: str
    checkpoint: Path
    step: int
    tokens: int
    used: dict[str, int]
    state: dict[str, Any]
    is_new: bool
    segments: dict[str, StreamPosition] = field(default_factory=dict)
    streams: dict[str, StreamRecord] = field(default_factory=dict)

    def record(self, run_dir: Path) -> None:
        """Record where the run starts, so that later starts of it need no --from."""
        write_origin(run_dir, self.origin)

    @property
    def origin(self) -> RunOrigin:
        """Return its record for the run directory and every checkpoint of the run."""
        return RunOrigin(
            self.step,
            self.used,
            self.tokens,
            self.source,
            self.checkpoint,
            self.segments,
            self.streams,
        )

    def check(self, config: RunConfig, spec: PlanSpec, model: dict[str, Any]) -> None:
        """Refuse a model, streams or packing of documents that are not those of the run that this
        one continues.

        Sequence length and rotary positions may be others where the first phase gives them itself;
        with imported weights, on which megaphase has trained no samples, also another `seq_len` if
        no weights depend on it.

        Raises:
            InputError: naming the first key that differs.
        """
        trained = self.state.get("model", model)
        may_differ = (
            {"seq_len"} if not self.streams and model.get("position") == "rotary" else set()
        )
        own = config.phases[0].model
        may_differ |= set() if own is None else set(own.given)
        if "seq_len" in may_differ and _positions(model) == _positions(trained):
            may_differ.add("learned_positions")
        for key in {**trained, **model}:  # an option that is None is in neither
            wanted, found = model.get(key), trained.get(key)
            if wanted != found and key not in may_differ:
                raise InputError(
                    config.where(f"model.{key}"),
                    f"is {_shown(wanted)}, but {self.checkpoint} has {_shown(found)}",
                    _remedy(key, wanted, found),
                )
        known = {task: self.streams[task] for task in spec.streams if task in self.streams}
        lengths = {record.seq_len or spec.seq_len for record in known.values()}
        found = {seq_len: spec.stream_fingerprints_at(seq_len) for seq_len in lengths}
        for task, record in known.items():
            if record.fingerprint != found[record.seq_len or spec.seq_len][task]:
                raise InputError(
                    config.where(f"tasks.{task}"),
                    f"its samples are not those that {self.checkpoint} was trained on",
                    "give the same corpus, held-out and test fractions, subsample and seed",
                )
            self._check_packing(config, task, spec.bos)

    def _check_packing(self, config: RunConfig, task: str, bos: int | None) -> None:
        """Refuse to continue whole documents that were packed without BOS if they begin with one
        now, or the other way round: then the samples used hold other documents."""
        used = self.segments.get(task, StreamPosition())
        packed = any(kind.cut == "documents" for kind, _ in used.segments)
        began = self.streams[task].bos
        if packed and (bos is None) != (began is None):
            raise InputError(
                config.where("bos"),
                f"documents begin with {bos_in_words(bos)}, but {self.checkpoint} has used samples "
                f"of {task} into which they were packed with {bos_in_words(began)}",
                f"write bos: {'false' if began is None else 'true'}",
            )


def _remedy(key: str, wanted: Any, found: Any) -> str:
    """Return what to do about an option of the model that is not that of the checkpoint."""
    if key == "vocab" and isinstance(wanted, int) and isinstance(found, int) and wanted > found:
        extend = "give the checkpoint rows for an extended tokenizer with"
        return f"write the same model, or {extend} `megaphase convert extend-vocab`"
    if key in PhaseModelConfig.model_fields and wanted is not None:
        return f"write the same model, or phases[0].model.{key} where the first phase changes it"
    return "write the same model"


def _positions(model: Mapping[str, Any]) -> Any:
    """How many positions are learned, in a model that learns them."""
    return model.get("learned_positions", model.get("seq_len"))


def _shown(option: Any) -> str:
    return "none" if option is None else str(option)


def choose_branch(config: RunConfig, source: str | None) -> Branch | None:
    """The branch that was recorded, or the one that is asked for now.

    Raises:
        InputError: the run in the directory began otherwise.
    """
    recorded = recorded_branch(config.output)
    if source is None or (recorded is not None and _is_that(recorded, source)):
        if recorded is None and config.phases[0].begin_from == "average":
            raise InputError(
                config.where("phases[0].begin_from"),
                "is average, but the run starts from no checkpoint",
                "give one that holds an average with --from, or write weights",
            )
        return recorded
    if recorded is not None or (config.output / RUN_FILE).exists():
        began = f"from {recorded.checkpoint}" if recorded else "by itself"
        raise InputError(
            config.where("output"),
            f"the run in {config.output} began {began}, not from {source}",
            "choose another output",
        )
    return begin_branch(config, source)


def recorded_branch(run_dir: Path) -> Branch | None:
    """Return where the run in a directory started, if it is a branch.

    Its checkpoint is needed until the run has one of its own; it may no longer exist.
    """
    origin = recorded_origin(run_dir)
    if origin is None:
        return None
    if origin.source is None or origin.checkpoint is None or origin.tokens is None:
        path = run_dir / ORIGIN_FILE
        raise InputError(path, "is damaged", "branch into another output")
    state = state_or_nothing(origin.checkpoint)
    return Branch(
        origin.source,
        origin.checkpoint,
        origin.step,
        origin.tokens,
        dict(origin.used),
        state,
        is_new=False,
        segments=dict(origin.segments),
        streams=dict(origin.streams) or _streams(state),
    )


def begin_branch(config: RunConfig, source: str) -> Branch:
    """A branch from `RUN@NAME` or a checkpoint's path.

    Raises:
        InputError: there is no such checkpoint, or it has completed a phase of the run file, or it
            lacks the optimizer state that the first phase keeps.
    """
    folder = find_checkpoint(source)
    branch = _new_branch(source, folder, SampleKind(config.model.seq_len))
    done, first = branch.state["phase_name"], config.phases[0]
    for number, phase in enumerate(config.phases):
        if phase.name == done:
            raise InputError(
                config.where(f"phases[{number}].name"),
                f"{done} has been trained in {folder}",
                "leave it out: the run file of a branch holds what follows",
            )
    if first.optimizer_state == "keep" and not branch.state["optimizer_steps"]:
        raise InputError(
            config.where("phases[0].optimizer_state"),
            f"is keep, but {folder} has weights alone",
            "write reset, or give a step-… checkpoint",
        )
    of_branch, own = branch.state.get(OPTIMIZER, ADAMW), stored_by(config.optimizer)
    if first.optimizer_state == "keep" and of_branch != own:
        raise InputError(
            config.where("phases[0].optimizer_state"),
            f"is keep, but {folder} has the state of {of_branch}, and the optimizer is {own}",
            "write reset, or take the same optimizer",
        )
    if first.begin_from == "average" and AVERAGE not in branch.state:
        raise InputError(
            config.where("phases[0].begin_from"),
            f"is average, but {folder} holds no average of the weights",
            "write weights, or give a step-… checkpoint of a phase with average",
        )
    return branch


def _is_that(recorded: Branch, source: str) -> bool:
    """Return whether `source` names the checkpoint, even if a link has moved or it is gone."""
    return recorded.source == source or recorded.checkpoint == find_checkpoint(source)


def _new_branch(source: str, folder: Path, kind: SampleKind) -> Branch:
    """kind: of the samples that numbers count in the branch."""
    try:
        state = read_state(folder)
        position, before = state["position"], _origin(state)
        used = {**before.used, **state["used"]}
        facts = source, folder, position["step"], position["tokens"], used
        others = {t: p for t, p in before.segments.items() if t not in state["used"]}
        segments = others | read_segments(state.get("segments", {}))
        streams, seq_len = _streams(state), _seq_len(state)
        if seq_len is not None:
            at = {task: StreamPosition().after(SampleKind(seq_len), n) for task, n in used.items()}
            segments = {t: p for t, p in (at | segments).items() if not p.is_plain(kind)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            folder / STATE_FILE,
            "is damaged, or of another version of this program",
            "use another checkpoint",
        ) from None
    return Branch(*facts, state, is_new=True, segments=segments, streams=streams)


def _origin(state: Mapping[str, Any]) -> RunOrigin:
    """Return where the run of a checkpoint started: earlier versions recorded only there what the
    runs before it had used of tasks that it does not have."""
    try:
        origin = state["history"]["origin"]
        return RunOrigin() if origin is None else RunOrigin.from_json(origin)
    except (KeyError, TypeError, ValueError, AttributeError):  # without a history
        return RunOrigin()


def _streams(state: Mapping[str, Any]) -> dict[str, StreamRecord]:
    """Return what determined the samples of the tasks of a checkpoint, and of the runs before."""
    seq_len, bos = _seq_len(state), state.get("bos")
    own = {
        task: StreamRecord(fingerprint, seq_len, bos)
        for task, fingerprint in state.get("streams", {}).items()
    }
    return read_records(state.get("earlier_streams", {})) | own


def _seq_len(state: Mapping[str, Any]) -> int | None:
    """Return the length of the samples that `used` counts in a checkpoint's state."""
    seq_len: int | None = state.get("seq_len", state.get("model", {}).get("seq_len"))
    return seq_len
