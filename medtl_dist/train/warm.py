"""a process's earlier trainings → the next one: what a sweep's trials share, so that only the first pays for it."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np

from medtl_dist.run import Run
from medtl_dist.train.evaluate import Predictions


@dataclass
class Warm:
    """What a process keeps between trainings. Nothing in it changes a number: with or without it, the same bits.

    Attributes:
        keep_epoch_scores: write the pooled val logits of every epoch, ``predictions/epochs/<epoch>.npy`` (float32
            [n, classes], in the index's order), so that a sweep can say how optimistic its best epoch is.
    """

    keep_epoch_scores: bool = False


def keep_epoch_scores(run: Run, epoch: int, predictions: Predictions) -> None:
    """Write an epoch's pooled val logits. Rank 0 only. Raises OSError when the disk is full."""
    buffer = io.BytesIO()
    np.save(buffer, predictions.logits.astype(np.float32), allow_pickle=False)
    run.folder.write(epoch_scores(epoch), buffer.getvalue())


def epoch_scores(epoch: int) -> str:
    """Where an epoch's val logits lie in a run folder."""
    return f"predictions/epochs/{epoch:04d}.npy"
