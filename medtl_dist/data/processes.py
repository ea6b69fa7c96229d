"""items ─► results, in order: pure functions in worker processes. Packing, checking and adopting start theirs here.

The window of unfinished items is bounded, and so is memory. Which worker does what never shows in the result.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

import cv2

from medtl_dist.errors import Interrupted
from medtl_dist.storage import leave_if_stuck

Item = TypeVar("Item")
Result = TypeVar("Result")


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(work: Callable[..., Result], items: Sequence[Item], num_workers: int, *common: Any) -> Generator[Result]:
    """``work(*common, item)`` of every item, in order; with one worker, or one item, in this process. ``common`` is
    sent to each process once. At most two items per worker wait, so that results do not pile up.

    Raises: Interrupted, a process was killed; whatever ``work`` raises.
    """
    num_workers = min(num_workers, len(items))
    if num_workers <= 1:
        for item in items:
            yield work(*common, item)
        return
    with running_pool(num_workers, _start_with, work, common) as pool:
        yield from bounded_results(pool, _run, items, 2 * num_workers)


@contextmanager
def running_pool(
    num_workers: int, start: Callable[..., None] | None = None, *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with the block, whatever happens. ``start(*arguments)``: the first thing each of them does;
    ``start_worker`` is to be a part of it."""
    # spawn: Arrow has threads in this process, and a fork would copy their locks.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=start or start_worker, initargs=arguments)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def bounded_results(
    pool: ProcessPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], window: int
) -> Generator[Result]:
    """``work(item)`` of every item, in order, at most ``window`` of them begun and not taken.

    Raises: Interrupted, a process was killed; whatever ``work`` raises.
    """
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise Interrupted(
            "a worker process died, most likely for want of memory: run the command again with fewer --workers"
        ) from None
    finally:
        for future in waiting:
            future.cancel()


def start_worker() -> None:
    """What every worker process does first: one thread of OpenCV's, Ctrl-C left to the parent, and no life without it."""
    cv2.setNumThreads(1)  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    multiprocessing.util.Finalize(None, leave_if_stuck, exitpriority=0)


def _end_with_parent() -> None:
    # Pool workers hold both ends of their queue, so a killed parent would leave them waiting for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


_begun: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []  # of this worker process: work, common


def _start_with(work: Callable[..., Any], common: tuple[Any, ...]) -> None:
    start_worker()
    _begun[:] = [(work, common)]


def _run(item: Any) -> Any:
    work, common = _begun[0]
    return work(*common, item)
