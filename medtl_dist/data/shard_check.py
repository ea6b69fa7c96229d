"""one shard and its index rows ─► faults and counts: the part of ``verify`` that worker processes do."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from typing import Any, BinaryIO, NamedTuple

from medtl_dist.data.label_sets import TASK, row_objection
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


@dataclass(frozen=True)
class Task:
    """A shard to check. ``dataset`` without its list of shards, so that it is small to send."""

    dataset: Dataset
    shard: Shard


@dataclass
class ShardResult:
    """What was found. ``classes``, ``domains``: samples per name by the index; None if it could not be read. ``others``: of
    label sets the ``negatives`` and ``unknown`` of each class."""

    shard: Shard
    faults: list[Fault] = field(default_factory=list)
    classes: Counter[str] | None = None
    domains: Counter[str] | None = None
    others: dict[str, Counter[str]] = field(default_factory=dict)

    def fault(self, kind: str, what: str, key: str | None = None) -> None:
        self.faults.append(Fault(kind, self.shard.name, what, key))


def open_shard(dataset: Dataset, shard: Shard) -> tuple[BufferedReader, int]:
    """A shard as a binary file that seeks, and its length; the only place where checking opens one.

    Raises: OSError, it cannot be opened; DataError, it is no regular file.
    """
    return open_regular(os.path.join(dataset.folder, shard.name))


def open_regular(path: str) -> tuple[BufferedReader, int]:
    """A regular file and its length; never waits for a FIFO's other end. Raises: OSError; DataError, no regular file"""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise DataError("not a regular file")
    return os.fdopen(handle, "rb"), status.st_size


def check_shard(task: Task) -> ShardResult:
    """Compares a shard with its index rows and its entry in ``dataset.json``. Never raises for a bad shard."""
    result = ShardResult(task.shard)
    rows = _rows(task, result)
    try:
        file, length = open_shard(task.dataset, task.shard)
    except FileNotFoundError:
        result.fault("missing", "is missing")
        return result
    except (OSError, DataError) as error:
        result.fault("missing", f"cannot be opened ({getattr(error, 'strerror', None) or error})")
        return result
    with file:
        try:
            if length != task.shard.bytes:
                result.fault("length", f"is {length} bytes long, {task.shard.bytes} in dataset.json")
            if hashlib.file_digest(file, "sha256").hexdigest() != task.shard.sha256:
                result.fault("checksum", "its sha256 differs from dataset.json's")
            _check_samples(task.dataset, rows, file, length, result)
        except OSError as error:
            result.fault("missing", f"cannot be read ({error.strerror})")
    return result


def _rows(task: Task, result: ShardResult) -> list[dict[str, Any]]:
    """The index rows of the shard, themselves checked; none if they cannot be read."""
    try:
        table = read_shard_rows(task.dataset, task.shard)
    except DataError as error:
        result.fault("index", f"its index rows cannot be read: {error}")
        return []
    rows = table.to_pylist()
    result.classes, result.domains = Counter(), Counter()
    end = 0
    for row in rows:
        for what in _row_objections(row, task, end):
            result.fault("index", f"its index row {what}", _key(row))
        end = (row["offset"] or 0) + (row["size"] or 0)
        result.classes.update(classes_of(row["label"], task.dataset))
        for name, value in (("negatives", 0), ("unknown", None)):
            if task.dataset.task == TASK:
                with_value = classes_of(row["label"], task.dataset, value)
                result.others.setdefault(name, Counter()).update(with_value)
        if row["domain"] is not None:
            result.domains[row["domain"]] += 1
    return rows


def classes_of(label: Any, dataset: Dataset, value: int | None = 1) -> list[str]:
    """The names of the classes that an index row's label says are present; of a label that is none, none.

    ``value``: of label sets, the classes with this value instead.
    """
    if dataset.task == TASK:
        whole = row_objection(label, len(dataset.classes)) is None
        return [name for name, found in zip(dataset.classes, label, strict=True) if found == value] if whole else []
    return [dataset.classes[label]] if isinstance(label, int) and 0 <= label < len(dataset.classes) else []


def _row_objections(row: dict[str, Any], task: Task, end: int) -> Iterator[str]:
    empty = [name for name in _FACTS if row[name] is None and name != "domain"]
    if empty:
        yield f"has no {', '.join(empty)}"
        return
    if row["shard"] != task.shard.name or row["split"] != task.shard.split:
        yield "names another shard or split"
    if task.dataset.task == TASK:
        if what := row_objection(row["label"], len(task.dataset.classes)):
            yield what
    elif not 0 <= row["label"] < len(task.dataset.classes):
        yield f"has label {row['label']}, of {len(task.dataset.classes)} classes"
    if not HASH.fullmatch(row["group"]):
        yield "has a group that is no hash; is it a patient's own id?"
    if row["size"] < 1 or row["offset"] < end or row["offset"] + row["size"] > task.shard.bytes:
        yield "is out of order, or points outside the shard"


def _check_samples(
    dataset: Dataset, rows: list[dict[str, Any]], file: BinaryIO, length: int, result: ShardResult
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
    label, names = row["label"], classes_of(row["label"], dataset)
    one_label = names[0] if names else None
    expected = {"class": names if dataset.task == TASK else one_label, "label": label, **kept}
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
    waiting: dict[int, dict[str, Any]], file: BinaryIO, length: int, broken: bool, result: ShardResult
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
