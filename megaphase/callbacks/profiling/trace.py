"""torch's profiler trace (Chrome trace events), read as what the device did in the marked steps.

On a GPU the device's work are its kernels and copies, on the CPU the operators' own time: what
they do not spend in operators that they call. A kernel belongs to the operator that launched it.
Times are in microseconds, as in the trace.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megaphase.callbacks.profiling.intervals import Spans, spans
from megaphase.callbacks.profiling.kinds import (
    COMPILED_GRAPH,
    OPTIMIZER_STEP,
    Kind,
    kind_of_kernel,
    kind_of_operator,
    matmul_flops,
)

# The mark that the recorder puts around every step.
STEP_MARK = "training step "

_GLOO = "gloo:"
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_ENCLOSING = (Kind.MATMUL, Kind.ATTENTION, Kind.OPTIMIZER, Kind.COMMUNICATION)
_ROUNDING_MICROSECONDS = 0.005

Event = dict[str, Any]


@dataclass(frozen=True)
class DeviceWork:
    """A kernel, or a call of an operator with its own time."""

    name: str
    kind: Kind
    times: Sequence[tuple[float, float]]

    @property
    def duration(self) -> float:
        return sum(end - start for start, end in self.times)


@dataclass(frozen=True)
class DeviceTrace:
    """The device's work in a trace.

    Attributes:
        on_gpu: whether the device is a GPU.
        steps: the marked steps, in their order.
        work: on the device; of what came between two steps, too.
        host_optimizer: when the host was in the optimizer's step; only where the device is a GPU.
        host_collectives: when the host began a collective or waited in it; only where the device
            is the CPU.
        matmul_flops: of the steps' matrix products; 0 where their shapes are not known.
    """

    on_gpu: bool
    steps: Spans
    work: list[DeviceWork]
    host_optimizer: Spans
    host_collectives: Spans
    matmul_flops: int


@dataclass
class Call:
    """A call on the host: an operator, an autograd node, a mark, or a kernel's launch.

    own: the times that it spent in no call below it.
    """

    event: Event
    start: float
    end: float
    parent: Call | None
    kind: Kind | None
    own: list[tuple[float, float]] = field(default_factory=list)
    covered_until: float = 0.0

    @property
    def name(self) -> str:
        name: str = self.event["name"]
        return name

    def flops(self) -> int:
        """Of a matrix product that is not part of another."""
        if self.parent is not None and self.parent.kind is Kind.MATMUL:
            return 0
        return matmul_flops(self.name, self.event.get("args", {}).get("Input Dims", []))


def read_trace(events: Iterable[Event]) -> DeviceTrace:
    """Take a trace's `traceEvents` apart."""
    timed = [event for event in events if event.get("ph") == "X"]
    origin = min((event["ts"] for event in timed), default=0.0)
    for event in timed:  # microseconds since the machine was started leave few digits for parts
        event["ts"] -= origin
    steps = sorted(_span(event) for event in timed if _is_step(event))
    calls = _host_calls(timed)
    on_device = [event for event in timed if event.get("cat") in _ON_DEVICE]
    optimizer = [call for call in calls if call.name.startswith(OPTIMIZER_STEP)]
    collectives = [call for call in calls if call.kind is Kind.COMMUNICATION]
    return DeviceTrace(
        on_gpu=bool(on_device),
        steps=spans(steps),
        work=_kernels(on_device, calls) if on_device else _own_work(calls) + _gloo_work(timed),
        host_optimizer=_spans_of(optimizer if on_device else []),
        host_collectives=_spans_of([] if on_device else collectives),
        matmul_flops=sum(
            call.flops() for call in calls if any(start <= call.start < end for start, end in steps)
        ),
    )


def _spans_of(calls: list[Call]) -> Spans:
    return spans([(call.start, call.end) for call in calls])


def _host_calls(events: Iterable[Event]) -> list[Call]:
    """All calls of the host's threads, but for gloo's, with what each was called by."""
    events = list(events)
    gloo = {event["tid"] for event in events if _is_gloo(event)}
    steps = {event["tid"] for event in events if _is_step(event)}
    threads = defaultdict(list)
    for event in events:
        if _is_call(event) and event["tid"] not in gloo - steps:
            threads[event["tid"]].append(event)
    return [call for thread in threads.values() for call in _thread_calls(thread)]


def _thread_calls(events: list[Event]) -> list[Call]:
    """Calls of one thread: they are nested or disjoint."""
    calls: list[Call] = []
    stack: list[Call] = []
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        start, end = _span(event)
        while stack and stack[-1].end <= start + _ROUNDING_MICROSECONDS:
            _close(stack.pop())
        parent = stack[-1] if stack else None
        if parent is not None:
            end = min(end, parent.end)
            _note_own(parent, start)
            parent.covered_until = end
        call = Call(event, start, end, parent, _kind(event, parent), covered_until=start)
        calls.append(call)
        stack.append(call)
    while stack:
        _close(stack.pop())
    return calls


def _close(call: Call) -> None:
    _note_own(call, call.end)


def _note_own(call: Call, until: float) -> None:
    if until > call.covered_until:
        call.own.append((call.covered_until, until))


def _kind(event: Event, parent: Call | None) -> Kind | None:
    """Operators called by the optimizer, by attention or the like are counted as part of it."""
    if parent is not None and parent.kind in _ENCLOSING:
        return parent.kind
    return None if event["cat"] in _LAUNCHES else kind_of_operator(event["name"])


def _kernels(on_device: list[Event], calls: list[Call]) -> list[DeviceWork]:
    launched_by = {
        call.event["args"]["correlation"]: call.kind
        for call in calls
        if call.event["cat"] in _LAUNCHES and "correlation" in call.event.get("args", {})
    }
    return [
        DeviceWork(event["name"], _kernel_kind(event, launched_by), [_span(event)])
        for event in on_device
    ]


def _kernel_kind(event: Event, launched_by: dict[int, Kind | None]) -> Kind:
    by_name = kind_of_kernel(event["name"])
    launcher = launched_by.get(event.get("args", {}).get("correlation", -1))
    if by_name is Kind.COMMUNICATION or launcher in (None, Kind.OTHER, Kind.COMMUNICATION):
        return by_name
    return launcher


def _own_work(calls: list[Call]) -> list[DeviceWork]:
    """Operators, but for those that begin collectives: gloo's own threads tell more of these."""
    return [
        DeviceWork(call.name, call.kind, call.own)
        for call in calls
        if call.own and call.kind not in (None, Kind.COMMUNICATION)
    ]


def _gloo_work(events: list[Event]) -> list[DeviceWork]:
    """Collectives from the call to their end, with the waiting for others; they may overlap."""
    return [
        DeviceWork(event["name"], Kind.COMMUNICATION, [_span(event)])
        for event in events
        if _is_gloo(event)
    ]


def _is_call(event: Event) -> bool:
    if event.get("cat") == "cpu_op" or event.get("cat") in _LAUNCHES:
        return True
    return _is_mark(event) and event["name"].startswith((OPTIMIZER_STEP, COMPILED_GRAPH))


def _is_mark(event: Event) -> bool:
    return event.get("cat") == "user_annotation"


def _is_gloo(event: Event) -> bool:
    return _is_mark(event) and event["name"].startswith(_GLOO)


def _is_step(event: Event) -> bool:
    return _is_mark(event) and event["name"].startswith(STEP_MARK)


def _span(event: Event) -> tuple[float, float]:
    return event["ts"], event["ts"] + event["dur"]
