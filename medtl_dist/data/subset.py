"""a shard set ─► a fold's own shard set: some of its samples in other splits, the stored bytes copied as they are.

A fold set holds the samples of one fold of a cross-validation: ``train``, ``val`` to choose the epoch on, and as ``test`` the
fold held out, which no training reads. It is written from the set's train and val: its test split is never opened. It is an
ordinary set, the same bytes each time, and says in ``dataset.json`` what it was made from.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from medtl_dist.data import label_sets
from medtl_dist.data.encoding import Stored
from medtl_dist.data.pieces import Reader
from medtl_dist.data.plan import Piece
from medtl_dist.data.shard_writer import Facts, SetWriter, SplitCounts, sync_folder, write_dataset_file
from medtl_dist.data.shards import DATASET_FILE, INDEX_FIELDS, SPLITS, Dataset, open_dataset, read_shard_rows
from medtl_dist.data.split import shuffled
from medtl_dist.data.staging import work_folder
from medtl_dist.errors import DataError, UserError
from medtl_dist.storage import Folder, StorageOptions

NUM_WATCHED = 32  # training samples that a fold without a val of its own is watched on
_PUT_AT_ONCE = 4  # shards of 64 MiB at most


@dataclass(frozen=True)
class Members:
    """The samples outside test, in index order: ``table`` of the index, ``places`` (split, shard, row)."""

    dataset: Dataset
    table: pa.Table
    places: list[tuple[str, int, int]]

    def __len__(self) -> int:
        return len(self.places)

    @property
    def keys(self) -> list[bytes]:
        return self.table.column("key").to_pylist()

    @property
    def groups(self) -> list[str]:
        return self.table.column("group").to_pylist()

    @property
    def labels(self) -> NDArray[np.integer]:
        """int64 [n], or label sets int8 [n, classes]."""
        column = self.table.column("label").combine_chunks()
        if pa.types.is_list(column.type):
            return label_sets.column_to_sets(column)
        return np.asarray(column.to_pylist(), np.int64)


def read_members(dataset: Dataset) -> Members:
    """The set's samples outside test, from the index alone. Raises: UserError, there are none; DataError, it is damaged."""
    parts: list[pa.Table] = []
    places: list[tuple[str, int, int]] = []
    for split in ("train", "val"):
        for number, shard in enumerate(dataset.shards(split) if split in dataset.splits else ()):
            parts.append(read_shard_rows(dataset, shard))
            places += [(split, number, row) for row in range(shard.samples)]
    if not places:
        raise UserError(f"{dataset.folder} has no train and no val images; its splits: {', '.join(dataset.splits)}")
    return Members(dataset, pa.concat_tables(parts), places)


def write_fold_set(
    members: Members, rows_of: Mapping[str, Sequence[int]], folder: Path, fold: Mapping[str, Any], *, seed: int
) -> Dataset:
    """Write the members ``rows_of`` (split to rows) as a set in ``folder``, all of it or nothing, unless it is there already.

    Args:
        fold: what ``dataset.json`` says of the fold beside the set it was made from; ``epochs`` is ``fixed`` or ``inner``.
        seed: of the packing order.

    Raises:
        UserError: the folder can't be written.
        DataError: a sample that differs from its checksum.
    """
    made_from = _made_from(members, fold)
    try:
        with work_folder(folder) as work:
            if not folder.is_dir():
                (work / "set").mkdir()
                info = _write(members, rows_of, work / "set", seed)
                write_dataset_file(work / "set", info | {"fold": made_from})
                os.rename(work / "set", folder)
                sync_folder(folder.parent)
    except OSError as error:
        raise UserError(f"cannot write the fold's set at {folder}: {error.strerror or type(error).__name__}") from None
    return _same_fold(open_dataset(folder), made_from)


def write_fold_set_in(
    members: Members,
    rows_of: Mapping[str, Sequence[int]],
    place: Folder,
    fold: Mapping[str, Any],
    *,
    seed: int,
    storage: StorageOptions,
) -> Dataset:
    """As ``write_fold_set``, wherever ``place`` lies: for a store it is written on this machine and put there, ``dataset.json``
    last. ``storage``: how the set is read in a store.

    Raises: as ``write_fold_set``; Interrupted, the store can't be reached, or this writer has been replaced.
    """
    if not place.remote:
        return write_fold_set(members, rows_of, place.local_path, fold, seed=seed)
    if not place.exists(DATASET_FILE):
        with TemporaryDirectory(prefix="medtl-fold-") as scratch:
            made = Path(scratch) / "set"
            write_fold_set(members, rows_of, made, fold, seed=seed)
            names = sorted(file.name for file in made.iterdir() if file.name != DATASET_FILE)
            with ThreadPoolExecutor(_PUT_AT_ONCE) as pool:
                list(pool.map(lambda name: place.write(name, (made / name).read_bytes()), names))
            place.write(DATASET_FILE, (made / DATASET_FILE).read_bytes())
    return _same_fold(open_dataset(place.url, storage), _made_from(members, fold))


