"""The core's question "who am I?" answered by a Ray Train worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ray.train
import ray.train.torch
import torch

from cluster.metrics import export
from medtl_dist import collectives
from medtl_dist.run import Folder, Signal


@dataclass
class RayRun:
    """A :class:`medtl_dist.run.Run` inside a Ray Train worker; Ray is given metrics only, checkpoints are the core's."""

    folder: Folder

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
        # Preemption notices join here; agreeing already keeps every rank at the same step.
        return Signal(collectives.largest(int(Signal.GO_ON)))
