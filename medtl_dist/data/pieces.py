"""index.parquet + a range of a shard ─► samples, not yet decoded: one read per piece, from a folder or a store.

From a folder with ``pread``, the system reading ahead; from a store through ``data/ranges.py``, threads reading ahead. What
comes from a store is compared with its checksums here, whatever the config says, and asked for again once. A piece of an
epoch with weighted sampling stands for samples here and there in its shard: those far apart are read one by one rather
than with all that lies between.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from medtl_dist.data import label_sets
from medtl_dist.data.ahead import Ahead, Shared
from medtl_dist.data.label_sets import LabelSets
from medtl_dist.data.plan import IntArray, Piece
from medtl_dist.data.ranges import ranges_of
from medtl_dist.data.shards import Dataset, Shard, read_shard_rows
from medtl_dist.data.strata import Strata
from medtl_dist.data.tars import MAX_IMAGE_BYTES
from medtl_dist.data.web import looks_like_html
from medtl_dist.errors import DataError

COLUMNS = ("key", "sha256", "label", "offset", "size")
RECENT_ROWS = 2**18  # of the index, at 72 bytes each
GAP_BYTES = 512 * 2**10  # between two samples of a weighted piece: what costs about as much as another request
DIFFERS = "its bytes differ from the checksum in the index"


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample as read, not yet checked or decoded. ``label``: of a label set a value per class, -1 unknown."""

    data: memoryview
    key: bytes
    sha256: bytes
    label: int | list[int]
    shard: str


@dataclass(frozen=True, slots=True)
class Rows:
    """The index of one shard: ``keys`` 16 and ``digests`` 32 bytes a row end to end, the others int64 [rows] (``labels`` of
    label sets int8 [rows, classes], see ``label_sets``); ``places``: with weighted sampling the row that each virtual row
    stands for."""

    keys: bytes
    digests: bytes
    labels: IntArray | LabelSets
    offsets: IntArray
    sizes: IntArray
    places: IntArray | None = None

    def chosen(self, piece: Piece) -> IntArray:
        """The rows of a piece, rising."""
        if self.places is None:
            return np.arange(piece.start, piece.stop)
        return self.places[piece.start : piece.stop]

    def extents(self, chosen: IntArray) -> list[tuple[IntArray, int, int]]:
        """What to read for these rows: the rows, the first byte and the end of each read."""
        starts, ends = self.offsets[chosen], self.offsets[chosen] + self.sizes[chosen]
        cuts = [0, len(chosen)]
        if self.places is not None:
            cuts[1:1] = (np.flatnonzero(starts[1:] - ends[:-1] > GAP_BYTES) + 1).tolist()
        return [(chosen[low:high], int(starts[low]), int(ends[high - 1])) for low, high in pairwise(cuts) if high > low]


@dataclass(frozen=True)
class Draw:
    """Weighted sampling of one epoch."""

    strata: Strata
    seed: int
    epoch: int


