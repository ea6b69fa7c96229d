"""shards/*.tar + index.parquet ─► parts of batches: reads, checks, decodes and augments; no torch in here.

One range read per piece (a run, or what a lane boundary leaves of it), two pieces per lane in memory, a checksum per
sample. Runs in the main process or in a loader process alike; what it returns depends only on the pass it is given.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from medtl_dist.data.plan import EpochPlan, EvalPlan, Piece, eval_plan, train_plan
from medtl_dist.data.shards import Dataset, Shard, read_shard_rows
from medtl_dist.data.tars import MAX_IMAGE_BYTES
from medtl_dist.data.transforms import MAX_PIXELS, EvalTransform, Image, TrainTransform, augment_draws, decode
from medtl_dist.errors import DataError

COLUMNS = ("key", "sha256", "label", "offset", "size")
RECENT_ROWS = 2**18  # of the index, at 72 bytes each


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample as read, not yet checked or decoded."""

    data: memoryview
    key: bytes
    sha256: bytes
    label: int
    shard: str


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

    def plan(self) -> EpochPlan:
        """The epoch's order, from the shards' counts. Raises: UserError, see ``train_plan``."""
        return train_plan(
            [shard.samples for shard in self.dataset.shards(self.split)],
            global_batch_size=self.global_batch_size,
            seed=self.seed,
            epoch=self.epoch,
            max_lanes=self.max_lanes,
            run_length=self.run_length,
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
        reader = Reader(self.dataset, self.split)
        share = _shares(plan.lanes_of(self.rank, self.world_size), num_workers)[worker]
        lanes = [_lane(reader, plan, lane, self.start_step) for lane in share]
        for _ in range(self.start_step, plan.num_steps):
            yield [next(lane) for lane in lanes for _ in range(plan.lane_batch)]

    def view(self, image: Image, key: bytes) -> Image:
        """What the model sees of a sample in this epoch."""
        return self.transform(image, augment_draws(self.seed, self.epoch, key))


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
        reader = Reader(self.dataset, self.split)
        for number in plan.batches_of(self.rank, self.world_size)[worker::num_workers]:
            yield [sample for piece in plan.batch(number) for sample in reader.read(piece)]

    def view(self, image: Image, key: bytes) -> Image:
        """What the model sees of a sample, every time."""
        del key
        return self.transform(image)


@dataclass(frozen=True, slots=True)
class Rows:
    """The index of one shard: ``keys`` 16 and ``digests`` 32 bytes a row end to end, the others int64 [rows]."""

    keys: bytes
    digests: bytes
    labels: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]


