"""Small training runs, and runs that die or are stopped where a test says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from torch import Tensor

from medtl_dist.config import Config, load_config
from medtl_dist.run import Folder, LocalRun, Signal

NUMBERS = ("epoch", "train_loss", "lr", "val_auc", "val_loss", "val_average_precision", "checkpoint")


class Killed(BaseException):
    """What a SIGKILL leaves on disk: everything up to here, nothing after."""


class DyingRun(LocalRun):
    """Dies in the report of an epoch, or dies or is told to stop at the n-th poll (every five steps)."""

    die_after_epoch: int | None = None
    die_at_poll: int | None = None
    stop_at_poll: int | None = None
    polls: int = 0

    def report(self, metrics: Mapping[str, float | int | None]) -> None:
        super().report(metrics)
        if metrics["epoch"] == self.die_after_epoch:
            raise Killed

    def poll(self) -> Signal:
        self.polls += 1
        if self.polls == self.die_at_poll:
            raise Killed
        if self.polls == self.stop_at_poll:
            self.received = 15
        return super().poll()


def run_in(folder: Path | str, rank: int = 0, world_size: int = 1) -> DyingRun:
    return DyingRun(Folder.local(folder), torch.device("cpu"), rank=rank, world_size=world_size, local_rank=rank)


def small_config(shards: str, *overrides: str) -> Config:
    fixed = ("train.threads=1", "train.epochs=2", "schedule.name=cosine", "data.global_batch_size=6")
    return load_config(preset="smoke", overrides=[f"data.shards={shards}", *fixed, *overrides])


def last_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a run's newest checkpoint."""
    return load_file(max((folder / "checkpoints").iterdir()) / "model.safetensors")


def assert_same_bits(one: Path, other: Path) -> None:
    """Two finished runs: the same newest weights, history and val predictions, to the last bit."""
    weights, again = last_weights(one), last_weights(other)
    assert again.keys() == weights.keys()
    for key, tensor in weights.items():
        assert torch.equal(again[key], tensor), f"{other.name}: {key}"
    histories = [pq.read_table(run / "history.parquet").select(NUMBERS) for run in (one, other)]
    assert histories[0] == histories[1]
    tables = [pq.read_table(run / "predictions" / "val.parquet") for run in (one, other)]
    assert tables[0] == tables[1]
