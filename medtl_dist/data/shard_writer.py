"""stored images ─► shards/*.tar + index.parquet: the writing side of the format in ``data/shards.py``.

Bytes depend on the samples alone: USTAR headers without owner or time, a fixed order, no clock.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import tarfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from medtl_dist.data.encoding import Stored
from medtl_dist.data.index_footer import spans_of
from medtl_dist.data.label_sets import LABEL_TYPE, Tally
from medtl_dist.data.shards import DATASET_FILE, INDEX_FIELDS, INDEX_FILE

MAX_SHARD_SAMPLES = 1000
MAX_SHARD_BYTES = 64 * 2**20
# Enough shards for ranks and loader workers to share, even of a small set.
MIN_SHARDS = 8


class Facts(NamedTuple):
    """What is written about one image beside its pixels. ``kept``: the kept columns. Of a label set ``label`` has an entry
    per class (None: unknown) and ``class_name`` names those present."""

    key: bytes
    group: str
    label: int | tuple[int | None, ...]
    class_name: str | tuple[str, ...]
    domain: str | None
    kept: Mapping[str, Any]


def samples_per_shard(num_samples: int) -> int:
    """The most samples a shard of a split may have: at most 1,000, and few enough for 8 shards, but at least 8.

    Shards also end at 64 MiB, so that large images make shards of fewer samples.
    """
    most = min(MAX_SHARD_SAMPLES, max(MIN_SHARDS, math.ceil(num_samples / MIN_SHARDS)))
    num_shards = max(1, math.ceil(num_samples / most))
    return math.ceil(num_samples / num_shards) or 1  # shards of about equal size


class SetWriter:
    """Writes one set, split by split in sorted order: ``add`` per image, ``end_split``, then ``finish``."""

    def __init__(
        self, folder: Path, kept: pa.Schema, extension: str, label_classes: Sequence[str] | None = None
    ) -> None:
        """``label_classes``: the classes of a set with a label set per image; None: one label per image."""
        self._folder = folder
        self._label_classes = label_classes
        fields = [pa.field("label", LABEL_TYPE) if f.name == "label" and label_classes else f for f in INDEX_FIELDS]
        self._schema = pa.schema([*fields, *kept])
        self._extension = extension
        self._index = pq.ParquetWriter(
            folder / INDEX_FILE, self._schema, compression="zstd", write_page_checksum=True, store_schema=False
        )
        self._shard: _Tar | None = None
        self._rows: list[dict[str, Any]] = []
        self._tally = Tally(label_classes)
        self._domains: Counter[str] = Counter()
        self._listed: list[dict[str, Any]] = []
        self._split = ""
        self._most = MAX_SHARD_SAMPLES

    def begin_split(self, split: str, num_samples: int) -> None:
        """``num_samples``: how many will come, at most."""
        self._split, self._most, self._listed = split, samples_per_shard(num_samples), []

    def add(self, facts: Facts, image: Stored) -> None:
        """Append one sample; a full shard is closed and its rows go into the index as one row group."""
        key = facts.key.hex()
        if self._shard is None:
            self._shard = _Tar(self._folder / f"{self._split}-{len(self._listed):06d}.tar")
        offset = self._shard.add(f"{key}.{self._extension}", image.data)
        kept = {name: _plain(value) for name, value in facts.kept.items()}
        described = {"class": facts.class_name, "label": facts.label, **kept}
        text = json.dumps(described, sort_keys=True, ensure_ascii=False, allow_nan=False)
        self._shard.add(f"{key}.json", text.encode("utf-8"))
        self._tally.add(facts.class_name, facts.label)
        if facts.domain is not None:
            self._domains[facts.domain] += 1
        self._rows.append(
            {
                "key": facts.key,
                "sha256": image.sha256,
                "split": self._split,
                "domain": facts.domain,
                "label": facts.label,
                "group": facts.group,
                "shard": self._shard.name,
                "offset": offset,
                "size": len(image.data),
                "width": image.width,
                "height": image.height,
                "channels": image.channels,
                **kept,
            }
        )
        if len(self._rows) >= self._most or self._shard.length >= MAX_SHARD_BYTES:
            self._close_shard()

    def end_split(self) -> list[dict[str, Any]]:
        """The split's shards for ``dataset.json``."""
        self._close_shard()
        return self._listed

    def _close_shard(self) -> None:
        if self._shard is None:
            return
        length, sha256 = self._shard.close()
        # Counts per class and domain let a reader plan weighted sampling without the index.
        entry = {
            "name": self._shard.name,
            "samples": len(self._rows),
            "bytes": length,
            "sha256": sha256,
            **self._tally.as_dict(),
            "domains": dict(sorted(self._domains.items())),
        }
        self._listed.append(entry)
        self._index.write_table(pa.Table.from_pylist(self._rows, self._schema), row_group_size=len(self._rows))
        self._shard, self._rows = None, []
        self._tally = Tally(self._label_classes)
        self._domains.clear()

    def finish(self) -> dict[str, Any]:
        """Close the index; its entry for ``dataset.json``."""
        self._index.close()
        return describe_index(self._folder / INDEX_FILE)

    def abandon(self) -> None:
        """Let go of open files; what was written is for the caller to remove."""
        if self._shard is not None:
            self._shard.close()
        self._index.close()


