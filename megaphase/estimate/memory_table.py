"""The memory estimate as `megaphase plan` prints it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megaphase.estimate.memory import estimate
from megaphase.estimate.setup import PhaseSetup, Setup
from megaphase.estimate.suggestions import GB, RESERVE, all_kept, fits, layouts, suggestions

UNITS = {"GB": GB, "MB": 1 << 20}


def largest_phase(phases: Sequence[PhaseSetup]) -> int:
    """The number of the phase that needs the most memory, the first one if several do."""
    return max(range(len(phases)), key=lambda number: estimate(phases[number].setup).total)


def memory_summary(phases: Sequence[PhaseSetup], card_gb: float) -> dict[str, Any]:
    """All figures of the phase that needs the most memory as plain data: bytes by part, for the
    run's own layout and then all others; and the bytes of every phase.

    all_kept: those of its own layout with `keep_gathered: 1.0`, None where that is no choice.
    """
    name, setup = phases[largest_phase(phases)]
    kept = all_kept(setup)
    return {
        "processes": setup.tensor * setup.data,
        "card_gb": card_gb,
        "reserve": RESERVE,
        "phase": name,
        "phases": [
            {
                "name": each.name,
                "seq_len": each.setup.seq_len,
                "micro": each.setup.micro,
                "bytes": estimate(each.setup).total,
                "fits": fits(each.setup, card_gb),
            }
            for each in phases
        ],
        "layouts": [_figures(layout, card_gb) for layout in layouts(setup)],
        "all_kept": kept and _figures(kept, card_gb),
        "remedies": suggestions(setup, card_gb),
    }


def _figures(layout: Setup, card_gb: float) -> dict[str, Any]:
    found = estimate(layout)
    return {
        "tensor": layout.tensor,
        "data": layout.data,
        "zero": layout.zero,
        "bytes": found.total,
        "parts": found.parts,
        "host_bytes": found.host,
        "moment": found.moment,
        "fits": fits(layout, card_gb),
    }


def memory_sentences(summary: dict[str, Any]) -> list[str]:
    """The estimate for the run's own layout in a line; of the phases and the node, where needed."""
    own = summary["layouts"][0]
    unit = memory_unit(own["bytes"])
    parts = " + ".join(
        f"{part} {in_unit(size, unit)}"
        for part, size in own["parts"].items()
        if size >= 0.05 * UNITS[unit]
    )
    differ = memory_differs(summary)
    of_phase = f", phase {summary['phase']}" if differ else ""
    line = f"Memory per GPU ({layout_name(own)}{of_phase}): {in_unit(own['bytes'], unit)} {unit}"
    sentences = [f"{line} = {parts}" if parts else line]
    if differ:
        of_phases = (f"{each['name']} {in_unit(each['bytes'], unit)}" for each in summary["phases"])
        sentences.append(f"Memory of the phases: {', '.join(of_phases)} {unit}")
    if own["host_bytes"]:
        unit = memory_unit(sum(own["host_bytes"].values()))
        host = " + ".join(f"{part} {in_unit(n, unit)}" for part, n in own["host_bytes"].items())
        sentences.append(f"Memory of the node for each GPU, offloaded: {host} {unit}")
    return sentences


def memory_warnings(summary: dict[str, Any]) -> list[str]:
    """That the run does not fit and what to do, in a line; none if it does."""
    return [] if summary["layouts"][0]["fits"] else [_does_not_fit(summary)]


def memory_differs(summary: dict[str, Any]) -> bool:
    """Whether phases need different amounts of memory."""
    return len({each["bytes"] for each in summary["phases"]}) > 1


def _does_not_fit(summary: dict[str, Any]) -> str:
    own, card = summary["layouts"][0], f"{summary['card_gb']:g} GB"
    needed = own["bytes"] / (1 - summary["reserve"])
    subject = f"Phase {summary['phase']}" if memory_differs(summary) else "The run"
    what = f"{subject} does not fit {card}: with {summary['reserve']:.0%} in reserve it needs "
    what += f"{in_unit(needed, unit := memory_unit(needed))} {unit}"
    if summary["remedies"]:
        return f"{what}; it fits with {', or '.join(summary['remedies'])}"
    return f"{what}; take many more GPUs, larger ones or a smaller model"


def layout_name(figures: dict[str, Any]) -> str:
    """A layout in words; `figures` has its sizes."""
    return f"tensor {figures['tensor']} × data {figures['data']}, ZeRO {figures['zero']}"


def memory_unit(largest: float) -> str:
    """The unit in which bytes are shown of which the largest number is this: GB, or MB below 0.1
    GB."""
    return "GB" if largest >= 0.1 * GB else "MB"


def in_unit(size: float, unit: str) -> str:
    """Bytes in a unit, as they are shown."""
    return f"{size / UNITS[unit]:.1f}"
