"""Small training runs, and runs that die or are stopped where a test says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from kept_weights import weights_in
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
    """Two epochs of the backbone of tiny_backbone.py, which the caller registers."""
    fixed = (
        "model.backbone=tiny",
        "train.threads=1",
        "train.epochs=2",
        "schedule.name=cosine",
        "data.global_batch_size=6",
    )
    return load_config(preset="smoke", overrides=[f"data.shards={shards}", *fixed, *overrides])


def last_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a run's newest checkpoint."""
    return weights_in(max((folder / "checkpoints").iterdir()))


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


# A run at another world size sees the same samples per step and adds them up in another order. So small a network on noise
# drifts: val AUC over 40 images, in steps of 1/400.
AUC_TOLERANCE = 0.05


def assert_same_samples(one: Path, other: Path) -> None:
    """Two finished runs of which the second has changed its number of workers: the same steps, the losses and AUC near."""
    rows, again = [pq.read_table(run / "history.parquet").to_pylist() for run in (one, other)]
    assert [row["checkpoint"] for row in rows] == [row["checkpoint"] for row in again]
    # Same samples in every step: BatchNorm sees other parts of them, so the losses are near and not equal.
    assert [row["train_loss"] for row in again] == pytest.approx([row["train_loss"] for row in rows], rel=0.1)
    aucs = [json.loads((run / "results.json").read_text())["splits"]["val"]["auc"] for run in (one, other)]
    assert aucs[1] == pytest.approx(aucs[0], abs=AUC_TOLERANCE)
