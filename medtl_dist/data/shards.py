"""shards/*.tar + index.parquet ─► readers: the shard set on disk, opened, checked and read back row by row.

A set is a folder with ``dataset.json`` (written last: without it there is no set), ``index.parquet`` (a row per
sample, a row group per shard) and the tars. ``dataset.json`` alone suffices to plan an epoch; the index is read
one shard at a time, so no reader needs the whole of it in memory.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medtl_dist.errors import DataError, UserError

FORMAT_VERSION = 1
SPLITS = ("train", "val", "test")
DATASET_FILE = "dataset.json"
INDEX_FILE = "index.parquet"
_HASHED_BYTES = 64 * 2**20

# The columns every index has; kept columns of the source follow them.
INDEX_FIELDS = (
    pa.field("key", pa.binary(16)),
    pa.field("sha256", pa.binary(32)),
    pa.field("split", pa.string()),
    pa.field("domain", pa.string()),
    pa.field("label", pa.int64()),
    pa.field("group", pa.string()),
    pa.field("shard", pa.string()),
    pa.field("offset", pa.int64()),
    pa.field("size", pa.int64()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("channels", pa.int32()),
)

# Names in a set are data from elsewhere: only plain file names are ever opened, no path and no URL.
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,250}\.tar")
_REQUIRED = ("format_version", "task", "classes", "positive_class", "preprocessing", "splits", "group_source", "index")


@dataclass(frozen=True)
class Shard:
    """One tar of a set. ``bytes`` is its length, ``sha256`` the hex digest of the whole file, ``row_group`` its
    number among the row groups of ``index.parquet``."""

    name: str
    split: str
    samples: int
    bytes: int
    sha256: str
    row_group: int


@dataclass(frozen=True)
class Dataset:
    """An opened set. ``folder`` is absolute, ``info`` the parsed ``dataset.json`` plus ``name`` (the folder's
    name), ``sha256`` the hex digest of ``dataset.json``, which covers the digests of every shard and the index."""

    folder: str
    info: dict[str, Any]
    sha256: str

    @property
    def name(self) -> str:
        return self.info["name"]

    @property
    def task(self) -> str:
        """``binary | multiclass | multilabel``."""
        return self.info["task"]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label; of a binary set ``classes[1]`` is the positive one."""
        return tuple(self.info["classes"])

    @property
    def positive_class(self) -> str | None:
        return self.info["positive_class"]

    @property
    def color(self) -> str:
        """``grey | rgb``."""
        return self.info["preprocessing"]["color"]

    @property
    def channels(self) -> int:
        """1 for grey, 3 for rgb; every image of the set has this many."""
        return 1 if self.color == "grey" else 3

    @property
    def group_source(self) -> str:
        """``column …``, ``columns … joined`` or ``none`` (every image is its own group)."""
        return self.info["group_source"]

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits this set has, in the order train, val, test."""
        return tuple(split for split in SPLITS if split in self.info["splits"])

    @functools.cached_property
    def _shards(self) -> dict[str, tuple[Shard, ...]]:
        by_split: dict[str, tuple[Shard, ...]] = {}
        row_group = 0
        for split in sorted(self.info["splits"]):  # the index is sorted by split, then shard
            listed = self.info["splits"][split]["shards"]
            by_split[split] = tuple(
                Shard(s["name"], split, s["samples"], s["bytes"], s["sha256"], row_group + position)
                for position, s in enumerate(listed)
            )
            row_group += len(listed)
        return by_split

    def shards(self, split: str) -> tuple[Shard, ...]:
        """The shards of a split in index order. Raises: UserError, the set has no such split."""
        if split not in self._shards:
            raise UserError(f"{self.folder} has no split {split!r}; it has: {', '.join(self.splits)}")
        return self._shards[split]


def open_dataset(folder: str | Path, *, check_files: bool = True) -> Dataset:
    """Open the set in ``folder``; checks the shape of ``dataset.json`` and, unless told otherwise, that every file has
    its recorded length.

    Raises:
        UserError: no such folder, or a folder that is no set, or a set of a newer format.
        DataError: a damaged ``dataset.json``, a shard or the index missing or of another length.
    """
    path = Path(folder).absolute()
    if not path.is_dir():
        raise UserError(
            f"no shard set at {folder}: no such folder; make one with: medtl data pack SOURCE --out {folder}"
        )
    try:
        raw = (path / DATASET_FILE).read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{folder} is not a shard set: it has no {DATASET_FILE}; make one with: medtl data pack SOURCE --out DEST"
        ) from None
    try:
        info = json.loads(raw)
    except (ValueError, RecursionError):
        raise DataError(f"{path / DATASET_FILE} is damaged (not JSON): copy the set again or pack it again") from None
    _check_info(info, path)
    info["name"] = path.name
    dataset = Dataset(str(path), info, hashlib.sha256(raw).hexdigest())
    if check_files:
        _check_files(dataset)
    return dataset


def read_shard_rows(dataset: Dataset, shard: Shard, columns: Sequence[str] | None = None) -> pa.Table:
    """The index rows of one shard, in the order of its samples (all columns, or the named ones).

    Raises: DataError, the index is damaged or does not match ``dataset.json``.
    """
    return _read_row_groups(dataset, [shard], columns)


def read_split(dataset: Dataset, split: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The index rows of a whole split, shard by shard: grows with the split, so name the columns you need.

    Raises: UserError, no such split; DataError, the index is damaged or does not match ``dataset.json``.
    """
    return _read_row_groups(dataset, list(dataset.shards(split)), columns)


