"""fit → history: where an epoch's time goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

# data_wait: for the next batch. compute: the step itself, DDP's exchange of gradients within it. communication: the small
# reduction before each step, which is mostly waiting for the slowest rank. evaluation, checkpoint: as they say.
# prefix_cache: filling it, which is no part of the time that rates are made from.
ACTIVITIES = ("data_wait", "compute", "communication", "evaluation", "checkpoint", "prefix_cache")


_OPEN = 64  # pairs of events that are kept before they are read


@dataclass
class DeviceTime:
    """Seconds that a device spends in a block. The host is not made to wait for a GPU: events are read when they have passed."""

    device: torch.device | None = None  # None: the host
    seconds: float = 0.0
    _open: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list, repr=False)

    @contextlib.contextmanager
    def during(self) -> Iterator[None]:
        if self.device is None or self.device.type != "cuda":
            start = time.monotonic()
            yield
            self.seconds += time.monotonic() - start
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self._open.append((begin, end))
        if len(self._open) >= _OPEN:
            self.total()

    def total(self) -> float:
        """All seconds so far; waits for the block that was entered last."""
        for begin, end in self._open:
            end.synchronize()
            self.seconds += begin.elapsed_time(end) / 1000
        self._open.clear()
        return self.seconds


@dataclass
class Clock:
    """Seconds per activity since it was made, on this rank; ``num_steps`` is counted by the loop.

    ``forward``: the part of ``compute`` before gradients are exchanged, which no other rank can hold up."""

    began: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ACTIVITIES, 0.0))
    num_steps: int = 0
    train_s: float = 0.0
    forward: DeviceTime = field(default_factory=DeviceTime)

    @contextlib.contextmanager
    def during(self, activity: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[activity] += time.monotonic() - start

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def of_rank(self, batch_size: float) -> dict[str, float]:
        """This rank's own numbers of the epoch; ``batch_size``: its share of the global batch. Zeros where no step was made."""
        shares = {
            name: self.seconds[name] / self.train_s if self.train_s > 0 else 0.0
            for name in ("data_wait", "communication")
        }
        return {
            "rank_images_per_s": self.num_steps * batch_size / self.train_s if self.train_s > 0 else 0.0,
            "rank_data_wait_fraction": shares["data_wait"],
            "rank_communication_fraction": shares["communication"],
        }

    def row(self, global_batch_size: int) -> dict[str, float]:
        """The clock's columns of the history; a rate of 0 where no step was made."""
        train_s = self.train_s
        rate = self.num_steps * global_batch_size / train_s if train_s > 0 else 0.0
        waiting = self.seconds["data_wait"] / train_s if train_s > 0 else 0.0
        return {"images_per_s": rate, "data_wait_fraction": waiting} | {
            f"{activity}_s": seconds for activity, seconds in self.seconds.items()
        }
