"""The step time and the layouts that a run could have, as `megaphase plan` prints them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Table

from megaphase.estimate.hardware import Hardware
from megaphase.estimate.memory import estimate
from megaphase.estimate.memory_table import in_unit, layout_name, memory_unit
from megaphase.estimate.setup import Setup
from megaphase.estimate.step_time import PARTS, step_time
from megaphase.estimate.suggestions import GB, all_kept, layouts, partitioned_in_nodes

# Columns of a console in which the layouts' memory is shown by part.
WIDE = 120
# Of a step, what is worth naming: a part of it, and how much sooner another layout ends it.
NAMED_PART, NAMED_GAIN = 0.005, 0.02
_DAY, _HOUR, _MINUTE = 86400, 3600, 60
NO_TIME = (
    "No estimate of time: it is made for GPUs that compute in bf16, and this run is in fp32 (on a "
    "CPU, the first lines of the training show its speed); for another estimate set "
    "hardware.peak_tflops to what one process's device reaches"
)


def speed_summary(
    setup: Setup, hardware: Hardware, phases: Sequence[tuple[str, Sequence[tuple[Setup, int]]]]
) -> dict[str, Any]:
    """All figures as plain data; layouts in the order of `memory_summary`, and `all_kept` as there.

    seconds: of the whole run, at best; expected: the fraction of this speed that is to be expected.
    second_partition: those of the run's own layout with `secondary_partition: ranks`, the GPUs of a
    node, and its memory; None where that is no choice.

    setup: of the phase of `memory_summary`. phases: their names, and the setups of their steps with
    the number of steps of each.
    """
    found = [_figures(layout, hardware) for layout in layouts(setup)]
    kept = all_kept(setup)
    times = [_phase_figures(name, stages, hardware) for name, stages in phases]
    return {
        "card": hardware.title,
        "card_assumed": hardware.assumed,
        "peak_tflops": hardware.peak_flops / 1e12,
        "efficiency": hardware.efficiency,
        "expected": hardware.expected,
        "offload_counted": setup.offload == "none",
        "layouts": found,
        "all_kept": kept and _figures(kept, hardware),
        "second_partition": _second_partition(setup, hardware),
        "phases": times,
        "seconds": sum(each["seconds"] for each in times),
    }


def _phase_figures(
    name: str, stages: Sequence[tuple[Setup, int]], hardware: Hardware
) -> dict[str, Any]:
    """The time of all steps of a phase, and the figures of its last step."""
    times = [(step_time(setup, hardware), steps) for setup, steps in stages]
    last = times[-1][0]
    return {
        "name": name,
        "seq_len": stages[-1][0].seq_len,
        "seconds": sum(steps * time.seconds for time, steps in times),
        "step_seconds": last.seconds,
        "tokens_per_second": last.tokens_per_second,
        "mfu": last.mfu,
    }


def _figures(layout: Setup, hardware: Hardware) -> dict[str, Any]:
    found = step_time(layout, hardware)
    return {
        "tensor": layout.tensor,
        "data": layout.data,
        "zero": layout.zero,
        "step_seconds": found.seconds,
        "seconds_by": found.seconds_by,
        "sent_bytes_by": found.sent_by,
        "tokens_per_second": found.tokens_per_second,
        "mfu": found.mfu,
    }


def _second_partition(setup: Setup, hardware: Hardware) -> dict[str, Any] | None:
    other = partitioned_in_nodes(setup, hardware.gpus_per_node)
    if other is None:
        return None
    more = {"ranks": other.secondary, "bytes": estimate(other).total}
    return _figures(other, hardware) | more


def speed_sentences(memory: dict[str, Any], speed: dict[str, Any] | None) -> list[str]:
    """The run's own layout in a few lines, and the quickest one where that is another.

    speed: None where the hardware is not known.
    """
    if speed is None:
        return [NO_TIME]
    own = speed["layouts"][0]
    whole = own["step_seconds"]
    parts = " + ".join(
        f"{part} {_seconds(own['seconds_by'][part], whole)}"
        for part in PARTS
        if own["seconds_by"][part] >= NAMED_PART * whole
    )
    card = speed["card"] + (", assumed" if speed["card_assumed"] else "")
    offload = "" if speed["offload_counted"] else ", without what offload adds"
    of_phase = f", phase {memory['phase']}" if _steps_differ(speed) else ""
    sentences = [
        f"Step, estimated ({card}{offload}{of_phase}): {_seconds(whole)} s = {parts}",
        f"Speed: {_at_best(speed)}{own['tokens_per_second']:,.0f} tokens/s, MFU {own['mfu']:.0%}; "
        f"without validation and saving {_phases(speed)}",
        *_to_be_expected(own, speed),
    ]
    if of_phase:
        steps = (
            f"{each['name']} {_seconds(each['step_seconds'])} s, MFU {each['mfu']:.0%}"
            for each in speed["phases"]
        )
        sentences.append(f"Steps of the phases, with their full batch: {'; '.join(steps)}")
    best = quickest(memory, speed)
    if best is not None:
        figures = speed["layouts"][best]
        seconds = figures["step_seconds"]
        if seconds < (1 - NAMED_GAIN) * whole or not memory["layouts"][0]["fits"]:
            sentences.append(
                f"Quickest layout that fits: {layout_name(figures)}, {_seconds(seconds)} s a step, "
                f"MFU {figures['mfu']:.0%}"
            )
    sentences.extend(_gathering_less(memory, speed))
    return sentences


def _at_best(speed: dict[str, Any]) -> str:
    return "at best " if speed["expected"] < 1 else ""


def _to_be_expected(own: dict[str, Any], speed: dict[str, Any]) -> Iterator[str]:
    """The speed that runs of others had beside their estimates."""
    share = speed["expected"]
    if share < 1:
        yield (
            f"To be expected: {share * own['tokens_per_second']:,.0f} tokens/s, MFU "
            f"{share * own['mfu']:.0%}; {duration(speed['seconds'] / share)} (two thirds of the "
            "best, until you set hardware.efficiency as measured)"
        )


def time_sentence(
    hardware: Hardware, phases: Sequence[tuple[str, Sequence[tuple[Setup, int]]]]
) -> str:
    """How long all steps take, at best and as is to be expected; phases: see `speed_summary`."""
    best = run_seconds(hardware, phases)
    card = hardware.title + (", assumed" if hardware.assumed else "")
    time = duration(best)
    if hardware.expected < 1:
        time += f" at best, {duration(best / hardware.expected)} to be expected"
    return f"Time, estimated ({card}), without validation and saving: {time}"


def run_seconds(
    hardware: Hardware, phases: Sequence[tuple[str, Sequence[tuple[Setup, int]]]]
) -> float:
    """How long all steps take at best; phases: see `speed_summary`."""
    stages = [stage for _, of_phase in phases for stage in of_phase]
    return sum(steps * step_time(setup, hardware).seconds for setup, steps in stages)


def _steps_differ(speed: dict[str, Any]) -> bool:
    return len({each["step_seconds"] for each in speed["phases"]}) > 1


def _gathering_less(memory: dict[str, Any], speed: dict[str, Any]) -> Iterator[str]:
    """What ZeRO-3 would gain with a second partition of the weights, or if it gathered all of them
    once a step, where that fits and is worth naming."""
    second, kept = speed["second_partition"], speed["all_kept"]
    card_bytes = memory["card_gb"] * GB * (1 - memory["reserve"])
    choices = []
    if second is not None and second["bytes"] <= card_bytes:
        choices.append((f"secondary_partition: {second['ranks']}", second, second["bytes"]))
    if kept is not None and memory["all_kept"]["fits"]:
        choices.append(("keep_gathered: 1.0", kept, memory["all_kept"]["bytes"]))
    whole = speed["layouts"][0]["step_seconds"]
    for setting, time, needed in choices:
        saved = whole - time["step_seconds"]
        if saved >= NAMED_GAIN * whole:
            more = needed - memory["layouts"][0]["bytes"]
            size = f"{in_unit(more, unit := memory_unit(more))} {unit}"
            yield f"{setting} would save {_seconds(saved, whole)} s a step for {size}"


def quickest(memory: dict[str, Any], speed: dict[str, Any]) -> int | None:
    """The layout with the shortest step of those that fit, None where none does."""
    fitting = [i for i, figures in enumerate(memory["layouts"]) if figures["fits"]]
    seconds = [figures["step_seconds"] for figures in speed["layouts"]]
    return min(fitting, key=seconds.__getitem__, default=None)


def layouts_table(
    memory: dict[str, Any], speed: dict[str, Any] | None, *, width: int = WIDE
) -> Table:
    """Memory on each GPU and time of a step by layout, the run's own first; GB (or MB), seconds.

    width: of the console; where it is less than WIDE, memory is not shown by part.
    """
    unit = memory_unit(memory["layouts"][0]["bytes"])
    table = Table(
        title=f"{memory['processes']} GPUs of {memory['card_gb']:g} GB: {unit} on each, seconds a "
        "step; this run's layout first",
        title_justify="left",
        box=box.SIMPLE,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    parts = tuple(memory["layouts"][0]["parts"]) if width >= WIDE else ()
    times = ("step", "MFU") if speed else ()
    for column in ("tensor", "data", "ZeRO", *parts, "all", *times, "fits"):
        table.add_column(column, justify="right")
    best = quickest(memory, speed) if speed else None
    for i, figures in enumerate(memory["layouts"]):
        row = [str(figures[key]) for key in ("tensor", "data", "zero")]
        row += [in_unit(figures["parts"][part], unit) for part in parts]
        row.append(in_unit(figures["bytes"], unit))
        if speed:
            time = speed["layouts"][i]
            row += [_seconds(time["step_seconds"]), f"{time['mfu']:.0%}"]
        verdict = "quickest" if i == best else "yes" if figures["fits"] else "no"
        table.add_row(*row, verdict)
        if i == 0:
            table.add_section()
    return table


def _phases(speed: dict[str, Any]) -> str:
    whole = duration(speed["seconds"])
    if len(speed["phases"]) == 1:
        return whole
    parts = " + ".join(f"{each['name']} {duration(each['seconds'])}" for each in speed["phases"])
    return f"{whole} = {parts}"


def duration(seconds: float) -> str:
    """A time in words."""
    for unit, name in ((_DAY, "days"), (_HOUR, "hours"), (_MINUTE, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{_seconds(seconds)} s"


def _seconds(seconds: float, whole: float | None = None) -> str:
    """whole: what it is a part of, whose decimals it gets."""
    return f"{seconds:.2f}" if (whole or seconds) >= 1 else f"{seconds:.3g}"