def _read_row_groups(dataset: Dataset, shards: list[Shard], columns: Sequence[str] | None) -> pa.Table:
    path = os.path.join(dataset.folder, INDEX_FILE)
    wanted = None if columns is None else list(columns)
    try:
        footer = _footer(path, dataset.info["index"]["sha256"])
        # No threads: many loader processes read at once, each a row group.
        with pq.ParquetFile(path, metadata=footer, page_checksum_verification=True) as file:
            table = file.read_row_groups([shard.row_group for shard in shards], columns=wanted, use_threads=False)
    except (OSError, pa.ArrowException, IndexError, ValueError) as error:
        # Arrow raises IndexError or an OSError for a row group or page that is not there.
        raise DataError(f"{path} is damaged ({type(error).__name__}): copy the set again or pack it again") from None
    if table.num_rows != sum(shard.samples for shard in shards):
        raise DataError(f"{path} does not match {DATASET_FILE}: another number of samples; copy or pack the set again")
    return table


@functools.lru_cache(maxsize=8)
def _footer(path: str, sha256: str) -> pq.FileMetaData:
    """The index's footer, parsed and checked once per process. ``sha256`` also tells two sets at one path apart.

    Pages have checksums, the footer has none, and could be damaged so that it takes a page for another column's: an
    index of ordinary size is compared with its sha256 as a whole (45 ms for 64 MiB), a larger one by ``verify`` only.
    """
    with open(path, "rb") as file:
        small = os.fstat(file.fileno()).st_size <= _HASHED_BYTES
        if small and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise DataError(f"{path} is damaged (its sha256 differs): copy the set again or pack it again")
        file.seek(0)
        footer = pq.read_metadata(file)
    fields = footer.schema.to_arrow_schema()
    for number, expected in enumerate(INDEX_FIELDS):
        field = fields.field(number) if number < len(fields) else None
        # A label of several classes is a list.
        if field is None or field.name != expected.name or (field.type != expected.type and field.name != "label"):
            raise DataError(f"{path} is no index of this format (column {number}): copy or pack the set again")
    return footer


def _check_info(info: Any, path: Path) -> None:
    damaged = f"{path / DATASET_FILE} is damaged"
    if not isinstance(info, dict) or not isinstance(info.get("format_version"), int):
        raise DataError(f"{damaged} (no format_version): copy the set again or pack it again")
    if info["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {info['format_version']}, this medtl reads version {FORMAT_VERSION}: "
            "use the medtl it was packed with, or pack it again"
        )
    missing = [key for key in _REQUIRED if key not in info]
    if missing:
        raise DataError(f"{damaged} (no {', '.join(missing)}): copy the set again or pack it again")
    try:
        _check_shape(info)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{damaged} ({error}): copy the set again or pack it again") from None


def _check_shape(info: dict[str, Any]) -> None:
    if info["preprocessing"]["color"] not in ("grey", "rgb"):
        raise ValueError("colour is neither grey nor rgb")
    if not set(info["splits"]) <= set(SPLITS) or not info["splits"]:
        raise ValueError("splits other than train, val, test")
    classes, index = info["classes"], info["index"]
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("classes are no list of names")
    if not classes or len(set(classes)) < len(classes) or info["positive_class"] not in (None, *classes):
        raise ValueError("no classes, one of them twice, or the positive one unknown")
    if not all(isinstance(info[name], str) for name in ("task", "group_source")):
        raise ValueError("task or group_source is no text")
    if type(index["bytes"]) is not int or not isinstance(index["sha256"], str):
        raise ValueError("the index has no length or checksum")
    _check_shards(info)


def _check_shards(info: dict[str, Any]) -> None:
    names: set[str] = set()
    for split, entry in info["splits"].items():
        for shard in entry["shards"]:
            if not SHARD_NAME.fullmatch(shard["name"]):
                raise ValueError(f"split {split} lists a shard whose name is no plain file name")
            if shard["name"] in names:
                raise ValueError(f"{shard['name']} is listed twice")
            names.add(shard["name"])
            if not all(type(shard[count]) is int and 0 <= shard[count] < 2**53 for count in ("samples", "bytes")):
                raise ValueError(f"{shard['name']} has no counts")
            if not isinstance(shard["sha256"], str):
                raise ValueError(f"{shard['name']} has no checksum")
        if sum(shard["samples"] for shard in entry["shards"]) != entry["samples"]:
            raise ValueError(f"split {split}: shards do not add up to its samples")


def _check_files(dataset: Dataset) -> None:
    expected = [(shard.name, shard.bytes) for split in dataset.splits for shard in dataset.shards(split)]
    expected.append((INDEX_FILE, dataset.info["index"]["bytes"]))
    for name, length in expected:
        try:
            found = os.stat(os.path.join(dataset.folder, name)).st_size
        except FileNotFoundError:
            raise DataError(f"{dataset.folder}: {name} is missing; copy the set again or pack it again") from None
        if found != length:
            damage = f"{dataset.folder}: {name} is damaged: {found} bytes, {length} expected"
            raise DataError(f"{damage}; copy the set again or pack it again")
