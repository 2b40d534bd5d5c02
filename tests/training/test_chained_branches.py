"""Branches of branches: what a run does not train stays as the runs before it left it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from plan_support import (
    Documents,
    FakeTokenizer,
    ReferenceStream,
    phase,
    random_lengths,
    write_corpus,
    write_run,
)

from megaphase.config.run import RunConfig
from megaphase.model.presets import phase_shapes
from megaphase.plan.branch import Branch, begin_branch, choose_branch
from megaphase.plan.build import ensure_built
from megaphase.plan.dataset import read_step
from megaphase.plan.plan import Plan
from megaphase.plan.run_history import RunHistory
from megaphase.plan.spec import plan_spec
from megaphase.training.checkpointer import Checkpointer, checkpoint_facts
from megaphase.training.resume import starting_state
from megaphase.training.train_state import TrainState
from megaphase.utils.errors import InputError
from megaphase.utils.targets import IGNORED_TARGET

BOS, FILLER, SEQ_LEN, FRACTION = 59_000, 59_999, 8, 0.2
HALF = {"rates": {"en": 0.5, "hi": 0.5}}
EN, HI = {"rates": {"en": 1.0}}, {"rates": {"hi": 1.0}}


@pytest.fixture
def hindi(tmp_path: Path) -> Documents:
    write_corpus(tmp_path / "en", random_lengths(60, 30, 0))
    return write_corpus(tmp_path / "hi", random_lengths(60, 30, 1), seed=1, first_token=9000)


def run_file(
    folder: Path, name: str, corpora: list[str], *phases: Any, **changes: Any
) -> RunConfig:
    """Return a run of phases, given by name, steps, and mixture and other keys."""
    each = [phase(name, steps, mixture) | keys for name, steps, mixture, keys in phases]
    return write_run(folder, corpora, output=name, phases=each, **changes)


class Trained:
    """The plan of a run, checked against the checkpoint from which it starts, and its state."""

    def __init__(
        self, config: RunConfig, branch: Branch | None = None, bos: int | None = None
    ) -> None:
        self.config, self.branch = config, branch
        tokenizer: Any = FakeTokenizer(bos=bos, adds_bos=bos is not None)
        spec = plan_spec(config, tokenizer, branch.origin.positions if branch else {})
        self.shapes = phase_shapes(config, tokenizer.vocab_size)
        if branch is not None:
            branch.check(config, spec, self.shapes[0].architecture())
            branch.record(config.output)
        self.plan = Plan(spec, ensure_built(spec, config.output))

    def save(self) -> Path:
        """Write the state of the checkpoint at the run's end as the trainer does; return its
        folder."""
        plan, saved = self.plan, {}
        history = RunHistory(None if self.branch is None else self.branch.origin)
        engine = SimpleNamespace(state=SimpleNamespace(snapshot=lambda kinds: None))
        checkpointer = Checkpointer(
            SimpleNamespace(save=lambda name, _, state, *__: saved.update(state)),  # type: ignore
            engine,  # type: ignore[arg-type]
            plan,
            SimpleNamespace(on_save=dict),  # type: ignore[arg-type]
            history,
            checkpoint_facts(self.config, plan, "0123", 1),
            {each.name: shape for each, shape in zip(plan.phases, self.shapes, strict=True)},
            {},
        )
        at = starting_state(plan, None, self.branch)
        ends = plan.positions([each.steps for each in plan.phases])
        steps = sum(each.steps for each in plan.phases)
        at = TrainState(len(plan.phases), 0, at.step + steps, 0, tuple(ends))
        checkpointer.save_weights(at, plan.phases[-1].name, None)
        folder = self.config.output / "checkpoints" / "step-00000001"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps(saved))
        return folder


def branched(config: RunConfig, folder: Path, bos: int | None = None) -> Trained:
    return Trained(config, begin_branch(config, str(folder)), bos)


def samples(run: Trained, task: str) -> list[list[int]]:
    """Return the tokens of a task's samples in a run of one phase."""
    found = []
    number = run.plan.tasks.index(task)
    for step in range(run.plan.phases[0].steps):
        batch = read_step(run.plan, 0, step, 0, 1, FILLER)
        for row, of in enumerate(batch.tasks.tolist()):
            if of == number:
                tokens = [*batch.inputs[row].tolist(), int(batch.targets[row][-1])]
                found.append([each for each in tokens if each not in (FILLER, IGNORED_TARGET)])
    return found


def first_run(folder: Path) -> Path:
    return Trained(run_file(folder, "a", ["en", "hi"], ("pa", 6, HALF, {}))).save()


# The middle run's model section has the length of the others, or one of its own.
MIDDLE: list[dict[str, Any]] = [
    {},
    {"model": {"preset": "gpt-3m", "seq_len": 2 * SEQ_LEN}, "batch": {"samples": 4}},
]


