"""Open a run to show the samples of its steps; writes nothing into one that has been trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from megaphase.config.load import load_run
from megaphase.config.run import RunConfig
from megaphase.plan.build import plan_folder
from megaphase.plan.built_folder import Say
from megaphase.plan.index import damage
from megaphase.plan.load_plan import build_plan, build_temporary_plan
from megaphase.plan.origin import read_origin
from megaphase.plan.plan import Plan
from megaphase.plan.position import StreamPosition
from megaphase.plan.run_history import (
    PhaseSpan,
    RunHistory,
    phase_spans,
    read_history,
    spike_reason,
    steps_done,
)
from megaphase.plan.same_run import plan_of_run, refuse_other_plan, refuse_other_run
from megaphase.plan.spec import PlanSpec, plan_spec, verified_corpora
from megaphase.plan.trace import find_step
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError
from megaphase.utils.standard_streams import new_console


@dataclass(frozen=True)
class TracedRun:
    """A run and its plan.

    Attributes:
        spans: the steps of its phases.
        done: steps trained so far; None if no run has begun.
        say: called with sentences for the user.
    """

    config: RunConfig
    tokenizer: Tokenizer
    plan: Plan
    history: RunHistory
    spans: list[PhaseSpan]
    done: int | None
    say: Say

    def find_step(self, step: int) -> tuple[int, int, list[StreamPosition]]:
        """Return a step's phase, its number there, and the positions at which the phase's streams
        began.

        Also reports whether the step was skipped or not trained yet.

        Raises:
            InputError: there is no such step.
        """
        first = self.spans[0].before
        try:
            phase, phase_step = find_step([span.steps for span in self.spans], step - first)
        except IndexError:
            last = first + sum(span.steps for span in self.spans)
            raise InputError(
                "--step", f"there is no step {step}", f"give {first + 1:,} to {last:,}"
            ) from None
        why = self.history.why_skipped(step)
        if why is not None:
            if reason := spike_reason(self.config.output, step):
                why += f" ({reason})"
            self.say(f"step {step:,} was skipped: {why}, it changed nothing")
        elif self.done is not None and self.done < step:
            self.say(f"step {step:,} has not been trained yet: {self.done:,} steps are done")
        return phase, phase_step, self.spans[phase].starts


def open_traced_run(run: Path, overrides: Sequence[str] | None) -> TracedRun:
    """Open a run by its directory, or by its run file with overrides.

    Raises:
        InputError: the run file is invalid, or the run that was trained there is another one.
    """
    console = new_console(stderr=True, highlight=False)
    say = partial(console.print, markup=False, soft_wrap=True)
    config = load_run(run, tuple(overrides or ()))
    tokenizer = Tokenizer.load(config.tokenizer)
    output = config.output
    refuse_other_run(output, config)
    origin = read_origin(output)
    corpora = verified_corpora(config)
    spec = plan_spec(config, tokenizer, origin.positions, corpora=corpora)
    plan = _open_plan(spec, config, console, say)
    history = read_history(output)
    if history.doubt:
        say(history.doubt)
    spans = phase_spans(output, history, plan, origin.step)
    done = None if plan_of_run(output) is None else steps_done(output)
    return TracedRun(config, tokenizer, plan, history, spans, done, say)


def _open_plan(spec: PlanSpec, config: RunConfig, console: Console, say: Say) -> Plan:
    """Open the plan, from the index with which the run was trained if it is intact."""
    output = config.output
    refuse_other_plan(output, config, spec.fingerprint, spec.bos)
    folder = plan_folder(output, spec)
    problem = damage(folder, spec) if folder.is_dir() else "is missing"
    if problem is None:
        # Tables that a phase needs after an early end are missing if it has not begun.
        spec.store_tables(folder.parent, say, read_only=True)
        return Plan(spec, folder)
    if plan_of_run(output) is None:
        say(
            f"no run has been trained in {output} yet: this is what the steps of {config.path} "
            "would see"
        )
        return build_plan(spec, output, console, say)
    say(f"{folder}: {problem}; the same index is built in a temporary folder")
    return build_temporary_plan(spec, console, say)
