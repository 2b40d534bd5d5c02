"""Halves of a micro-batch that take turns: one is computed while the other waits for other ranks.

As in Domino (Wang et al. 2024, arXiv 2409.15241, section 3.2), rows do not depend on each other, so
that the tensor-parallel collectives of some go on while a layer is computed for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from torch import Tensor

Steps = Generator[None, None, Tensor]
"""A computation in steps; a step that begins with waiting comes two after that which has sent."""


def interleave(computations: Sequence[Callable[[], Steps]]) -> tuple[Tensor, ...]:
    """The results of computations, a step of each in turn, all in as many steps.

    The first is one step ahead: what it sends at the end of a step is on its way while the others
    compute the next one of theirs, and so is what they send.
    """
    going = [start() for start in computations]
    results: dict[int, Tensor] = {}

    def advance(number: int) -> None:
        try:
            next(going[number])
        except StopIteration as end:
            results[number] = end.value

    if len(going) > 1:
        advance(0)
    while len(results) < len(going):
        for number in range(len(going)):
            if number not in results:
                advance(number)
    return tuple(results[number] for number in range(len(going)))
