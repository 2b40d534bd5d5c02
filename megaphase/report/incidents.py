"""Incidents in a run, from its events: divergence, skipped steps, loss spikes."""

from __future__ import annotations

from collections.abc import Sequence

from megaphase.report.runs import Event, RunRecord
from megaphase.utils.spike_words import spike_in_words

NAMED_AT_MOST = 5
_ABOVE_UNIFORM = ", above that of uniform guessing"


def divergences(run: RunRecord) -> list[Event]:
    """Return the divergence events in the order of their steps."""
    return _events(run, "divergence")


def skipped_steps(run: RunRecord) -> list[int]:
    """Return the steps whose loss or gradient was not finite."""
    return [event.step for event in _events(run, "step_skipped")]


def skipped_spikes(run: RunRecord) -> list[int]:
    """Return the steps that were left out as loss spikes."""
    return [event.step for event in _events(run, "spike_skipped")]


def loss_spikes(run: RunRecord) -> list[int]:
    """Return the steps whose loss was far above its running mean."""
    return [event.step for event in _events(run, "loss_spike")]


def incident_sentences(run: RunRecord) -> list[str]:
    """Return one sentence per divergence and its end, one on steps that were not finite, one on
    loss spikes that were left out and one on each of the first few, one on other loss spikes."""
    sentences = []
    for event in run.events:
        where = f"{event.phase} step {event.step:,}: "
        if event.event == "divergence":
            sentences.append(where + _describe(event))
        elif event.event == "divergence_over":
            sentences.append(where + "the divergence is over")
        elif event.event == "divergence_stop":
            reasons = {"not_finite": "steps were not finite", "spikes": "many steps were spikes"}
            why = reasons.get(event.kind or "", "it had diverged")
            sentences.append(f"{where}the run ended, since {why}")
    if skipped := skipped_steps(run):
        was = "step was" if len(skipped) == 1 else "steps were"
        sentences.append(f"{len(skipped):,} {was} skipped as not finite: {_named(skipped)}")
    if spikes := skipped_spikes(run):
        was = "step was" if len(spikes) == 1 else "steps were"
        sentences.append(f"{len(spikes):,} {was} left out as loss spikes: {_named(spikes)}")
        sentences += [
            f"step {event.step:,} was left out: {why}"
            for event in _events(run, "spike_skipped")[:NAMED_AT_MOST]
            if (why := spike_in_words(event.exceeded))
        ]
    if spikes := loss_spikes(run):
        plural = "" if len(spikes) == 1 else "s"
        sentences.append(f"{len(spikes):,} loss spike{plural}: at step {_named(spikes)}")
    return sentences


def _describe(event: Event) -> str:
    if event.kind == "gradient_norm":
        return f"gradients are far larger than before, since step {event.since:,}"
    if event.kind == "stuck":
        return f"the loss has not moved since step {event.since:,}: it is {event.loss:,.4g}"
    above = _ABOVE_UNIFORM if event.kind == "above_uniform" else ""
    return (
        f"training diverges: the loss rose from {event.loss_before:,.4g} at step {event.since:,} "
        f"to {event.loss:,.4g}{above}"
    )


def _named(steps: Sequence[int]) -> str:
    more = ", …" if len(steps) > NAMED_AT_MOST else ""
    return ", ".join(f"{step:,}" for step in steps[:NAMED_AT_MOST]) + more


def _events(run: RunRecord, name: str) -> list[Event]:
    return [event for event in run.events if event.event == name]
