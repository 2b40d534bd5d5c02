"""Where a run starts: at initial weights, at another run's checkpoint, or at its own newest."""

from __future__ import annotations

from collections.abc import Callable

from megaphase.callbacks.callback import CallbackList
from megaphase.callbacks.divergence_monitor import DivergenceMonitor
from megaphase.checkpoint.parameters import StoredParameters
from megaphase.checkpoint.state import ADAMW, OPTIMIZER, check_format
from megaphase.checkpoint.store import Checkpoint, CheckpointStore
from megaphase.config.run import RunConfig
from megaphase.distributed.all_ranks import run_on_all_ranks
from megaphase.plan.branch import Branch
from megaphase.plan.plan import Plan
from megaphase.plan.run_history import RunHistory, history_of_state
from megaphase.plan.spec import PlanSpec
from megaphase.training.engine import Engine
from megaphase.training.random_state import set_random_state, stored_random_state
from megaphase.training.train_state import TrainState
from megaphase.utils.errors import InputError


def newest_checkpoint(
    store: CheckpointStore, plan: Plan, say: Callable[[str], None]
) -> Checkpoint | None:
    """The run's newest whole checkpoint, None where it has none yet; called by all ranks.

    Raises:
        InputError: it is of another run file, or of another version of this program.
    """
    checkpoint = store.newest_whole(say)
    if checkpoint is not None:
        check_checkpoint(checkpoint, plan.spec)
    return checkpoint


def check_checkpoint(checkpoint: Checkpoint, spec: PlanSpec) -> None:
    """Refuse a checkpoint of another run file or version of this program; called by all ranks."""

    def check() -> None:
        check_format(checkpoint.folder, checkpoint.state)
        if checkpoint.state["plan"] != spec.fingerprint:
            raise InputError(
                checkpoint.folder,
                "was written with another plan than that of this run file",
                "use the run file and the corpora with which it was written",
            )

    run_on_all_ranks(check)


def starting_state(plan: Plan, checkpoint: Checkpoint | None, branch: Branch | None) -> TrainState:
    """Where the run's next step is.

    Args:
        checkpoint: the run's own newest one, None at the first start.
        branch: where a run that is a branch began; None for others.
    """
    if checkpoint is not None:
        return TrainState.from_json(checkpoint.state["position"], plan)
    step, tokens = (branch.step, branch.tokens) if branch is not None else (0, 0)
    return TrainState(0, 0, step, tokens, tuple(plan.spec.starts))


def starting_history(
    config: RunConfig, checkpoint: Checkpoint | None, branch: Branch | None
) -> RunHistory:
    """Return the run's history so far; called by all ranks."""

    def read() -> RunHistory:
        if checkpoint is not None:
            return history_of_state(config.output, checkpoint.state)
        return RunHistory()

    history = run_on_all_ranks(read)
    if branch is not None:
        history.origin = branch.origin
    return history


def starting_weights(
    store: CheckpointStore, checkpoint: Checkpoint | None, branch: Branch | None
) -> Checkpoint | None:
    """The checkpoint whose weights the run starts with, None for initial weights.

    Called by all ranks.

    Raises:
        InputError: the branch's checkpoint is damaged.
    """
    if checkpoint is not None or branch is None:
        return checkpoint
    if branch.is_new:  # verified before anything was written
        return Checkpoint(branch.checkpoint, branch.state)
    return store.open(branch.checkpoint)


def load_checkpoint(engine: Engine, checkpoint: Checkpoint, *, average: bool = False) -> None:
    """Load weights and optimizer state, from whatever layout they were saved on.

    The state of another optimizer is left out: the phase resets it. Called by all ranks.
    average: load the average of the weights instead, without optimizer state.

    Raises:
        InputError: it is of another model.
    """
    state = checkpoint.state
    stored = run_on_all_ranks(lambda: _stored(checkpoint, average=average))
    same = state.get(OPTIMIZER, ADAMW) == engine.state.stored_by
    steps = state["optimizer_steps"] if same and not average else 0
    # A rank that cannot read its part ends all before one waits for it in a collective.
    run_on_all_ranks(lambda: engine.state.read_in(stored, steps))
    engine.state.finish_load()
    if state["processes"] == engine.grid.world_size:
        set_random_state(stored_random_state(checkpoint.folder, engine.grid.rank))


def _stored(checkpoint: Checkpoint, *, average: bool) -> StoredParameters:
    stored = StoredParameters(checkpoint.folder)
    return stored.of_average() if average else stored


def newest_name_until(
    config: RunConfig, store: CheckpointStore, branch: Branch | None, step: int
) -> str | None:
    """The newest checkpoint that is not of a later step, in the run or before it: for --from."""
    name = store.newest_name(until=step)
    if name is not None:
        return f"{config.output}@{name}"
    return branch.source if branch is not None and branch.step <= step else None


def refuse_diverged(divergence: DivergenceMonitor, checkpoint: Checkpoint) -> None:
    """Give the monitor its state in the checkpoint, from which a diverged run does not resume.

    Raises:
        RunError: the run had diverged when it was saved.
    """
    state = checkpoint.state
    if "divergence" not in state:  # earlier versions have saved none
        return
    divergence.load_state_dict(state["divergence"])
    at = state["position"]
    if divergence.is_over(phase_ends=at["phase_step"] == 0):
        raise divergence.error(at["step"], state["phase_name"])


def report_start(
    callbacks: CallbackList, checkpoint: Checkpoint | None, branch: Branch | None, step: int
) -> None:
    """Report from which checkpoint the run resumes or starts, if from one."""
    if checkpoint is not None:
        callbacks.event(step, "resume", checkpoint=checkpoint.folder.name)
        callbacks.say(f"resuming from {checkpoint.folder}")
    elif branch is not None:
        callbacks.event(step, "branch", checkpoint=str(branch.checkpoint))
        callbacks.say(f"starting from {branch.checkpoint}")