class Reader:
    """Reads pieces of one split. Keeps the index rows of recent shards, at most 18 MiB of them (or one shard's)."""

    def __init__(self, dataset: Dataset, split: str) -> None:
        self.folder = dataset.folder
        self.dataset = dataset
        self.shards: tuple[Shard, ...] = dataset.shards(split)
        self._recent: OrderedDict[int, Rows] = OrderedDict()
        self._num_recent = 0

    def read(self, piece: Piece) -> list[Sample]:
        """The samples of a piece, by one read of the bytes from its first to its last.

        Raises: DataError, the shard is missing or shorter than its index says, or the index is damaged.
        """
        shard, rows = self.shards[piece.shard], self._rows(piece.shard)
        start, stop = _extent(rows, piece)
        data = memoryview(self._range(shard, start, stop))
        begins = (rows.offsets[piece.start : piece.stop] - start).tolist()
        sizes = rows.sizes[piece.start : piece.stop].tolist()
        labels = rows.labels[piece.start : piece.stop].tolist()
        return [
            Sample(
                data[begin : begin + size],
                rows.keys[16 * row : 16 * row + 16],
                rows.digests[32 * row : 32 * row + 32],
                label,
                shard.name,
            )
            for row, begin, size, label in zip(range(piece.start, piece.stop), begins, sizes, labels, strict=True)
        ]

    def read_ahead(self, piece: Piece) -> None:
        """Asks the system to fetch the piece's bytes in the background; only a hint."""
        if not hasattr(os, "posix_fadvise"):
            return
        shard = self.shards[piece.shard]
        start, stop = _extent(self._rows(piece.shard), piece)
        # What is wrong with the file, the read itself will say.
        with contextlib.suppress(OSError):
            handle = os.open(self._path(shard), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(handle, start, stop - start, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(handle)

    def _path(self, shard: Shard) -> str:
        return os.path.join(self.folder, shard.name)

    def _rows(self, position: int) -> Rows:
        rows = self._recent.get(position)
        if rows is not None:
            self._recent.move_to_end(position)
            return rows
        table = read_shard_rows(self.dataset, self.shards[position], COLUMNS)
        rows = _parse_rows(table)
        self._check(self.shards[position], rows)
        self._recent[position] = rows
        self._num_recent += len(rows.labels)
        while self._num_recent > RECENT_ROWS and len(self._recent) > 1:
            self._num_recent -= len(self._recent.popitem(last=False)[1].labels)
        return rows

    def _check(self, shard: Shard, rows: Rows) -> None:
        """The members must follow one another within the shard: one read must get what it expects, and no more."""
        if rows.offsets.max(initial=0) > shard.bytes or (rows.sizes > shard.bytes - rows.offsets).any():
            raise DataError(f"the index of {self._path(shard)} points beyond its end: copy the set or pack it again")
        ends = rows.offsets + rows.sizes  # within the shard, so that nothing overflows
        unread = (rows.sizes < 1).any() or (rows.sizes > MAX_IMAGE_BYTES).any() or (rows.offsets < 0).any()
        if unread or (rows.offsets[1:] < ends[:-1]).any():
            raise DataError(f"the index of {self._path(shard)} is damaged: copy the set again or pack it again")
        if (rows.labels < 0).any() or (rows.labels >= len(self.dataset.classes)).any():
            raise DataError(f"the index of {self._path(shard)} is damaged (labels of no class): pack the set again")

    def _range(self, shard: Shard, start: int, stop: int) -> bytes:
        try:
            handle = os.open(self._path(shard), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(
                f"can't read {self._path(shard)} ({error.strerror}): copy the set again or pack it again"
            ) from None
        try:
            data = _pread(handle, start, stop - start)
            end = os.fstat(handle).st_size
        except OSError as error:
            raise DataError(f"can't read {self._path(shard)} ({error.strerror}): check the disk") from None
        finally:
            os.close(handle)
        if len(data) != stop - start:
            raise DataError(
                f"{self._path(shard)} is damaged: it ends at byte {end}, its index goes to {stop}; "
                "copy the set again or pack it again"
            )
        return data


def fill(rows: npt.NDArray[np.uint8], samples: list[Sample], work: TrainPass | EvalPass) -> None:
    """Decodes and transforms the samples into the first ``rows`` (uint8 [≥ n, C, S, S]); the rows beyond become 0.

    Raises: DataError naming shard and key, a sample that differs from its checksum or can't be decoded.
    """
    channels = rows.shape[1]
    for row, sample in zip(rows, samples, strict=False):
        try:
            if work.verify and hashlib.sha256(sample.data).digest() != sample.sha256:
                raise DataError("its bytes differ from the checksum in the index")
            image = decode(sample.data, channels, work.max_pixels)
        except DataError as error:
            raise DataError(
                f"{os.path.join(work.dataset.folder, sample.shard)}: image {sample.key.hex()} is damaged: {error}; "
                "copy the set again or pack it again"
            ) from None
        row[:] = work.view(image, sample.key)
    rows[len(samples) :] = 0


def _lane(reader: Reader, plan: EpochPlan, lane: int, start_step: int) -> Iterator[Sample]:
    """The lane's samples in order: one window in memory, the next one announced to the system."""
    windows = plan.windows(lane, start_step)
    following = next(windows, None)
    while following is not None:
        pieces, order = following
        samples = [sample for piece in pieces for sample in reader.read(piece)]
        following = next(windows, None)
        for piece in following[0] if following else ():
            reader.read_ahead(piece)
        for place in order.tolist():
            yield samples[place]
        del samples  # before the next window is read, not after


def _extent(rows: Rows, piece: Piece) -> tuple[int, int]:
    """First byte and end of a piece's members."""
    last = piece.stop - 1
    return int(rows.offsets[piece.start]), int(rows.offsets[last] + rows.sizes[last])


def _parse_rows(table: pa.Table) -> Rows:
    """Arrow's columns as flat buffers, from which a row is cut in a microsecond.

    Raises: DataError, nulls or another width where the format has none.
    """
    columns = [table.column(name).combine_chunks() for name in COLUMNS]
    key, sha256, label, offset, size = columns
    if any(column.null_count for column in columns):
        raise DataError("the index is damaged (empty fields): copy the set again or pack it again")
    return Rows(
        b"".join(key.to_pylist()), b"".join(sha256.to_pylist()), label.to_numpy(), offset.to_numpy(), size.to_numpy()
    )


def _shares(lanes: range, num_workers: int) -> list[range]:
    """Contiguous shares of the lanes, one per worker, their numbers differing by at most one."""
    edges = [number * len(lanes) // num_workers for number in range(num_workers + 1)]
    return [lanes[low:high] for low, high in pairwise(edges)]


def _pread(handle: int, offset: int, length: int) -> bytes:
    """``length`` bytes at ``offset``, fewer at the end of the file; a single pread may return less than asked."""
    data = os.pread(handle, length, offset)
    while len(data) < length:
        more = os.pread(handle, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data
