"""Who am I, and where may I write: the one question the core asks of whatever started it.

``Run`` is answered by ``LocalRun`` here (one process, or spawned gloo processes) and by ``cluster.ray_run.RayRun``.
"""

from __future__ import annotations

import enum
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from medtl_dist import collectives
from medtl_dist.storage import Folder

__all__ = ["Folder", "LocalRun", "Run", "Signal"]


class Signal(enum.IntEnum):
    """Answer of :meth:`Run.poll`; ranks agree on the largest."""

    GO_ON = 0
    CHECKPOINT_AND_STOP = 1


@runtime_checkable
class Run(Protocol):
    """What the core needs to know. The same tests run against every implementation."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def local_rank(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def folder(self) -> Folder: ...

    def report(self, metrics: Mapping[str, float | int | None]) -> None:
        """Hand over one epoch's metrics, already global. Every rank calls it equally often."""
        ...

    def poll(self) -> Signal:
        """Whether to go on; every rank gets the same answer and calls it at the same steps."""
        ...


@dataclass
class LocalRun:
    """A run in this process, or one of several spawned processes that share a gloo group.

    ``stop_on_signals`` turns SIGTERM and the first Ctrl-C into ``CHECKPOINT_AND_STOP``; a second Ctrl-C acts at once.
    """

    folder: Folder
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    reports: list[dict[str, float | int | None]] = field(default_factory=list)
    received: int | None = None
    _handlers: dict[int, Any] = field(default_factory=dict)

    def stop_on_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._note)

    def forget_signals(self) -> None:
        """Put the process's own handlers back."""
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _note(self, number: int, _frame: object) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def report(self, metrics: Mapping[str, float | int | None]) -> None:
        self.reports.append(dict(metrics))

    def poll(self) -> Signal:
        mine = Signal.GO_ON if self.received is None else Signal.CHECKPOINT_AND_STOP
        return Signal(collectives.largest(int(mine)))