def _made_from(members: Members, fold: Mapping[str, Any]) -> dict[str, Any]:
    return dict(fold) | {"of_dataset_sha256": members.dataset.sha256}


def _same_fold(dataset: Dataset, made_from: Mapping[str, Any]) -> Dataset:
    if dataset.info.get("fold") != made_from:
        raise UserError(f"{dataset.folder} holds another set than this fold's: remove it, or name another run folder")
    return dataset


def epochs_fixed(dataset: Dataset) -> bool:
    """Whether the set is that of a fold whose last epoch counts: its val, of training samples, must choose nothing."""
    return (dataset.info.get("fold") or {}).get("epochs") == "fixed"


def _write(members: Members, rows_of: Mapping[str, Sequence[int]], folder: Path, seed: int) -> dict[str, Any]:
    """The shards and the index; returns what ``dataset.json`` will say, but for the fold."""
    source, schema = members.dataset.info, members.table.schema.remove_metadata()
    own = {entry.name for entry in INDEX_FIELDS}
    kept = pa.schema([entry for entry in schema if entry.name not in own])
    classes = members.dataset.classes
    label_classes = classes if members.dataset.task == label_sets.TASK else None
    encoding = str(source["preprocessing"].get("encoding", "jpeg95"))
    writer = SetWriter(folder, kept, "png" if encoding == "png" else "jpg", label_classes)
    splits: dict[str, Any] = {}
    keys = members.keys
    try:
        for split in sorted(rows_of):
            rows = list(rows_of[split])
            order = [rows[place] for place in shuffled([keys[row] for row in rows], seed)]
            counts = SplitCounts(classes, label_classes)
            writer.begin_split(split, len(order))
            for facts, stored in _samples(members, order, kept.names):
                writer.add(facts, stored)
                counts.add(facts)
            splits[split] = counts.as_dict() | {"shards": writer.end_split()}
        index = writer.finish()
    except BaseException:
        writer.abandon()
        raise
    same = ("format_version", "tool_version", "task", "classes", "positive_class", "preprocessing", "group_source")
    return {name: source[name] for name in same if name in source} | {
        "splits": {split: splits[split] for split in SPLITS if split in splits},
        "split_source": {"method": "a fold of a cross-validation, by group", "seed": seed, "fractions": None},
        "notes": ["made by crossval from another set's train and val; its test is the fold held out"],
        "cautions": [],
        "audit": None,
        "index": index,
    }


def _samples(members: Members, order: Sequence[int], kept: Sequence[str]) -> Iterator[tuple[Facts, Stored]]:
    dataset = members.dataset
    columns = members.table.column_names
    with ExitStack() as open_readers:
        readers = {
            split: open_readers.enter_context(closing(Reader(dataset, split)))
            for split in dict.fromkeys(members.places[row][0] for row in order)
        }
        for place in order:
            split, shard, number = members.places[place]
            [sample] = readers[split].read(Piece(shard, number, number + 1))
            data = bytes(sample.data)
            row = {name: members.table.column(name)[place].as_py() for name in columns}
            if hashlib.sha256(data).digest() != row["sha256"]:
                raise DataError(
                    f"{dataset.folder}: image {row['key'].hex()} differs from its checksum in the index; "
                    "copy the set again or pack it again"
                )
            label, name = _label(row["label"], dataset.classes)
            facts = Facts(row["key"], row["group"], label, name, row["domain"], {one: row[one] for one in kept})
            yield facts, Stored(data, row["sha256"], row["width"], row["height"], row["channels"])


def _label(value: Any, classes: Sequence[str]) -> tuple[int | tuple[int | None, ...], str | tuple[str, ...]]:
    """A row's label and the class names it says."""
    if isinstance(value, list):
        return tuple(value), tuple(name for name, answer in zip(classes, value, strict=True) if answer == 1)
    return int(value), str(classes[value])
