"""shards/*.tar + index.parquet ─► parts of batches: reads, checks, decodes and augments; no torch in here.

One range read per piece (a run, or what a lane boundary leaves of it), two pieces per lane in memory (of a set in a store
up to 64 MiB more, read ahead), a checksum per sample. Runs in the main process or in a loader process alike; what it
returns depends only on the pass it is given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, zip_longest

import numpy as np
import numpy.typing as npt

from medtl_dist.data.pieces import DIFFERS, Draw, Reader, Sample, damaged, is_whole
from medtl_dist.data.plan import EpochPlan, EvalPlan, Piece, eval_plan, train_plan
from medtl_dist.data.shards import Dataset
from medtl_dist.data.strata import Strata
from medtl_dist.data.transforms import MAX_PIXELS, EvalTransform, Image, TrainTransform, augment_draws, decode, view_of
from medtl_dist.errors import DataError

Window = tuple[list[Piece], npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Layout:
    """Who makes which rows of a rank's batches: each worker its ``slices`` of every batch (``together``), or whole
    batches in turn."""

    num_batches: int
    num_rows: int
    slices: tuple[slice, ...]
    together: bool

    def makers(self, batch: int) -> range:
        """The workers that make this batch, in the order of their rows."""
        num_workers = len(self.slices)
        return range(num_workers) if self.together else range(batch % num_workers, batch % num_workers + 1)


@dataclass(frozen=True)
class TrainPass:
    """One rank's share of one training epoch from ``start_step`` on. Picklable: loader processes get it whole."""

    dataset: Dataset
    split: str
    transform: TrainTransform
    global_batch_size: int
    seed: int
    epoch: int
    rank: int
    world_size: int
    start_step: int
    max_lanes: int
    run_length: int
    verify: bool
    max_pixels: int = MAX_PIXELS
    strata: Strata | None = None  # of weighted sampling
    views: int | None = None  # different views of an image; None: a fresh one each epoch

    def plan(self) -> EpochPlan:
        """The epoch's order, from the shards' counts. Raises: UserError, see ``train_plan``."""
        return train_plan(
            [shard.samples for shard in self.dataset.shards(self.split)],
            global_batch_size=self.global_batch_size,
            seed=self.seed,
            epoch=self.epoch,
            max_lanes=self.max_lanes,
            run_length=self.run_length,
            weighting=self.strata and self.strata.weighting,
        )

    def layout(self, max_workers: int) -> Layout:
        """Every worker makes its lanes' rows of every batch. Raises: UserError, more ranks than lanes."""
        plan = self.plan()
        if not 0 <= self.start_step <= plan.num_steps:
            raise ValueError(f"start_step {self.start_step} of {plan.num_steps}")
        lanes = plan.lanes_of(self.rank, self.world_size)
        shares = _shares(lanes, min(max_workers, len(lanes)))
        size = plan.lane_batch
        slices = tuple(slice((share.start - lanes.start) * size, (share.stop - lanes.start) * size) for share in shares)
        return Layout(plan.num_steps - self.start_step, len(lanes) * size, slices, together=True)

    def parts(self, worker: int, num_workers: int) -> Iterator[list[Sample]]:
        """The worker's samples, step by step, its lanes joined in order."""
        plan = self.plan()
        share = _shares(plan.lanes_of(self.rank, self.world_size), num_workers)[worker]
        draw = self.strata and Draw(self.strata, self.seed, self.epoch)
        with contextlib.closing(Reader(self.dataset, self.split, draw)) as reader:
            windows = [plan.windows(lane, self.start_step) for lane in share]
            firsts = [_announced(reader, lane) for lane in windows]
            lanes = [_samples(reader, first, lane) for first, lane in zip(firsts, windows, strict=True)]
            for _ in range(self.start_step, plan.num_steps):
                yield [next(lane) for lane in lanes for _ in range(plan.lane_batch)]

    def view(self, image: Image, key: bytes) -> Image:
        """What the model sees of a sample in this epoch."""
        number = self.epoch if self.views is None else view_of(key, self.epoch, self.views)
        return self.transform(image, augment_draws(self.seed, number, key, self.transform.num_draws))