@pytest.mark.parametrize("changes", MIDDLE)
def test_a_task_goes_on_after_a_run_without_it(
    tmp_path: Path, hindi: Documents, changes: dict[str, Any]
) -> None:
    own = {"model": {"seq_len": 2 * SEQ_LEN}} if changes else {}
    middle = run_file(tmp_path, "b", ["en"], ("pb", 4, EN, own), **changes)
    source = first_run(tmp_path)
    begun = branched(middle, source)
    # A later start of the same run reads origin.json alone.
    shutil.rmtree(source)
    begun.branch = choose_branch(middle, None)
    checkpoint = begun.save()
    assert json.loads((checkpoint / "state.json").read_text())["used"] == {"en": 28, "hi": 12}

    own = {"model": {"seq_len": SEQ_LEN}} if changes else {}
    last = run_file(tmp_path, "c", ["en", "hi"], ("pc", 6, HALF, own))
    run = branched(last, checkpoint)
    reference = ReferenceStream("hi", hindi, SEQ_LEN, FRACTION)
    assert samples(run, "hi") == reference.first(24)[12:]
    figures = run.plan.summary()["phases"][0]["tasks"]["hi"]
    assert figures["epochs_so_far"] == pytest.approx(24 / len(reference.epoch(0)), rel=1e-2)
    # And after another run without it.
    middle = run_file(tmp_path, "d", ["en"], ("pd", 1, EN, {}))
    later = branched(middle, run.save()).save()
    assert json.loads((later / "state.json").read_text())["used"]["hi"] == 24


@pytest.mark.parametrize("changes", MIDDLE)
def test_another_corpus_of_such_a_task_is_refused(
    tmp_path: Path, hindi: Documents, changes: dict[str, Any]
) -> None:
    own = {"model": {"seq_len": 2 * SEQ_LEN}} if changes else {}
    middle = run_file(tmp_path, "b", ["en"], ("pb", 4, EN, own), **changes)
    checkpoint = branched(middle, first_run(tmp_path)).save()
    write_corpus(tmp_path / "other", random_lengths(60, 30, 2), seed=2, first_token=9000)
    tasks = {"en": {"corpus": "en"}, "hi": {"corpus": "other"}}
    phases = ("pc", 6, HALF, {"model": {"seq_len": SEQ_LEN}})
    last = run_file(tmp_path, "c", ["en", "hi"], phases, tasks=tasks)
    with pytest.raises(InputError, match=r"run\.yaml: tasks\.hi: its samples are not those that"):
        branched(last, checkpoint)


def test_checkpoints_of_earlier_versions_are_read(tmp_path: Path, hindi: Documents) -> None:
    middle = run_file(tmp_path, "b", ["en"], ("pb", 4, EN, {}))
    checkpoint = branched(middle, first_run(tmp_path)).save()
    state = json.loads((checkpoint / "state.json").read_text())
    del state["used"]["hi"], state["earlier_streams"], state["history"]["origin"]["streams"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    last = run_file(tmp_path, "c", ["en", "hi"], ("pc", 6, HALF, {}))
    # The origin that they record is enough to continue the task.
    assert branched(last, checkpoint).plan.spec.used == {"en": 28, "hi": 12}
    del state["history"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    assert begin_branch(last, str(checkpoint)).used == {"en": 28}


PACKED = {"cut": "documents"}


@pytest.mark.parametrize(("bos", "remedy"), [(None, "false"), (BOS, "true")])
def test_packed_documents_go_on_only_with_the_bos_that_they_were_packed_with(
    tmp_path: Path, hindi: Documents, bos: int | None, remedy: str
) -> None:
    other = BOS if bos is None else None
    phases = ("p1", 3, EN, {}), ("p2", 3, HI, PACKED)
    source = Trained(run_file(tmp_path, "a", ["en", "hi"], *phases), bos=bos).save()
    wanted = rf"run\.yaml: bos: documents begin with .* of hi .*; write bos: {remedy}$"
    for cut in ({}, PACKED):
        with pytest.raises(InputError, match=wanted):
            branched(run_file(tmp_path, "x", ["hi", "en"], ("px", 2, HI, cut)), source, other)
    # The first task has used no packed documents, so a run of it alone may have another BOS; the
    # second one still needs its own.
    middle = run_file(tmp_path, "b", ["en"], ("pb", 2, EN, PACKED), bos=other is not None)
    checkpoint = branched(middle, source, other).save()
    last = run_file(tmp_path, "c", ["hi"], ("pc", 2, HI, {}))
    with pytest.raises(InputError, match=wanted):
        branched(last, checkpoint, other)
    assert branched(last, checkpoint, bos).plan.spec.used == {"hi": 12}


def test_bos_may_change_where_no_documents_were_packed(tmp_path: Path, hindi: Documents) -> None:
    last = run_file(tmp_path, "b", ["en", "hi"], ("pb", 6, HALF, {}))
    run = branched(last, first_run(tmp_path), BOS)
    assert run.plan.spec.used == {"en": 12, "hi": 12}
