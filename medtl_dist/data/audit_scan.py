"""shards ─► fingerprints and scores of pairs: the audit's reading, in worker processes, a shard or a few pairs per task."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from medtl_dist.data.audit_align import Floats
from medtl_dist.data.audit_match import compare, prepare
from medtl_dist.data.audit_search import Pairs
from medtl_dist.data.fingerprint import RECORD, fingerprint
from medtl_dist.data.plan import Piece
from medtl_dist.data.processes import start_worker
from medtl_dist.data.reader import Reader, Sample
from medtl_dist.data.shards import Dataset, read_shard_rows
from medtl_dist.data.transforms import decode
from medtl_dist.errors import DataError, Interrupted

_COLUMNS = ("key", "split", "label", "group")
_READ = 32  # images in memory at once
_PAIRS = 64
_RECENT_IMAGES = 256
_MIN_FOR_PROCESSES = 64

Progress = Callable[[str, int, int], None]
Place = tuple[str, int, int]  # split, position of the shard, row in the shard


@dataclass(frozen=True)
class Scan:
    """What was seen of every image, in the order of the index; ``records`` has dtype ``fingerprint.RECORD``.

    ``keys`` uint8 [n, 16]; ``split`` int8: position in ``dataset.splits``; ``shard``, ``row`` int32: where; ``label``
    int32; ``group`` int32: position in ``groups``.
    """

    dataset: Dataset
    records: NDArray[np.void]
    keys: NDArray[np.uint8]
    split: NDArray[np.int8]
    shard: NDArray[np.int32]
    row: NDArray[np.int32]
    label: NDArray[np.int32]
    group: NDArray[np.int32]
    groups: pa.Array

    def __len__(self) -> int:
        return len(self.records)

    def key(self, image: int) -> str:
        return self.keys[image].tobytes().hex()

    def place(self, image: int) -> Place:
        return (self.dataset.splits[self.split[image]], int(self.shard[image]), int(self.row[image]))


class Readers:
    """The images of one set, in one process: by shard, or one by one with the recent ones kept."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._by_split = {split: Reader(dataset, split) for split in dataset.splits}
        self._recent: OrderedDict[Place, Floats] = OrderedDict()

    def records(self, split: str, shard: int) -> NDArray[np.void]:
        """The fingerprints of a shard. Raises: DataError, a damaged image or shard."""
        total = self.dataset.shards(split)[shard].samples
        records = np.zeros(total, RECORD)
        for start in range(0, total, _READ):
            piece = Piece(shard, start, min(start + _READ, total))
            for offset, sample in enumerate(self._by_split[split].read(piece)):
                records[start + offset] = fingerprint(self._decoded(sample))
        return records

    def score(self, first: Place, second: Place, variant: int, crop: Floats, inner: bool) -> float:
        """How much two images agree. Raises: DataError."""
        return compare(self._prepared(first), self._prepared(second), variant, crop, inner)

    def _prepared(self, place: Place) -> Floats:
        image = self._recent.get(place)
        if image is None:
            split, shard, row = place
            [sample] = self._by_split[split].read(Piece(shard, row, row + 1))
            image = self._recent[place] = prepare(self._decoded(sample))
            if len(self._recent) > _RECENT_IMAGES:
                self._recent.popitem(last=False)
        else:
            self._recent.move_to_end(place)
        return image

    def _decoded(self, sample: Sample) -> NDArray[np.uint8]:
        try:
            return decode(sample.data, self.dataset.channels)
        except DataError as error:
            raise DataError(
                f"{os.path.join(self.dataset.folder, sample.shard)}: image {sample.key.hex()} is damaged: {error}; "
                "copy the set again or pack it again"
            ) from None


_readers: list[Readers] = []  # of this worker process


def _start(dataset: Dataset) -> None:
    start_worker()
    _readers[:] = [Readers(dataset)]


def _run(work: Callable[..., Any], task: Any) -> Any:
    return work(_readers[0], *task)


def _shard_records(readers: Readers, split: str, shard: int) -> NDArray[np.void]:
    return readers.records(split, shard)


def _scores(readers: Readers, pairs: Sequence[tuple[Place, Place, int, Floats, bool]]) -> list[float]:
    return [readers.score(*pair) for pair in pairs]


