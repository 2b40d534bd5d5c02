"""ZeRO-3's gathering of weights in a micro-batch, step by step, as DeepSpeed 0.19.8 does it.

Follows `partitioned_param_coordinator.py`: before a module is computed, its weights are gathered if
they are not there; then those of the next modules, until a bucket is full; after a module, its
weights are given back unless they are used again within the reuse distance, or were passed by
while those of later modules were asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BLOCKS = "blocks."


@dataclass(frozen=True)
class GatherLimits:
    """DeepSpeed's settings of stage 3, in elements.

    prefetch: asked for ahead when a module is about to be computed (stage3_prefetch_bucket_size)
    reuse: distance to the next use up to which a weight stays (stage3_max_reuse_distance)
    live: gathered at the same time, as far as they are asked for ahead (stage3_max_live_parameters)
    """

    prefetch: int
    reuse: int
    live: int


@dataclass(frozen=True)
class Gathered:
    """Elements that a micro-batch gathers, and that are gathered at the same time, in its passes.

    forward, backward: gathered during that pass
    late: of these, asked for only when they are needed
    at_loss, most_forward, most_backward: there or on their way at the same time
    """

    forward: int
    backward: int
    late: int
    at_loss: int
    most_forward: int
    most_backward: int


@dataclass(frozen=True)
class _Module:
    name: str
    parameters: tuple[str, ...]

    @property
    def block(self) -> bool:
        return self.name.startswith(BLOCKS)


def gathered_in_a_micro_batch(
    sizes: Mapping[str, int], kept: frozenset[str], limits: GatherLimits
) -> Gathered:
    """sizes: elements of each parameter, in the model's order. kept: parameters that stay."""
    return _MicroBatch(sizes, kept, limits).run()


def _modules(sizes: Mapping[str, int]) -> list[_Module]:
    """Those that gather weights, in the order of the forward pass; blocks as a whole."""
    pieces: dict[str, list[str]] = {"": []}
    for name in sizes:
        parts = name.split(".")
        block = name.startswith(BLOCKS)
        pieces.setdefault(".".join(parts[:2]) if block else parts[0], []).append(name)
    pieces[""] = pieces.pop("positions", [])  # the model's own
    if "head" not in pieces:
        pieces["head"] = list(pieces["embedding"])  # tied
    return [_Module(name, tuple(each)) for name, each in pieces.items()]


class _MicroBatch:
    def __init__(
        self, sizes: Mapping[str, int], kept: frozenset[str], limits: GatherLimits
    ) -> None:
        modules = _modules(sizes)
        self._sizes, self._limits, self._kept = sizes, limits, kept
        self._turn = len(modules)
        root, *others = modules
        self._order = [root, *others, root, *reversed(others)]
        self._queue = deque(
            (name, step) for step, module in enumerate(self._order) for name in module.parameters
        )
        self._passed: dict[str, int] = {}  # the last use for which a parameter was asked for
        self._there: set[str] = set()
        self._live = 0
        self._gathered, self._most = [0, 0], [0, 0]
        self._late = 0

    def run(self) -> Gathered:
        at_loss = 0
        for step, module in enumerate(self._order):
            self._fetch(module, step)
            if module is self._order[0]:
                continue  # the model as a whole ends with its last module
            self._release(module, step + 1)
            if step == self._turn - 1:
                self._release(self._order[0], step + 1)
                at_loss = self._live
        forward, backward = self._gathered
        return Gathered(forward, backward, self._late, at_loss, *self._most)

    def _gather(self, names: Sequence[str], backward: bool) -> int:
        missing = [name for name in dict.fromkeys(names) if self._is_missing(name)]
        size = sum(self._sizes[name] for name in missing)
        self._there.update(missing)
        self._live += size
        self._gathered[backward] += size
        self._most[backward] = max(self._most[backward], self._live)
        return size

    def _is_missing(self, name: str) -> bool:
        return name not in self._there and name not in self._kept

    def _fetch(self, module: _Module, step: int) -> None:
        backward = step >= self._turn
        self._late += self._gather(module.parameters, backward)
        ahead = {name for name in module.parameters if self._passed.get(name, -1) < step}
        found: set[str] = set()
        while self._queue and len(found) < len(ahead):
            name, self._passed[name] = self._queue[0]
            self._queue.popleft()
            found.add(name)
        most = min(self._limits.live - self._live, self._limits.prefetch)
        asked: dict[str, None] = {}
        size = 0
        while self._queue and size < most:
            name, use = self._queue.popleft()
            self._passed[name] = max(self._passed.get(name, -1), use)
            if self._is_missing(name) and name not in asked:
                asked[name] = None
                size += self._sizes[name]
        self._gather(list(asked), backward)

    def _release(self, module: _Module, step: int) -> None:
        names = {
            name
            for name in module.parameters
            if name in self._there and self._passed.get(name, -1) <= step
        }
        distance = 0
        for later in self._order[step:]:
            if distance >= self._limits.reuse or not names:
                break
            if later.block and not module.block:
                continue  # looks at a module's own parameters alone
            if module.block and later is self._order[0]:
                return  # looks into modules, and the whole model comes before the backward pass
            names.difference_update(later.parameters)
            distance += sum(self._sizes[name] for name in later.parameters)
        self._there -= names
        self._live -= sum(self._sizes[name] for name in names)
