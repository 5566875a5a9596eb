"""Work on many sites at once: worker threads with one torch thread each.

LAPACK on small matrices and single passes over one weight do not use a second core; several sites at once do. One torch
thread per worker also makes the bits of a result independent of how many cores there are.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

BUDGET = 2 << 30
"""Bytes that all workers together may hold at once, where one alone does not need more."""


def workers_for(size: int) -> int:
    """How many workers to run when each holds `size` bytes: at most one per core, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, BUDGET // max(1, size)))


def in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """``function(item)`` of each item, in the items' order, without gradients.

    Args:
        function: called in a worker thread.
        items: taken one by one in the calling thread, at most one more than there are workers ahead of the results.
        workers: number of threads.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, "hubkit-site", initializer=torch.set_num_threads, initargs=(1,))
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(_without_grad, function, item))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the workers' count is also that of threads made later


def _without_grad(function: Callable[[Item], Result], item: Item) -> Result:
    with torch.no_grad():
        return function(item)
