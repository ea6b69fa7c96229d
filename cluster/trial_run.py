"""one trial in one warm process: the core's question "who am I?" answered, its epochs handed to the driver, its end told.

No Ray here: an actor passes the calls on (``cluster.trial_workers``), so a test can drive a trial from a thread.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cluster.trial_place import opened_trial, pulse_of
from cluster.trial_state import beat
from medtl_dist.config import validate
from medtl_dist.errors import Interrupted, MedtlError
from medtl_dist.run import Folder, Signal
from medtl_dist.storage import is_remote
from medtl_dist.train.loop import fit
from medtl_dist.train.warm import Warm

BEAT_EVERY_S = 1.0


class Exchange:
    """A training thread and its driver take turns: the training waits after each epoch until the driver has decided."""

    def __init__(self) -> None:
        self.stop_asked = threading.Event()
        self._news: queue.Queue[dict[str, Any]] = queue.Queue()
        self._decisions: queue.Queue[bool] = queue.Queue()
        self._turn = threading.Lock()

    def say(self, row: Mapping[str, Any]) -> None:
        """From the training: an epoch's numbers; returns once the driver has decided."""
        with self._turn:
            self._news.put({"kind": "epoch", "row": dict(row)})
            if self._decisions.get():
                self.stop_asked.set()

    def finish(self, end: Mapping[str, Any]) -> None:
        """From the training: the last thing it says."""
        self._news.put({"kind": "end", **end})

    def next(self) -> dict[str, Any]:
        """From the driver: the next news, waited for."""
        return self._news.get()

    def decide(self, stop: bool) -> None:
        """From the driver: its answer to the last epoch."""
        self._decisions.put(stop)


@dataclass
class TrialRun:
    """A :class:`medtl_dist.run.Run` of one process that answers to a sweep's driver."""

    folder: Folder
    exchange: Exchange
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    alive: Callable[[], None] | None = field(default=None, repr=False)  # None: a file in the folder is touched
    _beat_at: float = field(default=0.0, repr=False)

    def report(self, metrics: Mapping[str, float | int | None]) -> None:
        self.exchange.say(metrics)

    def poll(self) -> Signal:
        if time.monotonic() - self._beat_at >= BEAT_EVERY_S:
            self._beat_at = time.monotonic()
            self.alive() if self.alive is not None else beat(self.folder.local_path)
        return Signal.CHECKPOINT_AND_STOP if self.exchange.stop_asked.is_set() else Signal.GO_ON


def train_trial(payload: Mapping[str, Any], exchange: Exchange, warm: Warm) -> dict[str, Any]:
    """Train a trial in its run folder, or go on there, and say how it ended. Never raises an ordinary exception.

    ``state``: finished; stopped (as asked, after a checkpoint); failed (``message``: hopeless, the same would happen again);
    crashed (``message``: worth another try).
    """

    def train(folder: Folder) -> None:
        with pulse_of(folder) as alive:
            fit(validate(payload["config"]), TrialRun(folder, exchange, alive=alive), warm=warm)

    return ending(payload, train, asked=exchange.stop_asked.is_set)


def ending(payload: Mapping[str, Any], train: Callable[[Folder], None], *, asked: Callable[[], bool]) -> dict[str, Any]:
    """``train`` in the trial's run folder, where nobody else writes, and its end as plain values. ``asked``: whether to stop."""
    remote = is_remote(payload["folder"])
    try:
        with opened_trial(payload) as folder:
            if not folder.exists("results.json"):
                train(folder)
    except Interrupted as error:
        if remote and not asked():
            # Its node can't reach the store, or the trial is another worker's by now: a try that failed.
            return {"state": "crashed", "message": error.message}
        return {"state": "stopped", "message": error.message}
    except MedtlError as error:
        return {"state": "failed", "message": error.message}
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        cause = (str(error).splitlines() or [""])[0][:300]
        return {
            "state": "crashed",
            "message": f"{type(error).__name__}: {cause} ({Path(where.filename).name}, line {where.lineno})",
        }
    return {"state": "finished"}
