"""Items that another thread computes while the last ones are used."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

Item = TypeVar("Item")


def prefetched(items: Generator[Item, None, None], count: int) -> Generator[Item, None, None]:
    """Yield the items, of which up to `count` are computed before they are asked for.

    When the iteration ends, it waits for those that have been begun.
    """
    with closing(items), ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        begun = deque(thread.submit(_next, items) for _ in range(count))
        try:
            while following := begun.popleft().result():
                begun.append(thread.submit(_next, items))
                yield following[0]
        finally:
            for each in begun:
                each.cancel()


def _next(items: Iterator[Item]) -> tuple[Item] | None:
    for item in items:
        return (item,)
    return None
