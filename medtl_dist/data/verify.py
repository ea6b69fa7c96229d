"""a shard set ─► everything that is wrong with it: ``medtl data verify`` as a library.

Shard by shard, in processes: the tar against its length, its checksum and its index rows; every sample's members,
checksum, pixels and JSON. Then the whole: keys, groups against splits, counts, and what lies in the folder besides.
Memory does not grow with the set but for the keys and groups that are compared at a time (at most about 0.4 GiB).
A set in a store is streamed, each tar once, past any cache.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medtl_dist.data.index_check import compare_identities, index_faults
from medtl_dist.data.processes import in_order, num_cores
from medtl_dist.data.ranges import ranges_of
from medtl_dist.data.shard_check import Fault, ShardResult, check_shard, fields_of
from medtl_dist.data.shards import DATASET_FILE, INDEX_FILE, SHARD_NAME, Dataset, open_dataset
from medtl_dist.errors import DataError, UserError
from medtl_dist.storage import StorageOptions

Progress = Callable[[int, int], None]

_SHOWN = 10


@dataclass(frozen=True)
class Report:
    """What ``verify`` found. ``faults``: all of them, in the order shards, index, counts, folder; ``notes``: what could not
    be looked at."""

    dataset: Dataset
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

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
            "notes": self.notes,
        }

    def lines(self) -> list[str]:
        """For people: the first faults of each kind, and one line that sums up."""
        what = f"{self.dataset.folder}: {self.num_samples:,} images in {self.num_shards:,} shards"
        lines = [f"note: {note}" for note in self.notes]
        if not self.faults:
            return [*lines, f"{what}: no fault found"]
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


def verify(
    folder: str | Path,
    num_workers: int | None = None,
    progress: Progress | None = None,
    storage: StorageOptions | None = None,
) -> Report:
    """Check a whole set, in a folder or a store; ``progress(done, total)`` counts samples.

    Raises:
        UserError: no set there; fewer than one worker; a store that refuses access.
        DataError: a damaged ``dataset.json``, without which nothing else can be checked.
        Interrupted: a worker process was killed; a store can't be reached.
    """
    if num_workers is not None and num_workers < 1:
        raise UserError(f"--workers {num_workers}: at least 1 expected")
    # Not through the cache: it is the store that is checked.
    storage = dataclasses.replace(storage or StorageOptions(), cache_dir=None)
    dataset = open_dataset(folder, storage, check_files=False)
    fields_of(dataset)
    report = Report(dataset)
    tally = _Tally(dataset)
    shards = [shard for split in dataset.splits for shard in dataset.shards(split)]
    few = {name: value for name, value in dataset.info.items() if name not in ("splits", "excluded", "notes")}
    small = dataclasses.replace(dataset, info=few | {"splits": {}})
    done, total = 0, report.num_samples
    for result in in_order(check_shard, shards, num_workers or num_cores(), small):
        report.faults.extend(result.faults)
        tally.add(result)
        done += result.shard.samples
        if progress:
            progress(done, total)
    report.faults.extend(index_faults(dataset))
    groups = None
    if tally.whole:
        try:
            groups = compare_identities(dataset, report.faults)
        except DataError as error:
            report.faults.append(Fault("index", INDEX_FILE, str(error)))
    try:
        report.faults.extend(tally.faults(groups))
    except (KeyError, TypeError, AttributeError):
        report.faults.append(Fault("counts", DATASET_FILE, "its counts are not of the format's shape"))
    _look_around(report)
    return report


class _Tally:
    """The counts of the index, shard by shard, against those in ``dataset.json``. Small, however many shards."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._listed = {
            shard["name"]: shard for split in dataset.splits for shard in dataset.info["splits"][split]["shards"]
        }
        self._counts = {split: (Counter[str](), Counter[str]()) for split in dataset.splits}
        self._unread: set[str] = set()
        self._faults: list[Fault] = []

    @property
    def whole(self) -> bool:
        """Whether the index rows of every shard could be read."""
        return not self._unread

    def add(self, result: ShardResult) -> None:
        """Take in one shard."""
        shard = result.shard
        if result.classes is None or result.domains is None:
            self._unread.add(shard.split)
            return
        found = (result.classes, result.domains)
        for name, counts, total in zip(("classes", "domains"), found, self._counts[shard.split], strict=True):
            total.update(counts)
            told = self._listed[shard.name].get(name)
            if told is not None and _nonzero(told) != counts:
                self._faults.append(Fault("counts", DATASET_FILE, f"{name} of {shard.name} differ from the index"))

    def faults(self, groups: dict[str, int] | None) -> Iterator[Fault]:
        """What differs, for whatever could be read. Raises: KeyError, TypeError, AttributeError, odd ``dataset.json``."""
        yield from self._faults
        info = self._dataset.info
        for split, (classes, domains) in self._counts.items():
            entry = info["splits"][split]
            if split in self._unread:
                continue
            if _nonzero(entry.get("classes")) != classes:
                yield Fault("counts", DATASET_FILE, f"classes of split {split} differ from the index")
            if _nonzero(entry.get("domains")) != domains:
                yield Fault("counts", DATASET_FILE, f"domains of split {split} differ from the index")
            if groups is not None and entry.get("groups") != groups.get(split, 0):
                yield Fault("counts", DATASET_FILE, f"split {split} has {groups.get(split, 0)} groups by the index")
        found, left_out = info.get("found"), info.get("excluded", [])
        packed = sum(entry["samples"] for entry in info["splits"].values())
        if found is not None and found != packed + sum(entry["samples"] for entry in left_out):
            yield Fault("counts", DATASET_FILE, "found is not the images packed and those left out")


def _nonzero(counts: Any) -> Any:
    return {name: count for name, count in counts.items() if count} if isinstance(counts, dict) else counts


def _look_around(report: Report) -> None:
    """What lies in the folder besides the set. Names that are none of a set's may be a patient's, and are not told."""
    dataset = report.dataset
    names = _names_in(report)
    own = {DATASET_FILE, INDEX_FILE}
    own |= {shard.name for split in dataset.splits for shard in dataset.shards(split)}
    others = 0
    for name in sorted(name for name in names if name not in own):
        if SHARD_NAME.fullmatch(name):
            report.faults.append(Fault("extra", name, f"is a tar that {DATASET_FILE} does not list"))
        else:
            others += 1
    if others and "adopted" not in dataset.info:  # an adopted set lives in a folder that was there before
        report.faults.append(Fault("extra", ".", f"{others} files or folders that are no part of the set"))


def _names_in(report: Report) -> list[str]:
    dataset = report.dataset
    if not dataset.remote:
        return os.listdir(dataset.folder)
    try:
        names = ranges_of(dataset.folder, dataset.storage).names()
    except UserError:  # the right to list is another than the right to read
        report.notes.append("files that are no part of the set were not looked for: the store refuses to list them")
        return []
    if names is None:
        report.notes.append("files that are no part of the set were not looked for: a web server does not list them")
    return names or []
