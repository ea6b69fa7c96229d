"""a shard set ─► everything that is wrong with it: ``medtl data verify`` as a library.

Shard by shard, in processes: the tar against its length, its checksum and its index rows; every sample's members,
checksum, pixels and JSON. Then the whole: keys, groups against splits, counts, and what lies in the folder besides.
Memory does not grow with the set but for the keys and groups that are compared at a time (at most about 0.4 GiB).
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medtl_dist.data.processes import in_order, num_cores
from medtl_dist.data.shard_check import HASH, Fault, ShardResult, Task, check_shard, fields_of, open_regular
from medtl_dist.data.shards import (
    DATASET_FILE,
    INDEX_FIELDS,
    INDEX_FILE,
    SHARD_NAME,
    Dataset,
    open_dataset,
    read_shard_rows,
)
from medtl_dist.errors import DataError, UserError

Progress = Callable[[int, int], None]

_AT_ONCE = 2**23  # keys compared in one pass over the index
_SHOWN = 10


@dataclass(frozen=True)
class Report:
    """What ``verify`` found. ``faults``: all of them, in the order shards, index, counts, folder."""

    dataset: Dataset
    faults: list[Fault] = field(default_factory=list)

    @property
    def num_shards(self) -> int:
        return sum(len(self.dataset.shards(split)) for split in self.dataset.splits)

    @property
    def num_samples(self) -> int:
        return sum(entry["samples"] for entry in self.dataset.info["splits"].values())

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "folder": self.dataset.folder,
            "sha256": self.dataset.sha256,
            "samples": self.num_samples,
            "shards": self.num_shards,
            "kinds": dict(sorted(Counter(fault.kind for fault in self.faults).items())),
            "faults": [fault._asdict() for fault in self.faults],
        }

    def lines(self) -> list[str]:
        """For people: the first faults of each kind, and one line that sums up."""
        what = f"{self.dataset.folder}: {self.num_samples:,} images in {self.num_shards:,} shards"
        if not self.faults:
            return [f"{what}: no fault found"]
        lines: list[str] = []
        by_kind: defaultdict[str, list[Fault]] = defaultdict(list)
        for fault in self.faults:
            by_kind[fault.kind].append(fault)
        for kind, faults in by_kind.items():
            lines.append(f"{kind}: {len(faults):,}")
            lines += [f"  {fault}" for fault in faults[:_SHOWN]]
            if len(faults) > _SHOWN:
                lines.append(f"  … and {len(faults) - _SHOWN:,} more (--json lists all)")
        return lines

    def check(self) -> None:
        """Raises: DataError, there are faults."""
        if self.faults:
            kinds = Counter(fault.kind for fault in self.faults)
            told = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
            number = f"{len(self.faults):,} fault{'s' if len(self.faults) > 1 else ''}"
            again = "index its tars again" if "adopted" in self.dataset.info else "pack it again"
            raise DataError(f"{self.dataset.folder} is damaged: {number} ({told}); copy the set again or {again}")


def verify(folder: str | Path, num_workers: int | None = None, progress: Progress | None = None) -> Report:
    """Check a whole set; ``progress(done, total)`` counts samples.

    Raises:
        UserError: no set there, or one in a store; fewer than one worker.
        DataError: a damaged ``dataset.json``, without which nothing else can be checked.
        Interrupted: a worker process was killed.
    """
    if num_workers is not None and num_workers < 1:
        raise UserError(f"--workers {num_workers}: at least 1 expected")
    dataset = open_dataset(folder, check_files=False)
    if dataset.remote:
        raise UserError(
            f"{dataset.folder} lies in a store: verify reads folders; copy the set here and verify the copy"
        )
    fields_of(dataset)
    report = Report(dataset)
    shards = [shard for split in dataset.splits for shard in dataset.shards(split)]
    few = {name: value for name, value in dataset.info.items() if name not in ("splits", "excluded", "notes")}
    small = dataclasses.replace(dataset, info=few | {"splits": {}})
    tasks = [Task(small, shard) for shard in shards]
    results: list[ShardResult] = []
    done, total = 0, report.num_samples
    for result in in_order(check_shard, tasks, num_workers or num_cores()):
        results.append(result)
        report.faults.extend(result.faults)
        done += result.shard.samples
        if progress:
            progress(done, total)
    report.faults.extend(_index_faults(dataset))
    groups = None
    if all(result.classes is not None for result in results):
        try:
            groups = _compare_identities(dataset, report.faults)
        except DataError as error:
            report.faults.append(Fault("index", INDEX_FILE, str(error)))
    try:
        report.faults.extend(_count_faults(dataset, results, groups))
    except (KeyError, TypeError, AttributeError):
        report.faults.append(Fault("counts", DATASET_FILE, "its counts are not of the format's shape"))
    report.faults.extend(_folder_faults(dataset))
    return report


def _index_faults(dataset: Dataset) -> Iterator[Fault]:
    expected = dataset.info["index"]
    path = os.path.join(dataset.folder, INDEX_FILE)
    try:
        file, length = open_regular(path)
        with file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if length != expected["bytes"]:
            yield Fault("length", INDEX_FILE, f"is {length} bytes long, {expected['bytes']} in {DATASET_FILE}")
        if digest != expected["sha256"]:
            yield Fault("checksum", INDEX_FILE, f"its sha256 differs from {DATASET_FILE}'s")
        metadata = pq.read_metadata(path)
    except FileNotFoundError:
        yield Fault("missing", INDEX_FILE, "is missing")
        return
    except (OSError, pa.ArrowException, DataError) as error:
        yield Fault("index", INDEX_FILE, f"cannot be read ({type(error).__name__})")
        return
    shards = [shard for split in sorted(dataset.splits) for shard in dataset.shards(split)]
    if metadata.num_row_groups != len(shards):
        yield Fault("index", INDEX_FILE, f"has {metadata.num_row_groups} row groups for {len(shards)} shards")
    # A list, as of several labels an image, is one column whose path goes on.
    names = [metadata.schema.column(number).path.partition(".")[0] for number in range(metadata.num_columns)]
    if names[: len(INDEX_FIELDS)] != [field.name for field in INDEX_FIELDS]:
        yield Fault("index", INDEX_FILE, "has other columns than the format's")


def _compare_identities(dataset: Dataset, faults: list[Fault]) -> dict[str, int]:
    """Keys that occur twice and groups in more than one split, as faults; returns the number of groups per split.

    In as many passes over two columns of the index as keep memory bounded: each takes its share of the hashes.
    """
    num_groups: Counter[str] = Counter()
    total = sum(entry["samples"] for entry in dataset.info["splits"].values())
    passes = max(1, -(-total // _AT_ONCE))
    for share in range(passes):
        keys: list[np.ndarray] = []
        groups: list[np.ndarray] = []
        for number, split in enumerate(dataset.splits):
            for shard in dataset.shards(split):
                table = read_shard_rows(dataset, shard, ["key", "group"])
                keys.append(_share(_hashes(table["key"]), share, passes))
                found = np.unique(_share(_hashes(table["group"].unique()), share, passes), axis=0)
                groups.append(np.column_stack([found, np.full(len(found), number, np.uint64)]))
        faults += [
            Fault("key", INDEX_FILE, "its key occurs more than once", _unhash(row))
            for row in _repeated(_joined(keys, 2))
        ]
        placed = np.unique(_joined(groups, 3), axis=0)
        for number, count in zip(*np.unique(placed[:, 2], return_counts=True), strict=True):
            num_groups[dataset.splits[int(number)]] += int(count)
        leaking = {tuple(row) for row in _repeated(placed[:, :2]).tolist()}
        if leaking:
            faults += _leaks(dataset, leaking)
    return dict(num_groups)


def _hashes(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """uint64 [n, 2]: 16-byte keys as they are, texts hashed to 16 bytes."""
    values = column.drop_null().to_pylist()
    if values and isinstance(values[0], str):
        values = [hashlib.blake2b(value.encode(), digest_size=16).digest() for value in values]
    return np.frombuffer(b"".join(values), ">u8").reshape(-1, 2).astype(np.uint64)


def _share(hashes: np.ndarray, share: int, passes: int) -> np.ndarray:
    return hashes[hashes[:, 1] % np.uint64(passes) == share]


def _joined(parts: list[np.ndarray], width: int) -> np.ndarray:
    return np.concatenate([np.empty((0, width), np.uint64), *parts])


def _repeated(rows: np.ndarray) -> np.ndarray:
    """Each row of ``rows`` (uint64 [n, 2]) that occurs more than once, once."""
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    same = (rows[1:] == rows[:-1]).all(axis=1)
    return np.unique(rows[1:][same], axis=0)


def _unhash(row: np.ndarray) -> str:
    return row.astype(">u8").tobytes().hex()


def _leaks(dataset: Dataset, leaking: set[tuple[int, ...]]) -> Iterator[Fault]:
    """Names the groups, by another pass: most sets never need it."""
    places: defaultdict[str, list[str]] = defaultdict(list)
    for split in dataset.splits:
        for shard in dataset.shards(split):
            names = read_shard_rows(dataset, shard, ["group"])["group"].unique().drop_null()
            for name, row in zip(names.to_pylist(), _hashes(names).tolist(), strict=True):
                if tuple(row) in leaking and split not in places[name]:
                    places[name].append(split)
    for name, splits in places.items():
        told = name if HASH.fullmatch(name) else "(no hash, so not told)"
        yield Fault("group", INDEX_FILE, f"group {told} is in more than one split ({', '.join(splits)})")


def _count_faults(dataset: Dataset, results: list[ShardResult], groups: dict[str, int] | None) -> Iterator[Fault]:
    """Compares the counts in ``dataset.json`` with those of the index, for whatever of it could be read."""
    for split in dataset.splits:
        entry = dataset.info["splits"][split]
        listed = {shard["name"]: shard for shard in entry["shards"]}
        totals: defaultdict[str, Counter[str]] = defaultdict(Counter, classes=Counter(), domains=Counter())
        whole = True
        for result in (result for result in results if result.shard.split == split):
            if result.classes is None or result.domains is None:
                whole = False
                continue
            counted = {"classes": result.classes, "domains": result.domains} | result.others
            for name, found in counted.items():
                totals[name] += found
                told = listed[result.shard.name].get(name)
                if told is not None and _nonzero(told) != found:
                    yield Fault("counts", DATASET_FILE, f"{name} of {result.shard.name} differ from the index")
        if not whole:
            continue
        for name, found in totals.items():
            if _nonzero(entry.get(name)) != found:
                yield Fault("counts", DATASET_FILE, f"{name} of split {split} differ from the index")
        if groups is not None and entry.get("groups") != groups.get(split, 0):
            yield Fault("counts", DATASET_FILE, f"split {split} has {groups.get(split, 0)} groups by the index")
    found, left_out = dataset.info.get("found"), dataset.info.get("excluded", [])
    packed = sum(entry["samples"] for entry in dataset.info["splits"].values())
    if found is not None and found != packed + sum(entry["samples"] for entry in left_out):
        yield Fault("counts", DATASET_FILE, "found is not the images packed and those left out")


def _nonzero(counts: Any) -> Any:
    return {name: count for name, count in counts.items() if count} if isinstance(counts, dict) else counts


def _folder_faults(dataset: Dataset) -> Iterator[Fault]:
    """What lies in the folder besides the set. Names that are none of a set's may be a patient's, and are not told."""
    own = {DATASET_FILE, INDEX_FILE}
    own |= {shard.name for split in dataset.splits for shard in dataset.shards(split)}
    others = 0
    with os.scandir(dataset.folder) as entries:
        for name in sorted(entry.name for entry in entries if entry.name not in own):
            if SHARD_NAME.fullmatch(name):
                yield Fault("extra", name, f"is a tar that {DATASET_FILE} does not list")
            else:
                others += 1
    if others and "adopted" not in dataset.info:  # an adopted set lives in a folder that was there before
        yield Fault("extra", ".", f"{others} files or folders that are no part of the set")