class SplitCounts:
    """A split's counts for ``dataset.json``, taken from what was really written."""

    def __init__(self, classes: tuple[str, ...], label_classes: tuple[str, ...] | None) -> None:
        self._classes = classes
        self._samples = 0
        self._tally = Tally(label_classes)
        self._domains: defaultdict[str, int] = defaultdict(int)
        self._groups: set[str] = set()

    def add(self, facts: Facts) -> None:
        self._samples += 1
        self._tally.add(facts.class_name, facts.label)
        self._groups.add(facts.group)
        if facts.domain is not None:
            self._domains[facts.domain] += 1

    def as_dict(self) -> dict[str, Any]:
        return {
            "samples": self._samples,
            "groups": len(self._groups),
            **self._tally.as_dict(self._classes),
            "domains": dict(sorted(self._domains.items())),
        }


def describe_index(path: Path) -> dict[str, Any]:
    """The entry of a finished ``index.parquet`` in ``dataset.json``, made durable: its length, sha256, and where its
    footer and the description of each row group lie (see ``data/index_footer.py``)."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        length = file.tell()
        file.seek(length - 8)
        file.seek(length - 8 - int.from_bytes(file.read(4), "little"))
        spans = spans_of(file.read(), length)
    return {
        "name": path.name,
        "bytes": length,
        "sha256": digest,
        "footer": [*spans.before, *spans.after],
        "row_groups": [start for start, _ in spans.row_groups] + [spans.after[0]],
    }


def write_dataset_file(folder: Path, info: Mapping[str, Any]) -> None:
    """Write ``dataset.json``, the last file of a set, and make it and the folder durable."""
    with (folder / DATASET_FILE).open("w", encoding="utf-8", newline="\n") as file:
        json.dump(info, file, indent=1, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(value: Any) -> Any:
    # JSON has no NaN; in a table it means missing.
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Tar:
    """A tar being written, its sha256 taken on the way."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._file = _HashingFile(path)
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    @property
    def length(self) -> int:
        return self._file.tell()

    def add(self, name: str, data: bytes) -> int:
        """Append a member; returns the offset of its data."""
        member = tarfile.TarInfo(name)  # mtime 0, uid and gid 0, no names, mode 0644
        member.size = len(data)
        offset = self._file.tell() + tarfile.BLOCKSIZE
        self._tar.addfile(member, io.BytesIO(data))
        return offset

    def close(self) -> tuple[int, str]:
        """End the archive durably: its length and hexadecimal sha256."""
        self._tar.close()
        return self._file.finish()


class _HashingFile(io.RawIOBase):
    """A file that can only be appended to, and knows its hash."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._hash = hashlib.sha256()
        self._length = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self._file.write(data)
        self._hash.update(data)
        self._length += len(data)
        return len(data)

    def tell(self) -> int:
        return self._length

    def finish(self) -> tuple[int, str]:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._length, self._hash.hexdigest()
