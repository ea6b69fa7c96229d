"""one shard and its index rows ─► faults and counts: the part of ``verify`` that worker processes do."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from typing import Any, NamedTuple

from medtl_dist.data.ranges import ranges_of
from medtl_dist.data.remote_file import RemoteFile
from medtl_dist.data.shards import INDEX_FIELDS, Dataset, Shard, read_shard_rows
from medtl_dist.data.sidecars import BadSample, Fields, look_at, parse_json, read_told
from medtl_dist.data.tars import Member, Refused, TarSample, read_members, read_samples
from medtl_dist.errors import DataError

HASH = re.compile("[0-9a-f]{32}")

_FACTS = tuple(field.name for field in INDEX_FIELDS)


class Fault(NamedTuple):
    """One thing that is wrong: ``kind`` groups them, ``key`` names the sample where it is known."""

    kind: str
    file: str
    what: str
    key: str | None = None

    def __str__(self) -> str:
        return f"{self.file}: {f'image {self.key}: ' if self.key else ''}{self.what}"


@dataclass
class ShardResult:
    """What was found. ``classes``, ``domains``: samples per name by the index; None if it could not be read."""

    shard: Shard
    faults: list[Fault] = field(default_factory=list)
    classes: Counter[str] | None = None
    domains: Counter[str] | None = None

    def fault(self, kind: str, what: str, key: str | None = None) -> None:
        self.faults.append(Fault(kind, self.shard.name, what, key))


def open_file(dataset: Dataset, name: str) -> tuple[BufferedReader | RemoteFile, int]:
    """A file of a set as one that reads and seeks, and its length; the only place where checking opens one.

    Raises: FileNotFoundError; OSError, it cannot be opened; DataError, it is no regular file; of a set in a store as
    ``Ranges.read``, and whoever reads must expect the same.
    """
    if not dataset.remote:
        return open_regular(os.path.join(dataset.folder, name))
    ranges = ranges_of(dataset.folder, dataset.storage)  # not through the cache: it is the store that is checked
    size = ranges.size(name)
    if size is None:
        raise FileNotFoundError(errno.ENOENT, "is missing")
    return RemoteFile(ranges, name, size), size


def sha256_of(file: BufferedReader | RemoteFile) -> str:
    """Of a whole file that ``open_file`` opened."""
    if isinstance(file, RemoteFile):
        return file.sha256()
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def open_regular(path: str) -> tuple[BufferedReader, int]:
    """A regular file and its length; never waits for a FIFO's other end. Raises: OSError; DataError, no regular file"""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise DataError("not a regular file")
    return os.fdopen(handle, "rb"), status.st_size


def check_shard(dataset: Dataset, shard: Shard) -> ShardResult:
    """Compares a shard with its index rows and its entry in ``dataset.json``, of which ``dataset`` needs no list of shards.
    A bad shard is no error, but: raises UserError and Interrupted for a store that lets nobody in or can't be reached."""
    result = ShardResult(shard)
    rows = _rows(dataset, shard, result)
    try:
        file, length = open_file(dataset, shard.name)
    except FileNotFoundError:
        result.fault("missing", "is missing")
        return result
    except (OSError, DataError) as error:
        result.fault("missing", f"cannot be opened ({getattr(error, 'strerror', None) or error})")
        return result
    with file:
        try:
            if length != shard.bytes:
                result.fault("length", f"is {length} bytes long, {shard.bytes} in dataset.json")
            before = len(result.faults)
            _check_samples(dataset, rows, file, length, result)
            if sha256_of(file) != shard.sha256:
                result.faults.insert(before, Fault("checksum", shard.name, "its sha256 differs from dataset.json's"))
        except (OSError, DataError) as error:
            result.fault("missing", f"cannot be read ({getattr(error, 'strerror', None) or error})")
    return result


def _rows(dataset: Dataset, shard: Shard, result: ShardResult) -> list[dict[str, Any]]:
    """The index rows of the shard, themselves checked; none if they cannot be read."""
    try:
        table = read_shard_rows(dataset, shard)
    except DataError as error:
        result.fault("index", f"its index rows cannot be read: {error}")
        return []
    rows = table.to_pylist()
    result.classes, result.domains = Counter(), Counter()
    end = 0
    for row in rows:
        for what in _row_objections(row, dataset, shard, end):
            result.fault("index", f"its index row {what}", _key(row))
        end = (row["offset"] or 0) + (row["size"] or 0)
        if isinstance(row["label"], int) and 0 <= row["label"] < len(dataset.classes):
            result.classes[dataset.classes[row["label"]]] += 1
        if row["domain"] is not None:
            result.domains[row["domain"]] += 1
    return rows


def _row_objections(row: dict[str, Any], dataset: Dataset, shard: Shard, end: int) -> Iterator[str]:
    empty = [name for name in _FACTS if row[name] is None and name != "domain"]
    if empty:
        yield f"has no {', '.join(empty)}"
        return
    if row["shard"] != shard.name or row["split"] != shard.split:
        yield "names another shard or split"
    if not 0 <= row["label"] < len(dataset.classes):
        yield f"has label {row['label']}, of {len(dataset.classes)} classes"
    if not HASH.fullmatch(row["group"]):
        yield "has a group that is no hash; is it a patient's own id?"
    if row["size"] < 1 or row["offset"] < end or row["offset"] + row["size"] > shard.bytes:
        yield "is out of order, or points outside the shard"


