"""fit → history: where an epoch's time goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

# data_wait: for the next batch. compute: the step itself, DDP's exchange of gradients within it. communication: the small
# reduction before each step, which is mostly waiting for the slowest rank. evaluation, checkpoint: as they say.
# prefix_cache: filling it, which is no part of the time that rates are made from.
ACTIVITIES = ("data_wait", "compute", "communication", "evaluation", "checkpoint", "prefix_cache")


@dataclass
class Clock:
    """Seconds per activity since it was made, on this rank; ``num_steps`` is counted by the loop."""

    began: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ACTIVITIES, 0.0))
    num_steps: int = 0
    train_s: float = 0.0

    @contextlib.contextmanager
    def during(self, activity: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[activity] += time.monotonic() - start

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def row(self, global_batch_size: int) -> dict[str, float]:
        """The clock's columns of the history; a rate of 0 where no step was made."""
        train_s = self.train_s
        rate = self.num_steps * global_batch_size / train_s if train_s > 0 else 0.0
        waiting = self.seconds["data_wait"] / train_s if train_s > 0 else 0.0
        return {"images_per_s": rate, "data_wait_fraction": waiting} | {
            f"{activity}_s": seconds for activity, seconds in self.seconds.items()
        }
