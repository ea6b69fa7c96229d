"""announced pieces ─► samples that are there when they are asked for: reads ahead in a few threads, bounded in memory.

What several of those threads need (rows of an index, its footer) is read by the first of them for all: ``Shared``.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")

NUM_THREADS = 4
BUDGET_BYTES = 64 * 2**20


@dataclass
class _Entry(Generic[Value]):
    size: int
    begun: bool = False
    values: tuple[Value, ...] = ()
    error: BaseException | None = None

    @property
    def done(self) -> bool:
        return bool(self.values) or self.error is not None


class Ahead(Generic[Key, Value]):
    """Calls ``load`` for announced keys in the order announced, while no more than ``budget`` bytes (as announced) are
    loaded and not taken; one larger than that is loaded alone. The threads end with ``close``."""

    def __init__(
        self, load: Callable[[Key], Value], *, num_threads: int = NUM_THREADS, budget: int = BUDGET_BYTES
    ) -> None:
        self._load = load
        self._num_threads = num_threads
        self._budget = budget
        self._held = 0
        self._entries: OrderedDict[Key, _Entry[Value]] = OrderedDict()
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()
        self._closed = False

    def announce(self, key: Key, size: int) -> None:
        """This key will be asked for. Twice announced is once loaded."""
        with self._changed:
            if self._closed or key in self._entries:
                return
            self._entries[key] = _Entry(size)
            if len(self._threads) < min(self._num_threads, len(self._entries)):
                # Daemons: a read that hangs must not keep the process from ending.
                self._threads.append(threading.Thread(target=self._work, daemon=True, name="medtl-ahead"))
                self._threads[-1].start()
            self._changed.notify_all()

    def take(self, key: Key) -> Value:
        """What ``load(key)`` returns or raises: loaded already, being loaded, or else loaded here."""
        with self._changed:
            entry = self._entries.get(key)
            if entry is not None and entry.begun:
                self._changed.wait_for(lambda: entry.done)
                self._held -= entry.size
            if entry is not None:
                self._entries.pop(key, None)  # gone already where it was closed meanwhile
                self._changed.notify_all()
        if entry is None or not entry.begun:
            return self._load(key)
        if entry.error is not None:
            raise entry.error
        return entry.values[0]

    def close(self) -> None:
        """Ends the threads as soon as they have loaded what they are at; loads nothing more."""
        with self._changed:
            self._closed = True
            self._entries.clear()
            self._changed.notify_all()

    def _next(self) -> tuple[Key, _Entry[Value]] | None:
        for key, entry in self._entries.items():
            if not entry.begun:
                return (key, entry) if self._held == 0 or self._held + entry.size <= self._budget else None
        return None

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._next() is not None)
                following = self._next()
                if self._closed or following is None:
                    return
                key, entry = following
                entry.begun = True
                self._held += entry.size
            try:
                value = (self._load(key),)
                error = None
            except BaseException as caught:  # raised where it is asked for
                value, error = (), caught
            with self._changed:
                entry.values, entry.error = value, error
                self._changed.notify_all()


class Shared(Generic[Key, Value]):
    """Results of calls, each made once for all who ask meanwhile; a failure is told to all of them, then forgotten. The
    least recently asked go when the weights kept exceed ``limit``, the newest stays."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._futures: OrderedDict[Key, tuple[int, Future[Value]]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key, make: Callable[[], Value], weight: int = 1) -> Value:
        """The result of ``make()``, now or before. Raises: what it raises."""
        with self._lock:
            _, future = found = self._futures.get(key, (weight, Future()))
            mine = key not in self._futures
            self._futures[key] = found
            self._futures.move_to_end(key)
        if not mine:
            return future.result()
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                self._futures.pop(key, None)
            future.set_exception(error)
            raise
        self._keep(future, value, weight)
        return value

    def clear(self) -> None:
        """Forgets what is there; calls under way go on."""
        with self._lock:
            for key in [key for key, (_, future) in self._futures.items() if future.done()]:
                self._held -= self._futures.pop(key)[0]

    def _keep(self, future: Future[Value], value: Value, weight: int) -> None:
        with self._lock:  # done and counted at once, for ``clear`` takes off the weights of what is done
            future.set_result(value)
            self._held += weight
            while self._held > self._limit and len(self._futures) > 1:
                oldest, (its_weight, future) = next(iter(self._futures.items()))
                if not future.done():
                    return
                del self._futures[oldest]
                self._held -= its_weight
