"""The run file with the recommended phases, and comments that say how they were chosen."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megaphase.config.load import run_config, with_absolute_paths
from megaphase.sweep.law.candidates import Candidate, Range
from megaphase.sweep.law.proxies import Proxy
from megaphase.sweep.law.recommendation import Recommendation
from megaphase.utils.errors import InputError
from megaphase.utils.files import atomic_write_text, real_path
from megaphase.utils.yaml_file import parse_scalar


def write_tuned_run(found: Recommendation, out: Path) -> None:
    """Write the run file.

    Raises:
        InputError: the file exists, or the run file is not valid with these phases.
    """
    refuse_existing(out)
    data = copy.deepcopy(dict(found.big.data))
    if real_path(out.parent) != real_path(found.big.path.parent):
        data = with_absolute_paths(data, found.big.config)
    data["phases"] = phases_of(found)
    comments = "".join(f"# {line}".rstrip() + "\n" for line in lines_of(found))
    text = comments + yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    run_config(out, parse_scalar(text))
    atomic_write_text(out, text)


def refuse_existing(out: Path) -> None:
    """Raise InputError if the file exists."""
    if out.exists() or out.is_symlink():
        raise InputError(f"--out {out}", "exists", "remove it, or give another name")


def phases_of(found: Recommendation) -> list[dict[str, Any]]:
    """Return the section `phases`."""
    candidate, big = found.candidate, found.big
    names = {"static": ["static"], "restart": ["static", "restart"]}
    steps = candidate.steps(big.steps)
    phases = []
    for i, (name, length, rates, peak) in enumerate(
        zip(
            names.get(candidate.recipe.kind, ["pretrain", "joint"]),
            steps,
            candidate.rates(found.law.rows, big.unique),
            candidate.peaks,
            strict=True,
        )
    ):
        phase: dict[str, Any] = {
            "name": name,
            "steps": length,
            "mixture": {"rates": rates},
            "learning_rate": _learning_rate(candidate, i, peak, steps),
        }
        if i and not candidate.recipe.template.phases[i].reset:
            phase["optimizer_state"] = "keep"
        phases.append(phase)
    return phases


def _learning_rate(
    candidate: Candidate, number: int, peak: float, steps: Sequence[int]
) -> dict[str, Any]:
    """Return a phase's section `learning_rate`: the sweep's, in proportion to the phase's length
    and peak."""
    template = candidate.recipe.template.phases[number]
    like = template.learning_rate
    spans = like.get("steps") not in (None, template.steps)
    was, now = template.steps, steps[number]
    if spans:
        was, now = like["steps"], sum(steps)
    section: dict[str, Any] = {
        "schedule": like.get("schedule", "cosine"),
        "peak": rounded(peak),
        "final": rounded(peak * like.get("final", 0.0) / like["peak"]),
        "warmup_steps": round(like.get("warmup_steps", 0) / was * now),
    }
    if like.get("decay_steps") is not None:
        room = now - section["warmup_steps"]
        section["decay_steps"] = max(1, min(round(like["decay_steps"] / was * now), room))
    if spans:
        section["steps"] = now
        if like.get("first_step"):
            section["first_step"] = sum(steps[:number])
    return section


def rounded(value: float) -> float:
    """Return a number with three digits: more would say nothing."""
    return float(f"{value:.3g}")


def lines_of(found: Recommendation) -> list[str]:
    """Return what was chosen and why, in lines."""
    candidate, recipe, big = found.candidate, found.candidate.recipe, found.big
    lines = [
        "Phases by megaphase recommend, from the law of a sweep.",
        f"Target: {found.target}",
        f"Recipe: {recipe.name}; {big.steps:,} steps of {big.step_tokens:,} tokens.",
    ]
    if recipe.kind != "static":
        lines.append(
            f"  first phase: {100 * candidate.share:.3g} % of the steps (tried: "
            f"{_percent(recipe.share)}{_at_end(candidate.share, recipe.share)}), peak "
            f"{candidate.first_peak:.3g}"
        )
    lines += [
        f"  low-resource rate of the last phase: {100 * candidate.rate:.3g} % "
        f"(tried: {_percent(recipe.rate)}{_at_end(candidate.rate, recipe.rate)})",
        f"  peak of the last phase: {candidate.last_peak:.3g} (tried: "
        f"{recipe.last_peak.low:g} to {recipe.last_peak.high:g}"
        f"{_at_end(candidate.last_peak, recipe.last_peak)})",
        "Searched: the recipes of the sweep, within the ranges that it has tried, that repeat no",
        "text more often than it.",
        "",
        "Predicted validation losses in nats per token, with 95 % intervals (parameters, errors of",
        f"left-out settings, forms that are about as good){':' if found.static is None else ','}",
    ]
    if found.static is not None:
        lines.append(
            f"and those of the best static recipe, {100 * found.static.rate:.3g} % at peak "
            f"{found.static.last_peak:.3g}:"
        )
    for each in found.predictions:
        static = "" if each.static is None else f"; static {each.static:.3f}"
        lines.append(f"  {each.task}: {each.loss:.3f} ± {each.half_width:.3f}{static}")
    if found.unknown:
        lines.append(f"  no law fits: {', '.join(found.unknown)}")
    lines += ["", "How far this is outside of the sweep:"]
    outside = [each for each in found.reach if each.factor > 1 + 1e-6]
    lines += [
        f"  {each.name}: {each.value:.4g}, {each.text} ({each.low:.4g} to {each.high:.4g})"
        for each in outside
    ]
    lines.append("  all other quantities are within its range" if outside else "  nowhere")
    if any(each.name.startswith("parameters") for each in outside):
        lines.append("  peaks are those of the sweep's models; larger ones often need lower ones")
        if without := [each.task for each in found.law.laws if not each.depends_on_size]:
            lines.append(f"  laws without an effect of the model's size: {', '.join(without)}")
    if str(big.config.tokenizer.name) != found.tokenizer:
        lines.append(f"  tokenizer {big.config.tokenizer.name}, in the sweep {found.tokenizer}: "
                     "losses per token of two tokenizers differ")  # fmt: skip
    lines += [
        "",
        "Further runs that would narrow the predictions most, the best one first, each with those",
        "before it:",
    ]
    lines += [
        f"  {each.candidate.recipe.kind}, {_model(each)}, "
        f"{each.steps:,} steps, rate {100 * each.candidate.rate:.3g} %"
        f"{_share(each.candidate)}, peak {each.candidate.last_peak:.3g}: "
        f"variance {100 * (1 - each.left):.0f} % lower"
        for each in found.proxies
    ]
    return lines


def _model(proxy: Proxy) -> str:
    size = f"{proxy.parameters:,} parameters without embeddings"
    return size if proxy.model is None else f"model {proxy.model} ({size})"


def _at_end(value: float, tried: Range) -> str:
    """Say that a value is at an end of its range, so that a better one may lie beyond it."""
    if tried.low == tried.high:
        return ""
    near = 1e-3 * (tried.high - tried.low)
    for end, name in ((tried.high, "upper"), (tried.low, "lower")):
        if abs(value - end) <= near:
            return f"; at the {name} end, a better one may lie beyond it"
    return ""


def _share(candidate: Candidate) -> str:
    return "" if candidate.recipe.kind == "static" else f" after {100 * candidate.share:.3g} %"


def _percent(values: tuple[float, float]) -> str:
    return f"{100 * values[0]:.3g} to {100 * values[1]:.3g} %"
