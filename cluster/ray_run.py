"""The core's question "who am I?" answered by a Ray Train worker."""

from __future__ import annotations

import enum
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import ray.train
import ray.train.torch
import torch

from cluster import notices
from cluster.metrics import export
from medtl_dist import collectives
from medtl_dist.run import Folder, Signal

_LOOK_EVERY_S = 1.0


class Why(enum.IntEnum):
    """Why a run should stop. Ranks agree on the largest, so what must not be answered by going on comes last."""

    NO_REASON = 0
    LOOK = 1  # rank 0: it is time to look for a preemption notice, all together
    PREEMPTED = 2  # a node of the run will be taken away
    TERMINATED = 3  # SIGTERM to a worker process
    ASKED = 4  # the driver was told to stop


@dataclass
class RayRun:
    """A :class:`medtl_dist.run.Run` inside a Ray Train worker; Ray is given metrics only, checkpoints are the core's.

    ``attempt``: the Ray run's name, by which the driver is heard. ``why``: why it was told to stop, once it was.
    """

    folder: Folder
    attempt: str
    why: Why = Why.NO_REASON
    _looked_at: float = field(default=0.0, repr=False)

    @property
    def rank(self) -> int:
        return ray.train.get_context().get_world_rank()

    @property
    def world_size(self) -> int:
        return ray.train.get_context().get_world_size()

    @property
    def local_rank(self) -> int:
        return ray.train.get_context().get_local_rank()

    @property
    def device(self) -> torch.device:
        return ray.train.torch.get_device()

    def report(self, metrics: Mapping[str, float | int | None]) -> None:
        export(metrics, rank=self.rank, run=self.folder.path.rpartition("/")[2])
        ray.train.report(dict(metrics))

    def poll(self) -> Signal:
        mine = Why.NO_REASON
        if notices.own_signals.received is not None:
            mine = Why.TERMINATED
        elif self.rank == 0 and time.monotonic() - self._looked_at >= _LOOK_EVERY_S:
            self._looked_at = time.monotonic()
            mine = Why.ASKED if notices.asked_to_stop(self.attempt) else Why.LOOK
        why = Why(collectives.largest(int(mine)))
        if why is Why.LOOK:  # a barrier of Ray's, so only once all ranks know that all of them ask
            why = Why.PREEMPTED if ray.train.get_preemption_info() is not None else Why.NO_REASON
        self.why = why
        return Signal.CHECKPOINT_AND_STOP if why else Signal.GO_ON
