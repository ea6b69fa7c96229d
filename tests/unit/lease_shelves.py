"""A shelf of leases in memory, whose clock a test sets, and actors whose steps a test orders."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class MemoryShelf:
    """As a store does it: each call happens at one moment. ``before``: what a call waits for first."""

    now: float = 0.0
    files: dict[str, tuple[bytes, float]] = field(default_factory=dict)
    before: Callable[[str], None] = lambda call: None

    def names(self) -> list[str]:
        self.before("names")
        return sorted(self.files)

    def create(self, name: str, data: bytes) -> bool:
        self.before("create")
        if name in self.files:
            return False
        self.files[name] = (data, self.now)
        return True

    def put(self, name: str, data: bytes) -> None:
        self.before("put")
        self.files[name] = (data, self.now)

    def get(self, name: str) -> bytes | None:
        self.before("get")
        return self.files[name][0] if name in self.files else None

    def delete(self, name: str) -> None:
        self.before("delete")
        self.files.pop(name, None)

    def written(self, name: str) -> float | None:
        self.before("written")
        return self.files[name][1] if name in self.files else None


class Turns:
    """Threads that take one step each when they are told to, so that an interleaving is a list of numbers."""

    def __init__(self, acts: Sequence[Callable[[], None]]) -> None:
        self._go = [threading.Semaphore(0) for _ in acts]
        self._came = [threading.Semaphore(0) for _ in acts]
        self.ended = [False] * len(acts)
        self._who: dict[int, int] = {}
        self.errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._live, args=(i, act), daemon=True) for i, act in enumerate(acts)]
        for number, thread in enumerate(self._threads):
            thread.start()
            self._came[number].acquire()

    def wait(self, _call: str = "") -> None:
        """Called in an actor's thread before a step."""
        number = self._who[threading.get_ident()]
        self._came[number].release()
        self._go[number].acquire()

    def step(self, number: int) -> None:
        """Let an actor take its next step, and wait until it has."""
        if not self.ended[number]:
            self._go[number].release()
            self._came[number].acquire()

    def _live(self, number: int, act: Callable[[], None]) -> None:
        self._who[threading.get_ident()] = number
        try:
            self.wait()
            act()
        except BaseException as error:
            self.errors.append(error)
        self.ended[number] = True
        self._came[number].release()
