"""tars of plain ``webdataset`` ─► index.parquet + dataset.json beside them: ``medtl data index`` as a library.

    adopt("tars/", AdoptOptions(Fields(label="finding", groups=("patient",))))

Every tar is read once, in processes, and every image decoded; nothing is written unless all of it is usable, since a
sample that the index left out would still be there for other readers. The tars themselves are not touched.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import medtl_dist
from medtl_dist.data import manifest as manifests
from medtl_dist.data.foreign import ReadTar, Task, read_tar
from medtl_dist.data.manifest import Identities, Manifest
from medtl_dist.data.private import REFUSED_FILE, open_private, private_folder, write_linkage, write_refused
from medtl_dist.data.processes import in_order, num_cores
from medtl_dist.data.shard_writer import describe_index, sync_folder, write_dataset_file
from medtl_dist.data.shards import (
    DATASET_FILE,
    FORMAT_VERSION,
    INDEX_FIELDS,
    INDEX_FILE,
    SHARD_NAME,
    SPLITS,
    Dataset,
    open_dataset,
)
from medtl_dist.data.sidecars import SPLIT_FIELD, Fields
from medtl_dist.data.sources import Listing, class_order
from medtl_dist.data.split import SPLIT_ALIASES, straddling
from medtl_dist.data.staging import work_folder
from medtl_dist.errors import DataError, LeakageError, UserError

Progress = Callable[[int, int], None]

_SHOWN = 5
_SHOWN_FIELDS = 20
_PREFIX = re.compile(r"[A-Za-z]+")


@dataclass(frozen=True)
class AdoptOptions:
    """The options of ``medtl data index``. Raises: UserError, a value out of range.

    Attributes:
        fields: where label, groups, domain and kept values are (``sidecars.Fields``).
        splits: (split, glob of tar names) pairs; none: by the names' beginning, as ``train-000.tar``.
        positive: class of label 1 of two classes; None: the last in sorted order.
        num_workers: processes; None: one per core this process may use.
        key_file: 64 hexadecimal digits; None: a key of the set's own, in its private folder.
    """

    fields: Fields = field(default_factory=Fields)
    splits: tuple[tuple[str, str], ...] = ()
    positive: str | None = None
    num_workers: int | None = None
    key_file: Path | None = None

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.num_workers < 1:
            raise UserError(f"--workers {self.num_workers}: at least 1 expected")
        own = {name.name for name in INDEX_FIELDS} | {"class"}
        for name in self.fields.keep:
            if name in own or not name:
                raise UserError(f"--keep-field {name}: the index has a column of that name; rename the field")
        if len(set(self.fields.keep)) < len(self.fields.keep):
            raise UserError("--keep-field names a field twice")


def parse_splits(text: str) -> tuple[tuple[str, str], ...]:
    """``"train=a-*.tar,val=b-*.tar"`` as pairs. Raises: UserError, another form or an unknown split."""
    pairs = []
    for part in text.split(","):
        name, equals, glob = part.partition("=")
        if not equals or not glob or name not in SPLITS:
            raise UserError(f"--split {text}: SPLIT=GLOB,… expected, with splits {', '.join(SPLITS)}, as train=a-*.tar")
        pairs.append((name, glob))
    return tuple(pairs)


def adopt(folder: str | Path, options: AdoptOptions | None = None, progress: Progress | None = None) -> Dataset:
    """Index the tars in ``folder`` where they lie and open the set; ``progress(done, total)`` counts tars.

    Raises:
        UserError: no tars, one without a split, already a set, fields that no sample has, fewer than two classes.
        DataError: a tar or sample that cannot be used; all are listed in the private folder.
        LeakageError: a group in more than one split.
    """
    options = options or AdoptOptions()
    path = Path(folder).absolute()
    try:
        tasks = _tasks(path, options)
        with work_folder(path) as work:
            _refuse_mount(path, work)
            _adopt(path, work, tasks, options, progress)
    except OSError as error:
        raise UserError(f"cannot index {folder}: {error.strerror or type(error).__name__}") from None
    return open_dataset(path)


def _refuse_mount(folder: Path, work: Path) -> None:
    """Raises: UserError, before anything is read, where the index could not be moved into ``folder`` in one step."""
    if os.stat(folder).st_dev != os.stat(work).st_dev:
        raise UserError(
            f"{folder} is a disk of its own, on which an index can't appear all at once: move the tars into a folder on it "
            "and index that"
        )


def _tasks(folder: Path, options: AdoptOptions) -> list[Task]:
    """The tars by split and name."""
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}; medtl data index takes a folder of .tar files")
    if (folder / DATASET_FILE).exists():
        raise UserError(f"{folder} has a {DATASET_FILE}: it is a set already; medtl data verify {folder} checks it")
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith((".tar", ".tgz", ".tar.gz")))
    if not names:
        raise UserError(f"{folder} has no .tar files: medtl data pack makes a set from images")
    odd = [name for name in names if not SHARD_NAME.fullmatch(name)]
    if odd:
        raise UserError(
            f"{len(odd)} of {len(names)} tars in {folder} have names that no set can have: letters, digits, '.', '_' "
            "and '-' then .tar expected, not compressed; rename or unpack them"
        )
    splits = {name: _split_of(name, options.splits) for name in names}
    homeless = [name for name in names if splits[name] is None]
    if homeless:
        raise UserError(
            f"{len(homeless)} of {len(names)} tars belong to no split, as {homeless[0]}: name them train-…, val-…, "
            "test-…, or say which with --split train=GLOB,val=GLOB"
        )
    fields = options.fields
    return sorted(
        (Task(str(folder), name, split, fields) for name, split in splits.items() if split),
        key=lambda task: (task.split, task.name),  # the order of the index
    )


def _split_of(name: str, given: Sequence[tuple[str, str]]) -> str | None:
    if not given:
        found = _PREFIX.match(name)
        return SPLIT_ALIASES.get(found.group().lower()) if found else None
    matching = {split for split, glob in given if fnmatch.fnmatchcase(name, glob)}
    if len(matching) > 1:
        raise UserError(f"--split puts {name} into {' and '.join(sorted(matching))}: a tar is in one split")
    return next(iter(matching), None)


def _adopt(folder: Path, work: Path, tasks: list[Task], options: AdoptOptions, progress: Progress | None) -> None:
    private, secret = open_private(private_folder(folder), options.key_file)
    tars = _read_all(tasks, options, progress)
    refused = [(tar.name, bad) for tar in tars for bad in tar.refused]
    write_refused(private, [(tar, bad.number, bad.what, bad.name) for tar, bad in refused])
    _check_fields(tars, options.fields)
    if refused:
        shown = "; ".join(f"{tar}: {bad}" for tar, bad in refused[:_SHOWN])
        more = f"; … and {len(refused) - _SHOWN:,} more" if len(refused) > _SHOWN else ""
        raise DataError(
            f"{len(refused):,} members of the tars in {folder} cannot be used: {shown}{more}. "
            f"{private / REFUSED_FILE} lists and names all; write the tars again without them"
        )
    listing = _listing(tars, options.fields)
    identities = manifests.identify(listing, secret)
    files = [f"{tar.name}/{found.file}" for tar in tars for found in tar.samples]
    write_linkage(
        private, dataclasses.replace(listing, names=files), identities, ["indexed"] * len(listing), list(listing.splits)
    )
    _refuse_leaks(listing, identities)
    # Shares that let nothing be drawn: a tar's samples all are in its split.
    manifest = manifests.build_manifest(listing, identities, positive=options.positive, fractions=(1.0, 0.0, 0.0))
    _write_index(work / INDEX_FILE, tars, manifest)
    info = _describe(tars, manifest, options.fields, work / INDEX_FILE)
    write_dataset_file(work, info)
    os.replace(work / INDEX_FILE, folder / INDEX_FILE)
    os.replace(work / DATASET_FILE, folder / DATASET_FILE)  # last: without it, it is not a set
    sync_folder(folder)


def _read_all(tasks: list[Task], options: AdoptOptions, progress: Progress | None) -> list[ReadTar]:
    tars = []
    for tar in in_order(read_tar, tasks, options.num_workers or num_cores()):
        tars.append(tar)
        if progress:
            progress(len(tars), len(tasks))
    return tars


def _check_fields(tars: list[ReadTar], fields: Fields) -> None:
    """A field that occurs nowhere is a slip of the pen, not damage. Raises: UserError."""
    if not any(tar.names for tar in tars):
        return
    names = list(dict.fromkeys(name for tar in tars for name in tar.names))
    shown = ", ".join(name[:40] for name in names[:_SHOWN_FIELDS] if name.isprintable())
    if fields.label is None and not any(tar.classed for tar in tars):
        raise UserError(
            f"no sample has a .cls member; say which field of .json is the class with --label-field; there are: {shown}"
        )
    missing = sorted(fields.names.difference(*(tar.seen for tar in tars)))
    if missing:
        raise UserError(f"no .json member has a field {missing[0]!r}; the first ones have: {shown}")


def _listing(tars: list[ReadTar], fields: Fields) -> Listing:
    """The samples in the order of the index, as packing lists its sources; named by tar and key."""
    all_found = [(tar, found) for tar in tars for found in tar.samples]
    told = [found.told for _, found in all_found]
    try:
        kept = {name: pa.array([row.kept[i] for row in told]) for i, name in enumerate(fields.keep)}
    except (pa.ArrowException, OverflowError):
        raise UserError("a --keep-field holds text in some samples and numbers in others: one kind expected") from None
    kept = {name: column.cast(pa.string()) if column.type == pa.null() else column for name, column in kept.items()}
    return Listing(
        kind="tars",
        names=[f"{tar.name}/{found.key}" for tar, found in all_found],
        files=[],
        rows=[-1] * len(told),
        labels=[row.label for row in told],
        splits=[tar.split for tar, _ in all_found],
        domains=[row.domain for row in told],
        units={option: [row.units[i] for row in told] for i, option in enumerate(fields.groups)},
        kept=pa.table(kept) if kept else None,
        classes=class_order({row.label for row in told}),
        notes=[f"labels are {'.cls members' if fields.label is None else f'field {fields.label!r} of .json'}"],
        cautions=_cautions(tars),
    )


def _cautions(tars: list[ReadTar]) -> list[str]:
    samples = [found for tar in tars for found in tar.samples]
    dotted = sum(found.dotted for found in samples)
    found = [f"{dotted} images have a name with more than one dot: readers of such tars take the key before the first"]
    remarks = Counter(sample.look.remark for sample in samples if sample.look.remark)
    return (found if dotted else []) + [f"{count} images have {what}" for what, count in sorted(remarks.items())]


def _refuse_leaks(listing: Listing, identities: Identities) -> None:
    leaks = straddling(listing.splits, identities.groups)
    if not leaks:
        return
    pairs = Counter(" and ".join(name for name in SPLITS if name in splits) for splits in leaks.values())
    told = ", ".join(f"{count} in {pair}" for pair, count in sorted(pairs.items()))
    scoped = " ".join(f"--group-field {SPLIT_FIELD}+{option}" for option in listing.units)
    raise LeakageError(
        f"{len(leaks)} of {len(set(identities.groups))} groups ({identities.source}) are in more than one split "
        f"({told}): {', '.join(list(leaks)[:3])}{' …' if len(leaks) > 3 else ''}. If the ids start again in each split, "
        f"they are other patients: {scoped}. If they are the same patients, write the tars again by patient. "
        "linkage.parquet in the private folder names the groups"
    )


def _write_index(path: Path, tars: list[ReadTar], manifest: Manifest) -> None:
    """A row group per tar."""
    kept = manifest.listing.kept
    schema = pa.schema([*INDEX_FIELDS, *(kept.schema if kept is not None else ())])
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True, store_schema=False) as writer:
        start = 0
        for tar in tars:
            stop = start + len(tar.samples)
            columns = {
                "key": manifest.identities.keys[start:stop],
                "sha256": [found.sha256 for found in tar.samples],
                "split": [tar.split] * len(tar.samples),
                "domain": manifest.listing.domains[start:stop],
                "label": manifest.labels[start:stop],
                "group": manifest.identities.groups[start:stop],
                "shard": [tar.name] * len(tar.samples),
                "offset": [found.offset for found in tar.samples],
                "size": [found.size for found in tar.samples],
                "width": [found.look.width for found in tar.samples],
                "height": [found.look.height for found in tar.samples],
                "channels": [found.look.channels for found in tar.samples],
            }
            if kept is not None:
                columns |= {name: kept[name].slice(start, stop - start).combine_chunks() for name in kept.column_names}
            writer.write_table(pa.table(columns, schema=schema), row_group_size=max(1, len(tar.samples)))
            start = stop


def _describe(tars: list[ReadTar], manifest: Manifest, fields: Fields, index: Path) -> dict[str, Any]:
    """What ``dataset.json`` will say."""
    m = manifest
    splits = {split: _split_entry(split, tars, manifest) for split in SPLITS if any(tar.split == split for tar in tars)}
    grey = all(found.look.grey for tar in tars for found in tar.samples)
    return {
        "format_version": FORMAT_VERSION,
        "tool_version": medtl_dist.__version__,
        "task": m.task,
        "classes": list(m.classes),
        "positive_class": m.positive_class,
        "preprocessing": {
            "image_size_px": None,
            "color": "grey" if grey else "rgb",
            "resize": "none",
            "window": None,
            "encoding": "as found",
        },
        "adopted": {
            "label": fields.label,
            "groups": list(fields.groups),
            "domain": fields.domain,
            "keep": list(fields.keep),
        },
        "splits": splits,
        "group_source": m.identities.source,
        "split_source": m.split_source | {"seed": None, "fractions": None},
        "found": len(m.listing),
        "excluded": [],
        "notes": m.notes,
        "cautions": manifests.cautions(m, splits),
        "audit": None,
        "index": describe_index(index),
    }


def _split_entry(split: str, tars: list[ReadTar], manifest: Manifest) -> dict[str, Any]:
    shards, start = [], 0
    groups: set[str] = set()
    for tar in tars:
        rows = range(start, start + len(tar.samples))
        start = rows.stop
        if tar.split != split:
            continue
        groups.update(manifest.identities.groups[rows.start : rows.stop])
        entry = {"name": tar.name, "samples": len(rows), "bytes": tar.length, "sha256": tar.sha256}
        shards.append(entry | _counts(rows, manifest))
    classes = sum((Counter(shard["classes"]) for shard in shards), Counter[str]())
    domains = sum((Counter(shard["domains"]) for shard in shards), Counter[str]())
    return {
        "samples": sum(shard["samples"] for shard in shards),
        "groups": len(groups),
        "classes": {name: classes[name] for name in manifest.classes},
        "domains": dict(sorted(domains.items())),
        "shards": shards,
    }


def _counts(rows: range, manifest: Manifest) -> dict[str, dict[str, int]]:
    labels = Counter(manifest.listing.labels[row] for row in rows)
    domains = Counter(name for row in rows if (name := manifest.listing.domains[row]) is not None)
    return {"classes": dict(sorted(labels.items())), "domains": dict(sorted(domains.items()))}
