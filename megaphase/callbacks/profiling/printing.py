"""A profile as lines of at most 100 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megaphase.callbacks.profiling.kinds import short_name
from megaphase.callbacks.profiling.summary import Floor, RankProfile, StepTimes

NAME_WIDTH = 62
_UNITS = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6))


def profile_text(ranks: Sequence[RankProfile], steps: range, device: str, folder: Path) -> str:
    """Everything that is printed; the first rank speaks for all.

    steps: those that were profiled.
    """
    first = ranks[0]
    heading = f"Profile of {_steps(steps)} on rank {first.rank} ({device}): "
    lines = [
        "",
        heading + f"{_ms(first.seconds.step)} ms a step",
        *_times(first.seconds, on_gpu=first.on_gpu),
        *_other_ranks(ranks),
        "",
        *_kernels(first),
        "",
        *_floor(first.floor, first.seconds),
        "",
        f"Trace: {folder / first.trace}",
        "Open it at https://ui.perfetto.dev or chrome://tracing.",
        "",
    ]
    return "\n".join(lines)


def _steps(steps: range) -> str:
    return f"step {steps[0]:,}" if len(steps) == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"


def _times(times: StepTimes, *, on_gpu: bool) -> Iterator[str]:
    rows = {
        "matrix products": times.matmul,
        "attention": times.attention,
        "other kernels": times.other,
        "optimizer": times.optimizer,
        "exposed communication": times.exposed_communication,
        "idle GPU" if on_gpu else "Python and framework": times.idle,
        "waiting for the batch": times.data_wait,
    }
    for name, seconds in rows.items():
        yield f"  {name:<24}{_ms(seconds):>10} ms {seconds / times.step:>7.1%}"
    hidden = _ms(times.hidden_communication)
    yield f"  {'hidden communication':<24}{hidden:>10} ms  (while kernels ran)"


def _other_ranks(ranks: Sequence[RankProfile]) -> Iterator[str]:
    """The rank that waits least for others is the one that they wait for."""
    if len(ranks) == 1:
        return
    exposed = {each.rank: each.seconds.exposed_communication for each in ranks}
    least, most = min(exposed, key=exposed.__getitem__), max(exposed, key=exposed.__getitem__)
    yield (
        f"  exposed communication of {len(ranks)} ranks: from {_ms(exposed[least])} ms on rank "
        f"{least} to {_ms(exposed[most])} ms on rank {most}"
    )


def _kernels(profile: RankProfile) -> Iterator[str]:
    yield f"  {'own time':<{NAME_WIDTH}}{'calls/step':>12}{'ms/step':>12}{'share':>9}"
    for kernel in profile.kernels:
        name = short_name(kernel.name, NAME_WIDTH)
        yield (
            f"  {name:<{NAME_WIDTH}}{kernel.calls:>12,.1f}{_ms(kernel.seconds):>12}"
            f"{kernel.share:>9.1%}"
        )


def _floor(floor: Floor, times: StepTimes) -> Iterator[str]:
    """Against what matrix products alone could do."""
    line = f"Model FLOPs a step on this rank: {_flops(floor.model_flops)}FLOP"
    if floor.mfu is not None:
        line += f", {floor.mfu:.1%} of the device's peak (mfu)"
    yield line
    if floor.matmul_flops_per_second is not None and floor.seconds is not None:
        yield (
            f"Matrix products: {_flops(floor.matmul_flops)}FLOP at "
            f"{_flops(floor.matmul_flops_per_second)}FLOP/s"
        )
        yield (
            f"At that speed all model FLOPs would take {_ms(floor.seconds)} ms, "
            f"{floor.seconds / times.step:.1%} of the step"
        )


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.2f}"


def _flops(count: float) -> str:
    prefix, unit = next(((p, u) for p, u in _UNITS if count >= u), ("", 1.0))
    return f"{count / unit:,.2f} {prefix}"
