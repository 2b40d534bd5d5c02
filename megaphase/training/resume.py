"""Where a run begins: at initial weights, at another run's checkpoint, or at its own newest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megaphase.checkpoint.parameters import StoredParameters
from megaphase.checkpoint.store import Checkpoint
from megaphase.distributed.all_ranks import run_on_all_ranks
from megaphase.plan.run_history import RunHistory, history_of_state
from megaphase.training.branch import Branch
from megaphase.training.engine import Engine
from megaphase.training.random_state import set_random_state, stored_random_state
from megaphase.training.run_context import RunContext
from megaphase.training.run_logger import RunLogger
from megaphase.training.train_state import TrainState


@dataclass(frozen=True)
class StartState:
    """One of three; every method is called by all ranks.

    Attributes:
        checkpoint: the run's own newest whole one, None where it has none yet.
        branch: where a run that is a branch began; None for others.
    """

    setting: RunContext
    checkpoint: Checkpoint | None
    branch: Branch | None

    @property
    def state(self) -> dict[str, Any] | None:
        """What the run's own checkpoint says; None at the first start."""
        return None if self.checkpoint is None else self.checkpoint.state

    @property
    def step(self) -> int:
        """Steps done by then."""
        return self.position().step

    @property
    def first_step(self) -> int:
        """Steps that were done before this run's own first one."""
        return self.branch.step if self.branch else 0

    @property
    def steps_left(self) -> int:
        """Until the end of the last phase, if none ends early."""
        at, phases = self.position(), self.setting.plan.phases
        return sum(phase.steps for phase in phases[at.phase :]) - at.phase_step

    def is_end(self) -> bool:
        """Whether all phases are done."""
        return self.position().phase == len(self.setting.config.phases)

    def position(self) -> TrainState:
        """Where the run stands then."""
        if self.state is not None:
            return TrainState.from_json(self.state["position"])
        config = self.setting.config
        tokens_per_step = config.batch.samples * config.model.seq_len
        starts = tuple(self.setting.plan.first_ordinals([]).tolist())
        tokens = self.branch.tokens if self.branch else 0
        return TrainState(0, 0, self.first_step, tokens, starts, tokens_per_step)

    def history(self) -> RunHistory:
        """What became of the run by then."""
        if self.state is not None:
            history = history_of_state(self.setting.config.output, self.state)
        else:
            history = RunHistory()
        if self.branch is not None:
            history.origin = self.branch.facts()
        return history

    def load(self, engine: Engine) -> None:
        """Give the engine the weights and the optimizer state of the beginning.

        Raises:
            InputError: the branch's checkpoint is damaged, or of another model.
        """
        checkpoint = self._weights()
        if checkpoint is not None:
            load_checkpoint(self.setting, engine, checkpoint)

    def tell(self, record: RunLogger) -> None:
        """Say and write down where the run goes on from."""
        if self.checkpoint is not None:
            record.event(self.step, "resume", checkpoint=self.checkpoint.folder.name)
            record.say(f"going on from {self.checkpoint.folder}")
        elif self.branch is not None:
            record.event(self.step, "branch", checkpoint=str(self.branch.checkpoint))
            record.say(f"going on from {self.branch.checkpoint}")

    def _weights(self) -> Checkpoint | None:
        if self.checkpoint is not None or self.branch is None:
            return self.checkpoint
        if self.branch.is_new:  # verified when the stage was set
            return Checkpoint(self.branch.checkpoint, self.branch.state)
        return self.setting.store.open(self.branch.checkpoint)


def load_checkpoint(setting: RunContext, engine: Engine, checkpoint: Checkpoint) -> None:
    """Take weights and optimizer state over, from whatever layout they were saved on."""
    stored, state = StoredParameters(checkpoint.folder), checkpoint.state
    run_on_all_ranks(lambda: engine.state.load(stored, state["optimizer_steps"]))
    if state["processes"] == setting.grid.world_size:
        set_random_state(stored_random_state(checkpoint.folder, setting.grid.rank))
