"""findings ─► a new shard set without the leaks: duplicates share a group, and a group has one split.

The rule: a joined or straddling group goes where the most protected of its images is, test before val before train.
So no image that was in test is ever trained on, in this set or by anyone who compares with the official test split;
the price is that test can grow by the copies. Labels that contradict one another are reported, never changed.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medtl_dist.data.audit import Audit, audit
from medtl_dist.data.audit_scan import Progress, Scan
from medtl_dist.data.encoding import Stored
from medtl_dist.data.findings import Match, components
from medtl_dist.data.manifest import cautions_of_counts
from medtl_dist.data.plan import Piece
from medtl_dist.data.private import KEY_FILE, LINKAGE_FILE, PROBLEMS_FILE, private_folder, write_private
from medtl_dist.data.reader import Reader
from medtl_dist.data.shard_writer import Facts, SetWriter, sync_folder, write_dataset_file
from medtl_dist.data.shards import INDEX_FIELDS, SPLITS, Dataset, open_dataset, read_shard_rows
from medtl_dist.data.split import shuffled
from medtl_dist.data.staging import check_destination, work_folder
from medtl_dist.errors import DataError, UserError

_PROTECTED = ("train", "val", "test")  # later ones win
_ROWS = 1000


@dataclass(frozen=True)
class Plan:
    """Per image, in the scan's order: its new ``group`` and ``split``; and what changed, for ``dataset.json``."""

    group: list[str]
    split: list[str]
    changes: dict[str, Any]


