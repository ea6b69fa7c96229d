"""shards/*.tar + index.parquet ─► readers: the shard set, opened, checked and read back row by row.

A set is a folder, on this machine or in a store, with ``dataset.json`` (written last: without it there is no set),
``index.parquet`` (a row per sample, a row group per shard) and the tars. ``dataset.json`` alone suffices to plan an
epoch; the index is read one shard at a time, so no reader needs the whole of it in memory.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa

from medtl_dist.data.index import Index, read_row_groups
from medtl_dist.data.index_footer import Spans
from medtl_dist.data.ranges import ranges_of
from medtl_dist.data.web import looks_like_html
from medtl_dist.errors import DataError, UserError
from medtl_dist.storage import Place, StorageOptions, parse_place

FORMAT_VERSION = 1
SPLITS = ("train", "val", "test")
DATASET_FILE = "dataset.json"
INDEX_FILE = "index.parquet"

# The columns every index has; kept columns of the source follow them. Of several labels an image ``label`` is a list of
# int8, null for unknown (``label_sets.LABEL_TYPE``).
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
    """An opened set. ``folder`` is an absolute path or an address, ``info`` the parsed ``dataset.json`` plus ``name`` (the
    folder's name), ``sha256`` the hex digest of ``dataset.json``, which covers the digests of every shard and the index,
    ``storage`` how a store is reached."""

    folder: str
    info: dict[str, Any]
    sha256: str
    storage: StorageOptions = field(default=StorageOptions(), compare=False)

    @functools.cached_property
    def remote(self) -> bool:
        """Whether the set lies in a store, to be read through ``data/ranges.py``."""
        return parse_place(self.folder).remote

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

    @functools.cached_property
    def index_spans(self) -> Spans | None:
        """Where the index's footer and its parts lie; None: not recorded."""
        entry = self.info["index"]
        if "row_groups" not in entry:
            return None
        before_start, before_end, after_start, after_end = entry["footer"]
        return Spans((before_start, before_end), (after_start, after_end), list(pairwise(entry["row_groups"])))

    def shards(self, split: str) -> tuple[Shard, ...]:
        """The shards of a split in index order. Raises: UserError, the set has no such split."""
        if split not in self._shards:
            raise UserError(f"{self.folder} has no split {split!r}; it has: {', '.join(self.splits)}")
        return self._shards[split]


def open_dataset(folder: str | Path, storage: StorageOptions | None = None, *, check_files: bool = True) -> Dataset:
    """Open the set in a folder or at an address; checks the shape of ``dataset.json``.

    Of a local set every file must have its recorded length, unless ``check_files`` says not to look. A store is not
    asked about each of its shards (a request each, of 10^5): there a missing or shortened one is told when it is read.

    Raises:
        UserError: no such folder, or a folder that is no set, or a set of a newer format; a refused address or access.
        DataError: a damaged ``dataset.json``, a shard or the index missing or of another length.
        Interrupted: the store can't be reached.
    """
    place = parse_place(folder)
    storage = storage or StorageOptions()
    raw = _read_remote_info(place, storage) if place.remote else _read_local_info(Path(place.url), folder)
    at = f"{place.url}/{DATASET_FILE}"
    try:
        info = json.loads(raw)
    except (ValueError, RecursionError):
        if looks_like_html(raw):
            raise DataError(f"{at}: an HTML page came instead; a login page or a proxy in between?") from None
        raise DataError(f"{at} is damaged (not JSON): copy the set again or pack it again") from None
    _check_info(info, place.url)
    info["name"] = place.name
    dataset = Dataset(place.url, info, hashlib.sha256(raw).hexdigest(), storage)
    if check_files and not place.remote:
        _check_files(dataset)
    return dataset


def _read_local_info(path: Path, given: str | Path) -> bytes:
    if not path.is_dir():
        raise UserError(f"no shard set at {given}: no such folder; make one with: medtl data pack SOURCE --out {given}")
    try:
        return (path / DATASET_FILE).read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{given} is not a shard set: it has no {DATASET_FILE}; make one with: medtl data pack SOURCE --out DEST"
        ) from None


def _read_remote_info(place: Place, storage: StorageOptions) -> bytes:
    raw = ranges_of(place.url, storage).read_whole(DATASET_FILE)
    if raw is None:
        raise UserError(
            f"no shard set at {place.url}: there is no {DATASET_FILE}; check the address, or make one with: "
            f"medtl data pack SOURCE --out {place.url if place.scheme in ('s3', 'gs') else 'DEST'}"
        )
    return raw


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
    entry = dataset.info["index"]
    index = Index(dataset.folder, INDEX_FILE, entry["bytes"], entry["sha256"], dataset.sha256, dataset.storage)
    table = read_row_groups(index, [shard.row_group for shard in shards], columns, dataset.index_spans)
    types = {column.name: column.type for column in table.schema}
    for expected in INDEX_FIELDS:
        found = types.get(expected.name)
        wanted = columns is None or expected.name in columns
        if wanted and found != expected.type and not (expected.name == "label" and _is_list_of_labels(dataset, found)):
            raise DataError(f"{index.path} is no index of this format (column {expected.name}): copy or pack it again")
    if table.num_rows != sum(shard.samples for shard in shards):
        raise DataError(
            f"{index.path} does not match {DATASET_FILE}: another number of samples; copy or pack the set again"
        )
    return table


def _is_list_of_labels(dataset: Dataset, kind: pa.DataType | None) -> bool:
    is_list = kind is not None and pa.types.is_list(kind) and kind.value_type == pa.int8()
    return dataset.task == "multilabel" and is_list


def _check_info(info: Any, path: str) -> None:
    damaged = f"{path}/{DATASET_FILE} is damaged"
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
    _check_spans(info)


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
            for counted in ("classes", "domains"):
                if not are_counts(shard.get(counted, {})):
                    raise ValueError(f"{shard['name']} has no counts of its {counted}")
        if sum(shard["samples"] for shard in entry["shards"]) != entry["samples"]:
            raise ValueError(f"split {split}: shards do not add up to its samples")


def are_counts(value: Any) -> bool:
    """Whether a value of ``dataset.json`` is a mapping to whole numbers from 0 on."""
    return isinstance(value, dict) and all(type(count) is int and 0 <= count < 2**53 for count in value.values())


def _check_spans(info: dict[str, Any]) -> None:
    index = info["index"]
    if "row_groups" in index:
        first, then, *rest = index["footer"]
        places = [first, then, *index["row_groups"], *rest]
        num_shards = sum(len(entry["shards"]) for entry in info["splits"].values())
        if len(rest) != 2 or len(index["row_groups"]) != num_shards + 1 or not all(type(p) is int for p in places):
            raise ValueError("the index's footer is described wrongly")
        if places != sorted(places) or first < 0 or rest[1] > index["bytes"]:
            raise ValueError("the index's footer lies elsewhere")


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
