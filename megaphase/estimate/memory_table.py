"""The memory estimate as `megaphase plan` prints it."""

from __future__ import annotations

from typing import Any

from megaphase.estimate.memory import estimate
from megaphase.estimate.setup import Setup
from megaphase.estimate.suggestions import GB, RESERVE, all_kept, fits, layouts, suggestions


def memory_summary(setup: Setup, card_gb: float) -> dict[str, Any]:
    """All figures as plain data: bytes by part, for the run's own layout and then all others.

    all_kept: those of its own layout with `keep_gathered: 1.0`, None where that is no choice.
    """
    kept = all_kept(setup)
    return {
        "processes": setup.tensor * setup.data,
        "card_gb": card_gb,
        "reserve": RESERVE,
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
    """The estimate for the run's own layout in a line, and what to do where it does not fit."""
    own = summary["layouts"][0]
    parts = " + ".join(
        f"{part} {gb(size)}" for part, size in own["parts"].items() if size >= 0.05 * GB
    )
    line = f"Memory per GPU ({layout_name(own)}): {gb(own['bytes'])} GB"
    sentences = [f"{line} = {parts}" if parts else line]
    if own["host_bytes"]:
        host = " + ".join(f"{part} {gb(size)}" for part, size in own["host_bytes"].items())
        sentences.append(f"Memory of the node for each GPU, offloaded: {host} GB")
    if not own["fits"]:
        sentences.append(_does_not_fit(summary))
    return sentences


def _does_not_fit(summary: dict[str, Any]) -> str:
    own, card = summary["layouts"][0], f"{summary['card_gb']:g} GB"
    needed = own["bytes"] / (1 - summary["reserve"])
    what = f"The run does not fit {card}: with {summary['reserve']:.0%} in reserve it needs "
    what += f"{gb(needed)} GB"
    if summary["remedies"]:
        return f"{what}; it fits with {', or '.join(summary['remedies'])}"
    return f"{what}; take many more GPUs, larger ones or a smaller model"


def layout_name(figures: dict[str, Any]) -> str:
    """A layout in words; `figures` has its sizes."""
    return f"tensor {figures['tensor']} × data {figures['data']}, ZeRO {figures['zero']}"


def gb(size: float) -> str:
    """Bytes in GB, as they are shown."""
    return f"{size / GB:.1f}"
