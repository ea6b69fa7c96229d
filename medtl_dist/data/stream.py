"""shards ─► batches: uint8 tensors in the order of the plan, for one rank; normalising them is the device's work.

``train_batches`` and ``eval_batches`` are the whole interface; a ``Loader`` made once per run keeps its processes over
passes. Time spent waiting for data is the time of ``next()``, the caller's to measure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from medtl_dist.data.entries import Entries, eval_entries, train_entries
from medtl_dist.data.loader import Images, Loader
from medtl_dist.data.plan import MAX_LANES, IntArray, lanes_for, run_length_for
from medtl_dist.data.reader import EvalPass, Pass, RowsPass, TrainPass
from medtl_dist.data.shards import Dataset
from medtl_dist.data.strata import Strata
from medtl_dist.data.transforms import EvalTransform, TrainTransform
from medtl_dist.data.worker import Part
from medtl_dist.errors import UserError

# Given places in a split (int64 [n], index order) and a number of rows ≥ n: what came out of the frozen layers for these
# images, and zeros.
Kept = Callable[[IntArray, int], torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """``images``: uint8 [rows, C, S, S], C = 1 (grey) or 3 (RGB); ``labels``: int64 [num_real], or label sets
    [num_real, classes] of 1, 0 and -1 for unknown; ``keys``: hex [num_real]. In training rows is the rank's share of the
    global batch; in evaluation it is the batch size, and the rows from ``num_real`` on are zeros to drop.

    ``at_boundary``: the images have been through the network's frozen layers, and ``images`` is what came out of them."""

    images: torch.Tensor
    labels: torch.Tensor
    keys: list[str]
    at_boundary: bool = False

    @property
    def num_real(self) -> int:
        """Samples in the batch, padding not counted."""
        return len(self.keys)


def train_batches(
    dataset: Dataset,
    split: str = "train",
    *,
    transform: TrainTransform,
    global_batch_size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    max_lanes: int = MAX_LANES,
    loader: Loader | None = None,
    verify: bool = True,
    pin_memory: bool = False,
    strata: Strata | None = None,
    views: int | None = None,
    kept: Kept | None = None,
) -> Iterator[Batch]:
    """One rank's batches of one epoch, from ``start_step`` on; see ``data/plan.py`` for what they hold.

    Step s is the same at every world size, loader workers or none. ``verify`` compares every image with its sha256.
    ``strata``: weighted sampling (``strata_of``). ``views``: different views of an image, shown in turn; None: a fresh one
    each epoch. ``kept``: take from there what came out of the frozen layers, and read no image. Without a ``loader`` a thread
    of this process decodes.

    Raises (at the call, or where said while iterating):
        UserError: fewer samples than a global batch, more ranks than lanes, no such split.
        DataError: a shard or image is missing or damaged (iterating).
        Interrupted: a loader process was killed (iterating).
    """
    work = TrainPass(
        dataset,
        split,
        transform,
        global_batch_size=global_batch_size,
        seed=seed,
        epoch=epoch,
        rank=rank,
        world_size=world_size,
        start_step=start_step,
        max_lanes=max_lanes,
        run_length=run_length_of(dataset, split, global_batch_size, max_lanes, strata),
        verify=verify,
        strata=strata,
        views=views,
    )
    if kept is not None:
        return (_kept_batch(kept, entries, len(entries.rows)) for entries in train_entries(work))
    return _batches(work, loader, pin_memory)


def eval_batches(
    dataset: Dataset,
    split: str,
    *,
    transform: EvalTransform,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    loader: Loader | None = None,
    verify: bool = True,
    pin_memory: bool = False,
    kept: Kept | None = None,
) -> Iterator[Batch]:
    """One rank's share of the split, every sample once over all ranks, in batches of one fixed shape.

    The batches are the same at every world size, so a score does not depend on it. A rank may have none. ``kept``: as of
    ``train_batches``.

    Raises (at the call, or where said while iterating):
        UserError: an empty split, no such split, a batch size below 1.
        DataError: a shard or image is missing or damaged (iterating).
        Interrupted: a loader process was killed (iterating).
    """
    if not any(shard.samples for shard in dataset.shards(split)):
        raise UserError(f"split {split!r} of {dataset.folder} is empty: nothing to evaluate; pack a set that fills it")
    work = EvalPass(dataset, split, transform, batch_size, rank, world_size, verify)
    if kept is not None:
        return (_kept_batch(kept, entries, batch_size) for entries in eval_entries(work))
    return _batches(work, loader, pin_memory)


def rows_batches(
    dataset: Dataset,
    split: str,
    *,
    transform: TrainTransform | EvalTransform,
    batch_size: int,
    start: int,
    stop: int,
    shown: tuple[int, int, int] | None = None,
    loader: Loader | None = None,
    verify: bool = True,
) -> Iterator[Batch]:
    """Samples ``[start, stop)`` of the split in index order, as evaluation shows them, or, given ``shown`` (seed, epoch and
    number of views), as training shows them in that epoch; ``start`` is a multiple of the batch size.

    Raises (iterating): as ``eval_batches``.
    """
    work = RowsPass(dataset, split, transform, batch_size, start, stop, verify, shown)
    return _batches(work, loader, pin_memory=False)


def run_length_of(
    dataset: Dataset, split: str, global_batch_size: int, max_lanes: int = MAX_LANES, strata: Strata | None = None
) -> int:
    """Samples per run for this set and global batch (see ``run_length_for``); recorded nowhere, since it follows."""
    shards = dataset.shards(split)
    num_samples = sum(shard.samples for shard in shards)
    mean_bytes = sum(shard.bytes for shard in shards) / max(num_samples, 1)
    num_used = num_samples if strata is None else int(strata.weighting.totals.sum())
    return run_length_for(num_used, mean_bytes, lanes_for(global_batch_size, max_lanes))


def _batches(work: Pass, loader: Loader | None, pin_memory: bool) -> Iterator[Batch]:
    made = (loader or Loader()).run(work)  # outside the generator: a user's mistake is told at the call
    return (_batch(images, parts, pin_memory) for images, parts in made)


def _batch(images: Images, parts: list[Part], pin_memory: bool) -> Batch:
    """Joins the parts and copies the pixels out of the loader's slot."""
    tensor = torch.empty(images.shape, dtype=torch.uint8, pin_memory=pin_memory)
    np.copyto(tensor.numpy(), images)
    labels = [label for part in parts for label in part.labels]
    return Batch(
        tensor,
        torch.tensor(labels, dtype=torch.int64),
        [key for part in parts for key in part.keys],
    )


def _kept_batch(kept: Kept, entries: Entries, num_rows: int) -> Batch:
    labels = torch.from_numpy(entries.labels.astype(np.int64))
    return Batch(kept(entries.rows, num_rows), labels, entries.hex_keys(), at_boundary=True)