class Pool:
    """Worker processes over one set (or this process). Use ``open_pool``."""

    def __init__(self, dataset: Dataset, pool: ProcessPoolExecutor | None, num_workers: int) -> None:
        self._readers = Readers(dataset) if pool is None else None
        self._pool = pool
        self._window = 2 * num_workers

    def ordered(self, work: Callable[..., Any], tasks: Iterable[tuple]) -> Generator[Any]:
        """``work(readers, *task)`` of every task, in order, few at a time."""
        if self._pool is None:
            for task in tasks:
                yield work(self._readers, *task)
            return
        waiting: deque[Future] = deque()
        try:
            for task in tasks:
                waiting.append(self._pool.submit(_run, work, task))
                if len(waiting) >= self._window:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise Interrupted(
                "an auditing process died, most likely for want of memory: run the command again with fewer --workers"
            ) from None
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def open_pool(dataset: Dataset, num_workers: int) -> Iterator[Pool]:
    """Start the processes, and end them whatever happens; few images are read in this process."""
    total = sum(shard.samples for split in dataset.splits for shard in dataset.shards(split))
    before = cv2.getNumThreads()
    if num_workers <= 1 or total < _MIN_FOR_PROCESSES:
        cv2.setNumThreads(1)  # the same sums however many cores
        try:
            yield Pool(dataset, None, 1)
        finally:
            cv2.setNumThreads(before)
        return
    # spawn: Arrow has threads in this process, and a fork would copy their locks.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start, initargs=(dataset,))
    try:
        yield Pool(dataset, pool, num_workers)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def scan(dataset: Dataset, pool: Pool, progress: Progress) -> Scan:
    """Fingerprint every image. Raises: DataError, a damaged image, shard or index."""
    tasks = [(split, position) for split in dataset.splits for position in range(len(dataset.shards(split)))]
    total = sum(dataset.shards(split)[position].samples for split, position in tasks)
    records = np.zeros(total, RECORD)
    done = 0
    for part in pool.ordered(_shard_records, tasks):
        records[done : done + len(part)] = part
        done += len(part)
        progress("reading", done, total)
    tables = [read_shard_rows(dataset, dataset.shards(split)[position], _COLUMNS) for split, position in tasks]
    index = pa.concat_tables(tables)
    groups = index.column("group").combine_chunks().dictionary_encode()
    splits = index.column("split").to_pylist()
    number = {split: position for position, split in enumerate(dataset.splits)}
    counts = [table.num_rows for table in tables]
    return Scan(
        dataset=dataset,
        records=records,
        keys=np.frombuffer(b"".join(index.column("key").to_pylist()), np.uint8).reshape(-1, 16),
        split=np.array([number[split] for split in splits], np.int8),
        shard=np.repeat(np.array([position for _, position in tasks], np.int32), counts),
        row=np.concatenate([np.arange(count, dtype=np.int32) for count in counts]),
        label=index.column("label").to_numpy().astype(np.int32),
        group=groups.indices.to_numpy(zero_copy_only=False).astype(np.int32),
        groups=groups.dictionary,
    )


def score_pairs(scan: Scan, pairs: Pairs, pool: Pool, progress: Progress) -> NDArray[np.float64]:
    """The score of every pair, float64 [pairs]. Raises: DataError, a damaged image."""
    tasks = _chunked(scan, pairs)
    scores: list[float] = []
    for part in pool.ordered(_scores, tasks):
        scores += part
        progress("comparing", len(scores), len(pairs.first))
    return np.array(scores, np.float64)


def _chunked(scan: Scan, pairs: Pairs) -> Iterator[tuple[list]]:
    for start in range(0, len(pairs.first), _PAIRS):
        piece = pairs.take(np.arange(start, min(start + _PAIRS, len(pairs.first))))
        place = functools.partial(_place_of, scan)
        columns = (map(place, piece.first), map(place, piece.second), piece.variant.tolist())
        yield (list(zip(*columns, piece.crop, piece.inner.tolist(), strict=True)),)


def _place_of(scan: Scan, image: int) -> Place:
    return scan.place(int(image))
