"""Work on many weights at once: a weight a thread, each thread on one core, which waits for no other.

torch splits every operation over all cores and waits for the slowest: on a busy machine, several times as long.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

R = TypeVar("R")


@contextlib.contextmanager
def pool(workers: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Threads in which torch uses one core each; as many as it uses here, if not said."""
    count = torch.get_num_threads()
    try:
        # How many threads torch uses is the calling thread's own, and what threads that are made later begin with.
        with ThreadPoolExecutor(workers or count, initializer=torch.set_num_threads, initargs=(1,)) as threads:
            yield threads
    finally:
        torch.set_num_threads(count)


def in_parallel(work: Callable[[T], R], items: Iterable[T], workers: int | None = None) -> Iterator[R]:
    """work(item) for each item, in their order; few more items are taken than there are threads."""
    count = workers or torch.get_num_threads()
    with pool(count) as threads:
        under_way: deque[Future[R]] = deque()
        for item in items:
            under_way.append(threads.submit(work, item))
            if len(under_way) > count:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
