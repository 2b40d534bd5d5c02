"""Saves a run's checkpoints, and keeps track of those that hold the best weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megaphase.callbacks.callback import CallbackList
from megaphase.checkpoint.parameters import RANDOM, WEIGHT
from megaphase.checkpoint.saver import Saver, SaveStatus, Snapshot
from megaphase.checkpoint.state import (
    ADAMW,
    CHECKPOINT_FORMAT,
    OPTIMIZER,
    TOKENIZER_HASH,
    best_name,
    full_name,
)
from megaphase.config.run import RunConfig
from megaphase.model.shape import GPTShape
from megaphase.optim.parameter_state import stored_by
from megaphase.plan.origin import RunOrigin, records_as_json
from megaphase.plan.plan import Plan
from megaphase.plan.position import StreamPosition
from megaphase.plan.run_history import RunHistory
from megaphase.training.engine import Engine
from megaphase.training.random_state import random_state
from megaphase.training.train_state import TrainState


class Checkpointer:
    """Collects a run's state and saves it; every method is called by all ranks."""

    def __init__(
        self,
        saver: Saver,
        engine: Engine,
        plan: Plan,
        callbacks: CallbackList,
        history: RunHistory,
        facts: Mapping[str, Any],
        models: Mapping[str, GPTShape],
        best: Mapping[str, str],
    ) -> None:
        """
        Args:
            history: of the run so far, to which the trainer adds.
            facts: of the run, the same in the state of every checkpoint.
            models: of every phase, by its name.
            best: links to the best weights, each with the name of the checkpoint it leads to.
        """
        self._saver, self._engine, self._plan = saver, engine, plan
        self._callbacks, self._history, self._facts = callbacks, history, facts
        self._models = {phase: shape.architecture() for phase, shape in models.items()}
        self._best = dict(best)
        self._saved: TrainState | None = None

    def note_best(self, names: Sequence[str], checkpoint: str) -> None:
        """The weights that are about to be saved under this name are the best of these tasks."""
        self._best |= {f"best-{name}": checkpoint for name in names}

    def save(self, at: TrainState, phase: str, sound_step: int | None, *, permanent: bool) -> None:
        """Save everything.

        Args:
            phase: whose steps were trained last.
            sound_step: see CheckpointStore.prune.
            permanent: whether the checkpoint is never removed.
        """
        random = ((RANDOM + name, each) for name, each in random_state().items())
        state = self._state(at, phase) | {
            "permanent": permanent,
            "optimizer_steps": self._engine.state.steps,
            **self._engine.average.record(),
            **self._engine.spikes.record(),
            **self._callbacks.state_dict(),
            "best": dict(self._best),
        }
        snapshot = self._engine.state.snapshot(random)
        self._begin(full_name(at.step), snapshot, state, sound_step)
        self._saved = at

    def save_weights(self, at: TrainState, phase: str, sound_step: int | None) -> None:
        """Save the fp32 weights alone, as the best of some task."""
        state = self._state(at, phase) | {"optimizer_steps": 0}
        snapshot = self._engine.state.snapshot(kinds=(WEIGHT,))
        self._begin(best_name(at.step), snapshot, state, sound_step)

    def is_saved(self, at: TrainState) -> bool:
        """Return whether the newest save was at this position."""
        return self._saved == at

    @property
    def status(self) -> SaveStatus:
        """See Saver."""
        return self._saver.status

    def advance(self, agreed: int) -> None:
        """See Saver."""
        self._saver.advance(agreed)

    def finish(self) -> None:
        """See Saver."""
        self._saver.finish()

    def _begin(
        self, name: str, snapshot: Snapshot, state: Mapping[str, Any], sound_step: int | None
    ) -> None:
        with torch.no_grad():
            self._saver.save(name, snapshot, state, dict(self._best), sound_step)

    def _state(self, at: TrainState, phase: str) -> dict[str, Any]:
        return {
            **self._facts,
            "model": self._models[phase],
            "position": at.to_json(self._plan),
            "step": at.step,
            "phase_name": phase,
            **used_by(self._plan, at.used(self._plan), self._history.origin or RunOrigin()),
            "history": self._history.to_json(),
            **self._callbacks.on_save(),
        }


def used_by(plan: Plan, positions: Sequence[StreamPosition], origin: RunOrigin) -> dict[str, Any]:
    """The samples of each task that were used up to these positions of the streams, and the
    segments of the positions for which a number is not enough, as a branch needs them; of a task
    that the run does not have, those of the runs before it, and what its samples were."""
    at, kind = dict(zip(plan.tasks, positions, strict=True)), plan.spec.kind
    used = {**origin.used, **{task: position.samples for task, position in at.items()}}
    others = {task: each for task, each in origin.segments.items() if task not in at}
    own = {task: each for task, each in at.items() if not each.is_plain(kind)}
    segments = {task: each.to_json() for task, each in {**others, **own}.items()}
    streams = {task: each for task, each in origin.streams.items() if task not in at}
    return {
        "used": used,
        **({"segments": segments} if segments else {}),
        **({"earlier_streams": records_as_json(streams)} if streams else {}),
    }


def checkpoint_facts(
    config: RunConfig, plan: Plan, tokenizer_hash: str, world_size: int
) -> dict[str, Any]:
    """The facts of a run that are the same in the state of every checkpoint."""
    optimizer = stored_by(config.optimizer)
    return ({} if optimizer == ADAMW else {OPTIMIZER: optimizer}) | {
        "format": CHECKPOINT_FORMAT,
        "plan": plan.spec.fingerprint,
        "streams": plan.spec.stream_fingerprints,
        **({} if plan.spec.has_plain_kind else {"seq_len": plan.spec.seq_len}),
        "bos": plan.spec.bos,
        TOKENIZER_HASH: tokenizer_hash,
        "processes": world_size,
        "tensor": config.parallel.tensor,
        "zero": config.parallel.zero,
        "precision": config.precision,
    }
