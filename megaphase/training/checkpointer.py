"""What goes into a run's checkpoints, and which of them hold the best weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from megaphase.callbacks.divergence import DivergenceDetector
from megaphase.callbacks.early_stopping import EarlyStopping
from megaphase.callbacks.loss_spikes import LossSpikeDetector
from megaphase.checkpoint.parameters import RANDOM, WEIGHT
from megaphase.checkpoint.saver import Saver, SaveStatus, Snapshot
from megaphase.checkpoint.state import best_name, full_name
from megaphase.plan.plan import Plan
from megaphase.plan.run_history import RunHistory
from megaphase.training.engine import Engine
from megaphase.training.random_state import random_state
from megaphase.training.train_state import TrainState


class Checkpointer:
    """Puts a run's state together and has it saved; every method is called by all ranks."""

    def __init__(
        self,
        saver: Saver,
        engine: Engine,
        plan: Plan,
        monitor: EarlyStopping,
        losses: LossSpikeDetector,
        divergence: DivergenceDetector,
        history: RunHistory,
        facts: Mapping[str, Any],
        best: Mapping[str, str],
    ) -> None:
        """
        Args:
            history: of the run so far; the loop goes on with it.
            facts: what every checkpoint's state says of the run beside its position.
            best: links to the best weights, each with the name of the checkpoint it leads to.
        """
        self._saver, self._engine, self._plan = saver, engine, plan
        self._monitor, self._losses, self._divergence = monitor, losses, divergence
        self._history = history
        self._facts = facts
        self._best = dict(best)
        self._saved: TrainState | None = None

    def note_best(self, names: Sequence[str], checkpoint: str) -> None:
        """The weights that are about to be saved under this name are the best of these tasks."""
        self._best |= {f"best-{name}": checkpoint for name in names}

    def save(
        self, at: TrainState, phase: str, metrics: Mapping[str, Any], *, permanent: bool
    ) -> None:
        """Save everything.

        Args:
            phase: whose steps were trained last.
            metrics: what of metrics.jsonl belongs to the checkpoint, see MetricsLog.sync; rank 0's
                counts.
            permanent: whether the checkpoint stays for ever.
        """
        random = ((RANDOM + name, each) for name, each in random_state().items())
        state = self._state(at, phase, metrics) | {
            "permanent": permanent,
            "optimizer_steps": self._engine.state.steps,
            "monitor": self._monitor.state_dict(),
            "losses": self._losses.state_dict(),
            "divergence": self._divergence.state_dict(),
            "best": dict(self._best),
        }
        self._begin(full_name(at.step), self._engine.state.snapshot(random), state)
        self._saved = at

    def save_weights(self, at: TrainState, phase: str, metrics: Mapping[str, Any]) -> None:
        """Save the fp32 weights alone, as the best of some task."""
        state = self._state(at, phase, metrics) | {"optimizer_steps": 0}
        self._begin(best_name(at.step), self._engine.state.snapshot(kinds=(WEIGHT,)), state)

    def is_saved(self, at: TrainState) -> bool:
        """Whether the newest save was at this position."""
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

    def _begin(self, name: str, snapshot: Snapshot, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            sound_step = self._divergence.last_sound_step
            self._saver.save(name, snapshot, state, dict(self._best), sound_step)

    def _state(self, at: TrainState, phase: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **self._facts,
            "position": asdict(at),
            "step": at.step,
            "phase_name": phase,
            "used": dict(zip(self._plan.tasks, at.used(self._plan), strict=True)),
            "history": self._history.to_json(),
            **metrics,
        }
