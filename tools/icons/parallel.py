"""Work spread over processes, results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from multiprocessing import get_context
from typing import TypeVar

from ldm import workers

T = TypeVar("T")
R = TypeVar("R")


def ordered_map(work: Callable[[T], R], items: Iterable[T], processes: int) -> Iterator[R]:
    """`work` over `items`, in order, at most twice as many under way as there are processes; 1 works in this one."""
    if processes == 1:
        yield from map(work, items)
        return
    waiting: deque[Future[R]] = deque()
    with workers.pool(processes, get_context("spawn")) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
