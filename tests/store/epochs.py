"""An epoch of a set as a list of batches, and whether two are the same."""

from __future__ import annotations

from typing import Any

import torch

from medtl_dist.data.shards import Dataset
from medtl_dist.data.stream import Batch, eval_batches, train_batches
from medtl_dist.data.transforms import EvalTransform, TrainTransform

BATCH, LANES = 12, 4


def epoch_of(dataset: Dataset, **options: Any) -> list[Batch]:
    """One training epoch, seed 5."""
    settings: dict[str, Any] = {"seed": 5, "epoch": 0, "max_lanes": LANES, **options}
    view = TrainTransform(16, crop_area_min=0.5, brightness=0.2)
    return list(train_batches(dataset, transform=view, global_batch_size=BATCH, **settings))


def scores_of(dataset: Dataset, split: str = "val") -> list[Batch]:
    """One evaluation pass."""
    return list(eval_batches(dataset, split, transform=EvalTransform(16), batch_size=16))


def same(one: list[Batch], other: list[Batch]) -> bool:
    """Keys, labels and pixels, in order."""
    return len(one) == len(other) and all(
        a.keys == b.keys and torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        for a, b in zip(one, other, strict=True)
    )
