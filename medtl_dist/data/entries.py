"""index.parquet ─► rows, labels and keys of a pass, step by step: what is read where the pixels are not needed.

The same plan and the same order as ``data/reader.py``, whose batches hold the images of these rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from medtl_dist.data.pieces import Draw, Reader
from medtl_dist.data.plan import IntArray, Piece
from medtl_dist.data.reader import EvalPass, TrainPass, Window
from medtl_dist.data.shards import Dataset


@dataclass(frozen=True, eq=False)
class Entries:
    """What the index says of some samples: ``rows`` int64 [n], their places in the split, index order; ``labels`` int64
    [n], or label sets int8 [n, classes]; ``keys`` uint8 [n, 16]."""

    rows: IntArray
    labels: npt.NDArray[Any]
    keys: npt.NDArray[np.uint8]

    def hex_keys(self) -> list[str]:
        """The keys as hexadecimal strings."""
        text = self.keys.tobytes().hex()
        return [text[start : start + 32] for start in range(0, len(text), 32)]

    def take(self, places: IntArray | slice) -> Entries:
        return Entries(self.rows[places], self.labels[places], self.keys[places])


def train_entries(work: TrainPass) -> Iterator[Entries]:
    """The samples of each step of the pass, in the order of its batches' rows.

    Raises:
        UserError: as ``TrainPass.layout``, at the call.
        DataError: the index is damaged (iterating).
    """
    work.layout(1)
    return _train_entries(work)


def eval_entries(work: EvalPass) -> Iterator[Entries]:
    """The samples of each batch of the pass, without its padding. Raises: DataError, the index is damaged (iterating)."""
    plan = work.plan()
    firsts = _firsts(work.dataset, work.split)
    with contextlib.closing(Reader(work.dataset, work.split)) as reader:
        for number in plan.batches_of(work.rank, work.world_size):
            yield _joined([_listed(reader, firsts, piece) for piece in plan.batch(number)])


def _train_entries(work: TrainPass) -> Iterator[Entries]:
    plan = work.plan()
    draw = work.strata and Draw(work.strata, work.seed, work.epoch)
    firsts = _firsts(work.dataset, work.split)
    with contextlib.closing(Reader(work.dataset, work.split, draw)) as reader:
        lanes = [
            _lane(reader, firsts, plan.windows(lane, work.start_step), plan.lane_batch)
            for lane in plan.lanes_of(work.rank, work.world_size)
        ]
        for _ in range(work.start_step, plan.num_steps):
            yield _joined([next(lane) for lane in lanes])


def _lane(reader: Reader, firsts: list[int], windows: Iterator[Window], size: int) -> Iterator[Entries]:
    """A lane's samples, ``size`` at a time."""
    left: list[Entries] = []
    for pieces, order in windows:
        window = _joined([_listed(reader, firsts, piece) for piece in pieces]).take(order)
        pool = _joined([*left, window])
        whole = len(pool.rows) // size * size
        for start in range(0, whole, size):
            yield pool.take(slice(start, start + size))
        left = [pool.take(slice(whole, None))]


def _listed(reader: Reader, firsts: list[int], piece: Piece) -> Entries:
    rows, chosen = reader.listed(piece)
    keys = np.frombuffer(rows.keys, np.uint8).reshape(-1, 16)
    return Entries(chosen + firsts[piece.shard], rows.labels[chosen], keys[chosen])


def _joined(parts: list[Entries]) -> Entries:
    if len(parts) == 1:
        return parts[0]
    return Entries(
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.keys for part in parts]),
    )


def _firsts(dataset: Dataset, split: str) -> list[int]:
    """The place in the split of each shard's first sample."""
    return [0, *accumulate(shard.samples for shard in dataset.shards(split))]
