"""What a driver and its workers tell each other beside Ray Train: "stop", "we have begun", and "my process is to end".

It goes through the key-value store of Ray's own control service. An actor would cost a process per run, and a file in the run
folder may show up a minute late on a network filesystem (a name that was looked for in vain is cached); a notice leaves 30 s.
"""

from __future__ import annotations

import signal
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray.experimental.internal_kv as store
from ray.train.v2._internal.execution.callback import WorkerCallback

_NAMESPACE = b"medtl"


def ask_to_stop(attempt: str) -> None:
    """Ask the attempt's rank 0, wherever it runs, to stop after a checkpoint."""
    store._internal_kv_put(f"{attempt}:stop", b"1", namespace=_NAMESPACE)


def asked_to_stop(attempt: str) -> bool:
    return store._internal_kv_exists(f"{attempt}:stop", namespace=_NAMESPACE)


def mark_begun(attempt: str) -> None:
    """Said by rank 0 once its process runs: from then on there is somebody who can hear a wish to stop."""
    store._internal_kv_put(f"{attempt}:begun", b"1", namespace=_NAMESPACE)


def has_begun(attempt: str) -> bool:
    return store._internal_kv_exists(f"{attempt}:begun", namespace=_NAMESPACE)


def forget(attempt: str) -> None:
    store._internal_kv_del(f"{attempt}:", del_by_prefix=True, namespace=_NAMESPACE)


@dataclass
class Signals:
    """The signals that this process got; a second Ctrl-C acts at once."""

    received: int | None = None

    def note(self, number: int, _frame: types.FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


@contextmanager
def noting_signals() -> Iterator[Signals]:
    """SIGTERM and the first Ctrl-C are noted inside the block; outside the main thread nothing is."""
    signals, before = Signals(), dict[int, Any]()
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, signals.note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Of this worker process: what ends a pod or a batch job sends it to every process, with a grace.
own_signals = Signals()


class NoteSigterm(WorkerCallback):
    """Lets a worker finish its step and write a checkpoint on SIGTERM. Ray ends workers by SIGKILL where it means to."""

    def after_init_train_context(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, own_signals.note)