def _check_samples(
    dataset: Dataset, rows: list[dict[str, Any]], file: BufferedReader | RemoteFile, length: int, result: ShardResult
) -> None:
    waiting = {row["offset"]: row for row in rows}
    fields = fields_of(dataset)
    broken = False
    members = read_members(file, length)
    for sample in read_samples(members if fields else _no_folders(members)):
        if isinstance(sample, Refused):
            broken = broken or sample.ends
            result.fault("tar", str(sample))
            continue
        row = waiting.pop(sample.image.offset, None)
        if row is None:
            result.fault("tar", f"member {sample.image.number}: an image that the index does not have")
            continue
        for kind, what in _sample_faults(sample, row, dataset, fields):
            result.fault(kind, what, _key(row))
    _check_unreached(waiting, file, length, broken, result)


def _no_folders(members: Iterable[Member | Refused]) -> Iterator[Member | Refused]:
    """A set of our making has no folders in its tars."""
    for member in members:
        is_folder = isinstance(member, Member) and not member.extension
        yield Refused(member.number, "a folder", member.name) if is_folder else member


def _key(row: dict[str, Any]) -> str:
    return row["key"].hex() if row["key"] else "?"


def fields_of(dataset: Dataset) -> Fields | None:
    """Where an adopted set's facts are in its tars; None for a set of our packing.

    Raises: DataError, ``dataset.json`` says it in another shape.
    """
    if "adopted" not in dataset.info:
        return None
    try:
        told = dataset.info["adopted"]
        fields = Fields(told["label"], tuple(told["groups"]), told["domain"], tuple(told["keep"]))
        if not all(isinstance(name, str) for name in (*fields.groups, *fields.names)):
            raise TypeError
    except (KeyError, TypeError):
        raise DataError(f"{dataset.folder}: dataset.json has a damaged entry 'adopted': index the tars again") from None
    return fields


def _sample_faults(
    sample: TarSample, row: dict[str, Any], dataset: Dataset, fields: Fields | None
) -> Iterator[tuple[str, str]]:
    """kind and words of what is wrong with one sample."""
    image = sample.image
    if fields is None:
        if sample.key != _key(row):
            yield "tar", "its member has another name than its key"
        if [image.number, *(text.number for text in sample.texts.values())] != [sample.number, sample.number + 1]:
            yield "tar", "its members are not one image and then one .json"
    if len(image.data) != row["size"]:
        yield "index", f"its member has {len(image.data)} bytes, {row['size']} in the index"
    yield from _image_faults(image.data, row, dataset)
    try:
        if fields is None:
            yield from _json_faults(sample, row, dataset)
        else:
            yield from _told_faults(sample, row, dataset, fields)
    except BadSample as bad:
        yield "json", str(bad)


def _image_faults(data: bytes, row: dict[str, Any], dataset: Dataset) -> Iterator[tuple[str, str]]:
    if hashlib.sha256(data).digest() != row["sha256"]:
        yield "checksum", "its bytes differ from the checksum in the index"
    try:
        look = look_at(data)
    except BadSample as bad:
        yield "image", str(bad)
        return
    seen, told = (look.width, look.height, look.channels), (row["width"], row["height"], row["channels"])
    if seen != told:
        yield "image", f"it is {_shape(seen)}, in the index {_shape(told)}"
    elif "adopted" not in dataset.info and look.channels != dataset.channels:
        yield "image", f"it is {_shape(seen)} in a set of {dataset.color} images"
    elif dataset.channels == 1 and not look.grey:
        yield "image", "it is in colour, in a set of grey images"


def _shape(shape: tuple[int, int, int]) -> str:
    return f"{shape[0]} x {shape[1]} px of {shape[2]} channels"


def _json_faults(sample: TarSample, row: dict[str, Any], dataset: Dataset) -> Iterator[tuple[str, str]]:
    if "json" not in sample.texts:
        yield "json", "it has no .json member"
        return
    told = parse_json(sample.texts["json"].data)
    kept = {name: value for name, value in row.items() if name not in _FACTS}
    label = row["label"]
    known = isinstance(label, int) and 0 <= label < len(dataset.classes)
    expected = {"class": dataset.classes[label] if known else None, "label": label, **kept}
    if told.keys() != expected.keys():
        yield "json", f"its .json has other fields than: {', '.join(sorted(expected))}"
    for name in sorted(told.keys() & expected.keys()):
        if told[name] != expected[name] or isinstance(told[name], bool) != isinstance(expected[name], bool):
            yield "label" if name in ("class", "label") else "json", f"its .json has another {name} than the index"


def _told_faults(sample: TarSample, row: dict[str, Any], dataset: Dataset, fields: Fields) -> Iterator[tuple[str, str]]:
    told = read_told(sample, row["split"], fields)
    label = row["label"]
    if told.label not in dataset.classes or dataset.classes.index(told.label) != label:
        yield "label", "its tar tells another label than the index"
    if told.domain != row["domain"]:
        yield "json", "its tar tells another domain than the index"
    for name, value in zip(fields.keep, told.kept, strict=True):
        if row.get(name) != value:
            yield "json", f"its tar tells another {name} than the index"


def _check_unreached(
    waiting: dict[int, dict[str, Any]],
    file: BufferedReader | RemoteFile,
    length: int,
    broken: bool,
    result: ShardResult,
) -> None:
    """Rows whose image the walk through the tar did not meet: read where the index says it is."""
    whole = 0
    for offset, row in waiting.items():
        size = row["size"]
        if not isinstance(offset, int) or not isinstance(size, int) or offset < 0 or not 0 <= size <= length - offset:
            result.fault("tar", "the tar ends before its bytes do", _key(row))
            continue
        file.seek(offset)
        if not broken:
            result.fault("tar", "the tar has no such member at its offset", _key(row))
        elif hashlib.sha256(file.read(size)).digest() == row["sha256"]:
            whole += 1
        else:
            result.fault("checksum", "its bytes differ from the checksum in the index", _key(row))
    if whole:
        result.fault("tar", f"{whole} images can't be reached through the damaged tar, though their bytes are whole")
