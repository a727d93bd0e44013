"""Work on many weights at once: one weight per thread, each thread on one core.

torch itself splits every operation over all cores and waits for the slowest, which takes several times as long on a
busy machine.
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
    """Threads in which torch uses one core each. By default there are as many as torch uses in the calling thread."""
    count = torch.get_num_threads()
    try:
        # torch's thread count belongs to one thread, and threads that start later inherit it.
        with ThreadPoolExecutor(workers or count, initializer=torch.set_num_threads, initargs=(1,)) as threads:
            yield threads
    finally:
        torch.set_num_threads(count)


def in_parallel(work: Callable[[T], R], items: Iterable[T], workers: int | None = None) -> Iterator[R]:
    """work(item) for each item, in order. At most `workers` + 1 items are held at once."""
    count = workers or torch.get_num_threads()
    with pool(count) as threads:
        under_way: deque[Future[R]] = deque()
        for item in items:
            under_way.append(threads.submit(work, item))
            if len(under_way) > count:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