class Reader:
    """Reads pieces of one split. Keeps the index rows of recent shards, at most 18 MiB of them (or one shard's).

    Of a set in a store it reads announced pieces ahead, in threads that end with ``close``.
    """

    def __init__(self, dataset: Dataset, split: str, draw: Draw | None = None) -> None:
        self._draw = draw
        self.folder = dataset.folder
        self.dataset = dataset
        self.shards: tuple[Shard, ...] = dataset.shards(split)
        self._recent: Shared[int, Rows] = Shared(RECENT_ROWS)
        self._ahead: Ahead[Piece, list[Sample]] | None = Ahead(self._load) if dataset.remote else None

    def close(self) -> None:
        """Ends the reading ahead."""
        if self._ahead is not None:
            self._ahead.close()

    def read(self, piece: Piece) -> list[Sample]:
        """The samples of a piece, by one read of the bytes from its first to its last (unless sampling is weighted).

        Raises:
            DataError: the shard is missing or shorter than its index says, or the index is damaged; from a store also
                an image that differs from its checksum.
            Interrupted: a store can't be reached.
        """
        return self._load(piece) if self._ahead is None else self._ahead.take(piece)

    def listed(self, piece: Piece) -> tuple[Rows, IntArray]:
        """What the index alone says of a piece: its shard's rows, and which of them are its samples. Raises: DataError."""
        rows = self._rows(piece.shard)
        return rows, rows.chosen(piece)

    def read_ahead(self, piece: Piece) -> None:
        """Announces a piece that will be read: the system, or a thread, fetches it in the background."""
        shard = self.shards[piece.shard]
        if self._ahead is not None:
            self._ahead.announce(piece, len(piece) * shard.bytes // max(shard.samples, 1))
            return
        if not hasattr(os, "posix_fadvise"):
            return
        rows = self._rows(piece.shard)
        # What is wrong with the file, the read itself will say.
        with contextlib.suppress(OSError):
            handle = os.open(self._path(shard), os.O_RDONLY | os.O_CLOEXEC)
            try:
                for _, start, stop in rows.extents(rows.chosen(piece)):
                    os.posix_fadvise(handle, start, stop - start, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(handle)

    def _load(self, piece: Piece) -> list[Sample]:
        shard, rows = self.shards[piece.shard], self._rows(piece.shard)
        extents = rows.extents(rows.chosen(piece))
        return [sample for extent in extents for sample in self._load_extent(shard, rows, *extent)]

    def _load_extent(self, shard: Shard, rows: Rows, chosen: IntArray, start: int, stop: int) -> list[Sample]:
        if not self.dataset.remote:
            return _cut(shard, rows, chosen, memoryview(self._range(shard, start, stop)))
        ranges = ranges_of(self.folder, self.dataset.storage, self.dataset.sha256)
        data = memoryview(b"")
        wrong: Sample | None = None
        for fresh in (False, True):  # what was damaged on the way, or in the cache, comes whole the second time
            data = memoryview(ranges.read(shard.name, start, stop, shard.bytes, fresh=fresh))
            samples = _cut(shard, rows, chosen, data)
            wrong = next((sample for sample in samples if not is_whole(sample)), None)
            if wrong is None:
                return samples
        assert wrong is not None
        if looks_like_html(data):
            raise DataError(f"{self._path(shard)}: an HTML page came instead; a login page or a proxy in between?")
        raise damaged(self.dataset, wrong, DataError(DIFFERS))

    def _path(self, shard: Shard) -> str:
        return os.path.join(self.folder, shard.name)

    def _rows(self, position: int) -> Rows:
        shard = self.shards[position]

        def read() -> Rows:
            draw = self._draw
            table = read_shard_rows(self.dataset, shard, _columns(draw))
            rows = _parse_rows(table)
            self._check(shard, rows)
            if draw is None:
                return rows
            strata = draw.strata.of_rows(table.column(draw.strata.column))
            try:
                places = draw.strata.weighting.virtual_rows(position, strata, draw.seed, draw.epoch)
            except DataError as error:
                raise DataError(f"the index of {self._path(shard)}: {error}; copy the set or pack it again") from None
            return dataclasses.replace(rows, places=places)

        return self._recent.get(position, read, shard.samples)

    def _check(self, shard: Shard, rows: Rows) -> None:
        """The members must follow one another within the shard: one read must get what it expects, and no more."""
        if rows.offsets.max(initial=0) > shard.bytes or (rows.sizes > shard.bytes - rows.offsets).any():
            raise DataError(f"the index of {self._path(shard)} points beyond its end: copy the set or pack it again")
        ends = rows.offsets + rows.sizes  # within the shard, so that nothing overflows
        unread = (rows.sizes < 1).any() or (rows.sizes > MAX_IMAGE_BYTES).any() or (rows.offsets < 0).any()
        if unread or (rows.offsets[1:] < ends[:-1]).any():
            raise DataError(f"the index of {self._path(shard)} is damaged: copy the set again or pack it again")
        if not _are_labels(rows.labels, len(self.dataset.classes)):
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


def _are_labels(labels: IntArray | LabelSets, num_classes: int) -> bool:
    # Lists or not: the index's column type has been compared with the set's task.
    if labels.ndim == 2:
        return label_sets.are_valid(labels.astype(np.int8, copy=False), num_classes)
    return not ((labels < 0).any() or (labels >= num_classes).any())


def _cut(shard: Shard, rows: Rows, chosen: IntArray, data: memoryview) -> list[Sample]:
    """These rows' samples in the bytes from the first one's to the last one's."""
    begins = (rows.offsets[chosen] - rows.offsets[chosen[0]]).tolist()
    fields = zip(chosen.tolist(), begins, rows.sizes[chosen].tolist(), rows.labels[chosen].tolist(), strict=True)
    return [
        Sample(
            data[begin : begin + size],
            rows.keys[16 * row : 16 * row + 16],
            rows.digests[32 * row : 32 * row + 32],
            label,
            shard.name,
        )
        for row, begin, size, label in fields
    ]


def _columns(draw: Draw | None) -> list[str]:
    extra = draw.strata.column if draw is not None else "label"
    return [*COLUMNS, *([] if extra in COLUMNS else [extra])]


def is_whole(sample: Sample) -> bool:
    return hashlib.sha256(sample.data).digest() == sample.sha256


def damaged(dataset: Dataset, sample: Sample, error: DataError) -> DataError:
    return DataError(
        f"{os.path.join(dataset.folder, sample.shard)}: image {sample.key.hex()} is damaged: {error}; "
        "copy the set again or pack it again"
    )


def _parse_rows(table: pa.Table) -> Rows:
    """Arrow's columns as flat buffers, from which a row is cut in a microsecond.

    Raises: DataError, nulls or another width where the format has none.
    """
    columns = [table.column(name).combine_chunks() for name in COLUMNS]
    key, sha256, label, offset, size = columns
    if any(column.null_count for column in columns):
        raise DataError("the index is damaged (empty fields): copy the set again or pack it again")
    # Not to_numpy(): it imports pandas, half a second and 40 MiB in every loader process.
    labels = label_sets.column_to_sets(label) if pa.types.is_list(label.type) else np.from_dlpack(label)
    keys, digests = (b"".join(column.to_pylist()) for column in (key, sha256))
    return Rows(keys, digests, labels, np.from_dlpack(offset), np.from_dlpack(size))


def _pread(handle: int, offset: int, length: int) -> bytes:
    """``length`` bytes at ``offset``, fewer at the end of the file; a single pread may return less than asked."""
    data = os.pread(handle, length, offset)
    while len(data) < length:
        more = os.pread(handle, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data