@dataclass(frozen=True)
class EvalPass:
    """One rank's share of the batches of a split. Picklable: loader processes get it whole."""

    dataset: Dataset
    split: str
    transform: EvalTransform
    batch_size: int
    rank: int
    world_size: int
    verify: bool
    max_pixels: int = MAX_PIXELS

    def plan(self) -> EvalPlan:
        """The split's batches, from the shards' counts."""
        return eval_plan([shard.samples for shard in self.dataset.shards(self.split)], self.batch_size)

    def layout(self, max_workers: int) -> Layout:
        """Whole batches in turn, so that each is one read."""
        num_batches = len(self.plan().batches_of(self.rank, self.world_size))
        slices = (slice(0, self.batch_size),) * max(1, min(max_workers, num_batches))
        return Layout(num_batches, self.batch_size, slices, together=False)

    def parts(self, worker: int, num_workers: int) -> Iterator[list[Sample]]:
        """The worker's batches: each ``num_workers``-th of the rank's."""
        plan = self.plan()
        numbers = plan.batches_of(self.rank, self.world_size)[worker::num_workers]
        yield from _whole_batches(self.dataset, self.split, plan, numbers)

    def view(self, image: Image, key: bytes) -> Image:
        """What the model sees of a sample, every time."""
        del key
        return self.transform(image)


@dataclass(frozen=True)
class RowsPass:
    """Samples ``[start, stop)`` of a split in index order, in batches of one shape, as one epoch of training (given
    ``shown``) or evaluation shows them. Picklable: loader processes get it whole."""

    dataset: Dataset
    split: str
    transform: TrainTransform | EvalTransform
    batch_size: int  # divides ``start``
    start: int
    stop: int
    verify: bool
    shown: tuple[int, int, int] | None = None  # seed, epoch and number of views
    max_pixels: int = MAX_PIXELS

    def layout(self, max_workers: int) -> Layout:
        """Whole batches in turn, so that each is one read."""
        num_batches = len(self._numbers())
        slices = (slice(0, self.batch_size),) * max(1, min(max_workers, num_batches))
        return Layout(num_batches, self.batch_size, slices, together=False)

    def parts(self, worker: int, num_workers: int) -> Iterator[list[Sample]]:
        """The worker's batches: each ``num_workers``-th."""
        counts = [shard.samples for shard in self.dataset.shards(self.split)]
        numbers = self._numbers()[worker::num_workers]
        yield from _whole_batches(self.dataset, self.split, eval_plan(counts, self.batch_size), numbers)

    def view(self, image: Image, key: bytes) -> Image:
        """What the model sees of a sample."""
        if isinstance(self.transform, EvalTransform):
            return self.transform(image)
        assert self.shown is not None
        seed, epoch, views = self.shown
        return self.transform(image, augment_draws(seed, view_of(key, epoch, views), key, self.transform.num_draws))

    def _numbers(self) -> range:
        return range(self.start // self.batch_size, -(-self.stop // self.batch_size))


Pass = TrainPass | EvalPass | RowsPass


def fill(rows: npt.NDArray[np.uint8], samples: list[Sample], work: Pass) -> None:
    """Decodes and transforms the samples into the first ``rows`` (uint8 [≥ n, C, S, S]); the rows beyond become 0.

    Raises: DataError naming shard and key, a sample that differs from its checksum or can't be decoded.
    """
    channels = rows.shape[1]
    for row, sample in zip(rows, samples, strict=False):
        try:
            # Samples from a store have been compared where they were read.
            if work.verify and not work.dataset.remote and not is_whole(sample):
                raise DataError(DIFFERS)
            image = decode(sample.data, channels, work.max_pixels)
        except DataError as error:
            raise damaged(work.dataset, sample, error) from None
        row[:] = work.view(image, sample.key)
    rows[len(samples) :] = 0


def _whole_batches(dataset: Dataset, split: str, plan: EvalPlan, numbers: range) -> Iterator[list[Sample]]:
    """The samples of these batches, the following one announced."""
    with contextlib.closing(Reader(dataset, split)) as reader:
        for number, following in zip_longest(numbers, numbers[1:]):
            for piece in () if following is None else plan.batch(following):
                reader.read_ahead(piece)
            yield [sample for piece in plan.batch(number) for sample in reader.read(piece)]


def _announced(reader: Reader, windows: Iterator[Window]) -> Window | None:
    """The lane's next window, its pieces being fetched."""
    window = next(windows, None)
    for piece in window[0] if window else ():
        reader.read_ahead(piece)
    return window


def _samples(reader: Reader, following: Window | None, windows: Iterator[Window]) -> Iterator[Sample]:
    """The lane's samples in order: one window in memory, the next one announced."""
    while following is not None:
        pieces, order = following
        samples = [sample for piece in pieces for sample in reader.read(piece)]
        following = _announced(reader, windows)
        for place in order.tolist():
            yield samples[place]
        del samples  # before the next window is read, not after


def _shares(lanes: range, num_workers: int) -> list[range]:
    """Contiguous shares of the lanes, one per worker, their numbers differing by at most one."""
    edges = [number * len(lanes) // num_workers for number in range(num_workers + 1)]
    return [lanes[low:high] for low, high in pairwise(edges)]