def fix(
    found: Audit,
    out: str | Path,
    *,
    accepted: Mapping[frozenset[str], str] | None = None,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[Dataset, Audit]:
    """Write the set without its leaks to ``out`` and audit it; the audited set stays as it is.

    Raises:
        UserError: nothing to mend, ``out`` not empty, train would be left empty, or a set of several labels an image.
        DataError: an image that differs from its checksum.
    """
    seen, dest = found.seen, Path(out).absolute()
    if seen.dataset.task == "multilabel":
        raise UserError(f"{seen.dataset.folder} has several labels an image, which --fix cannot write: mend its source")
    plan = plan_fix(seen, found.matches, accepted or {})
    report = progress or (lambda stage, done, total: None)
    private = _linkage_of(seen.dataset)
    if private is not None:
        _refuse_other_key(private, private_folder(dest))
    try:
        with work_folder(dest) as work:
            check_destination(dest)
            folder = work / "set"
            info = _write(seen, plan, folder, lambda done: report("writing", done, len(seen)))
            write_dataset_file(folder, info)
            again = audit(open_dataset(folder), accepted=accepted, num_workers=num_workers, progress=report)
            write_dataset_file(folder, info | {"audit": again.summary})
            if private is not None:
                _copy_private(seen, plan, private, private_folder(dest))
            os.rename(folder, dest)
            sync_folder(dest.parent)
    except OSError as error:
        raise UserError(f"cannot write the set at {dest}: {error.strerror or type(error).__name__}") from None
    return open_dataset(dest), again


def plan_fix(seen: Scan, matches: list[Match], accepted: Mapping[frozenset[str], str]) -> Plan:
    """Join the groups of confirmed duplicates and choose each group's split. Raises: UserError, nothing to mend."""
    names = np.array(seen.groups.to_pylist(), dtype=object)
    sure = [
        match
        for match in matches
        if match.level == "confirmed" and frozenset((seen.key(match.first), seen.key(match.second))) not in accepted
    ]
    pairs = [(int(seen.group[m.first]), int(seen.group[m.second])) for m in sure]
    joined = components(pair for pair in pairs if pair[0] != pair[1])
    root = np.arange(len(names))
    root[list(joined)] = list(joined.values())
    of_image = root[seen.group]
    members: dict[int, list[str]] = {}
    for group, name in zip(root.tolist(), names, strict=True):
        members.setdefault(group, []).append(name)
    rank = np.array([_PROTECTED.index(split) for split in seen.dataset.splits])[seen.split]
    highest = np.zeros(len(names), np.int64)
    np.maximum.at(highest, of_image, rank)
    moves = Counter(
        (_PROTECTED[before], _PROTECTED[after])
        for before, after in zip(rank.tolist(), highest[of_image].tolist(), strict=True)
        if before != after
    )
    if not joined and not moves:
        raise UserError(f"{seen.dataset.folder} has nothing to mend: no confirmed duplicates of other groups or splits")
    changes = {
        "from_dataset_sha256": seen.dataset.sha256,
        "joined_groups": len(joined),
        "into_groups": len(set(joined.values())),
        "moved": [{"from": a, "to": b, "samples": count} for (a, b), count in sorted(moves.items())],
    }
    split = [_PROTECTED[place] for place in highest[of_image].tolist()]
    left = Counter(split)
    if empty := [name for name in seen.dataset.splits if not left[name]]:
        raise UserError(f"mending {seen.dataset.folder} would leave no image in {empty[0]}: pack it again by patient")
    return Plan([min(members[group]) for group in of_image.tolist()], split, changes)


def _write(seen: Scan, plan: Plan, folder: Path, done: Callable[[int], None]) -> dict[str, Any]:
    """The shards and the index; returns what ``dataset.json`` will say."""
    source = {key: value for key, value in seen.dataset.info.items() if key != "name"}
    table = pa.concat_tables(
        [read_shard_rows(seen.dataset, shard) for split in seen.dataset.splits for shard in seen.dataset.shards(split)]
    )
    own = {entry.name for entry in INDEX_FIELDS}
    kept = pa.schema([entry for entry in table.schema.remove_metadata() if entry.name not in own])
    encoding = str(source["preprocessing"].get("encoding", "jpeg95"))
    folder.mkdir()
    writer = SetWriter(folder, kept, "png" if encoding == "png" else "jpg")
    splits, written = {}, 0
    keys = [key.tobytes() for key in seen.keys]
    seed = (source.get("split_source") or {}).get("seed") or 0
    try:
        for split in sorted(set(plan.split)):
            inside = [image for image, name in enumerate(plan.split) if name == split]
            order = [inside[place] for place in shuffled([keys[image] for image in inside], seed)]
            writer.begin_split(split, len(order))
            for facts, stored in _samples(seen, plan, table, order, kept.names):
                writer.add(facts, stored)
                written += 1
                done(written)
            splits[split] = _counts(seen, plan, table, order) | {"shards": writer.end_split()}
        index = writer.finish()
    except BaseException:
        writer.abandon()
        raise
    mended = "duplicates joined"
    grouped = seen.dataset.group_source
    note = f"made by data audit --fix: {plan.changes['joined_groups']} groups joined, {written} images written"
    names = seen.groups.to_pylist()
    before = cautions_of_counts(source["splits"], Counter(names[group] for group in seen.group.tolist()))
    kept_cautions = [caution for caution in source.get("cautions", []) if caution not in before]
    return source | {
        "splits": {split: splits[split] for split in SPLITS if split in splits},
        "group_source": grouped if grouped == "none" or grouped.endswith(mended) else f"{grouped}, {mended}",
        "notes": [*source.get("notes", []), note],
        "cautions": [*kept_cautions, *cautions_of_counts(splits, Counter(plan.group))],
        "fix": plan.changes,
        "audit": None,
        "index": index,
    }


def _samples(
    seen: Scan, plan: Plan, table: pa.Table, order: list[int], kept: list[str]
) -> Iterator[tuple[Facts, Stored]]:
    readers = {split: Reader(seen.dataset, split) for split in seen.dataset.splits}
    classes = seen.dataset.classes
    for start in range(0, len(order), _ROWS):
        some = order[start : start + _ROWS]
        for image, row in zip(some, table.take(pa.array(some, pa.int64())).to_pylist(), strict=True):
            split, shard, place = seen.place(image)
            [sample] = readers[split].read(Piece(shard, place, place + 1))
            data = bytes(sample.data)
            if hashlib.sha256(data).digest() != row["sha256"]:
                raise DataError(
                    f"{seen.dataset.folder}: image {seen.key(image)} differs from its checksum in the index; "
                    "copy the set again or pack it again"
                )
            class_name, values = classes[row["label"]], {name: row[name] for name in kept}
            facts = Facts(row["key"], plan.group[image], row["label"], class_name, row["domain"], values)
            yield facts, Stored(data, row["sha256"], row["width"], row["height"], row["channels"])


def _counts(seen: Scan, plan: Plan, table: pa.Table, images: list[int]) -> dict[str, Any]:
    labels = Counter(seen.label[images].tolist())
    domains = Counter(table.column("domain").take(pa.array(images, pa.int64())).to_pylist())
    return {
        "samples": len(images),
        "groups": len({plan.group[image] for image in images}),
        "classes": {name: labels[label] for label, name in enumerate(seen.dataset.classes)},
        "domains": {name: domains[name] for name in sorted(name for name in domains if name is not None)},
    }


def _linkage_of(dataset: Dataset) -> Path | None:
    """The private folder beside a set, where it has one."""
    folder = private_folder(Path(dataset.folder))
    return folder if (folder / LINKAGE_FILE).is_file() else None


def _refuse_other_key(source: Path, folder: Path) -> None:
    """Raises: UserError, the new set's private folder holds another key: without it the set it made could never be made
    again."""
    key = folder / KEY_FILE
    if key.is_file() and not ((source / KEY_FILE).is_file() and (source / KEY_FILE).read_bytes() == key.read_bytes()):
        raise UserError(f"{folder} holds another key already: name another set with --fix, or move that folder away")


def _copy_private(seen: Scan, plan: Plan, source: Path, folder: Path) -> None:
    """Key and linkage of the new set: splits and groups as they are now."""
    linkage = pq.read_table(source / LINKAGE_FILE)
    place = {seen.key(image): image for image in range(len(seen))}
    images = [place.get(key) for key in linkage.column("key").to_pylist()]
    for name, new in (("split", plan.split), ("group", plan.group)):
        old = linkage.column(name).to_pylist()
        values = [old[row] if image is None else new[image] for row, image in enumerate(images)]
        linkage = linkage.set_column(linkage.column_names.index(name), name, pa.array(values, pa.string()))
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)
    buffer = io.BytesIO()
    pq.write_table(linkage, buffer, compression="zstd")
    write_private(folder / LINKAGE_FILE, buffer.getvalue())
    for name in (KEY_FILE, PROBLEMS_FILE):
        if (source / name).is_file():
            write_private(folder / name, (source / name).read_bytes())
