"""images ─► manifest ─► shards: ``medtl data pack`` as a library.

    pack("xrays/", "sets/xrays", PackOptions(image_size_px=256, color="grey"))

One pass over the images. Whether ``--color keep`` means grey or RGB is guessed from the first 256 images and checked on
every one; should a later image turn out to be in colour, the pass starts again in RGB. Images are stored as JPEG of
quality 95, sets of at most 64 px a side as PNG (lossless).
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

import medtl_dist
from medtl_dist.data import manifest as manifests
from medtl_dist.data.audit import audit
from medtl_dist.data.dicom_source import DicomOptions, read_dicom_tree
from medtl_dist.data.encoding import Coloured, Failure, Picture, Recipe, Stored, Workers, open_workers
from medtl_dist.data.images import EXTENSION, Encoding
from medtl_dist.data.manifest import Manifest
from medtl_dist.data.private import (
    LINKAGE_FILE,
    PROBLEMS_FILE,
    open_private,
    private_folder,
    write_linkage,
    write_problems,
)
from medtl_dist.data.shard_writer import Facts, SetWriter, sync_folder, write_dataset_file
from medtl_dist.data.shards import FORMAT_VERSION, SPLITS, Dataset, open_dataset
from medtl_dist.data.sources import FORMATS, Columns, Listing, detect_format, read_folder, read_medmnist
from medtl_dist.data.staging import check_destination, work_folder
from medtl_dist.data.tables import read_table
from medtl_dist.data.upload import staged_upload
from medtl_dist.errors import DataError, UserError
from medtl_dist.storage import is_remote, parse_place

COLORS = ("keep", "grey", "rgb")
# A set is stored lossless when its images are no larger than this: JPEG would cost a thumbnail more than it saves.
MAX_PNG_PX = 64
_PROBED = 256
_KEPT_ROWS = 1000

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PackOptions:
    """The options of ``medtl data pack``. Raises: UserError, a value out of range.

    Attributes:
        format: ``auto | folder | table | medmnist | dicom``.
        columns: of a table (``sources.Columns``).
        dicom: of a DICOM tree (``dicom_source.DicomOptions``).
        image_root: folder that a table's paths are relative to; None: the table's own.
        positive: class of label 1 of two classes; None: the last in sorted order.
        fractions: shares of train, val, test, where splits have to be drawn.
        image_size_px: short side stored, aspect kept, smaller images left as they are; None: native size.
        color: ``grey``, ``rgb``, or ``keep``: grey if every image is grey, RGB files with equal channels included.
        seed: of the splits and of the packing order.
        num_workers: processes; None: one per core this process may use.
        skip_bad: leave out, and count, missing and unreadable images instead of failing at the first.
        key_file: 64 hexadecimal digits; None: a key of the set's own, in its private folder.
        private: folder of key and linkage, never in a store; None: DEST.private (of a store's DEST: in the current one).
        staging: where a set for a store is packed first; None: in the current folder.
    """

    format: str = "auto"
    columns: Columns = field(default_factory=Columns)
    dicom: DicomOptions = field(default_factory=DicomOptions)
    image_root: Path | None = None
    positive: str | None = None
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15)
    image_size_px: int | None = None
    color: str = "keep"
    seed: int = 0
    num_workers: int | None = None
    skip_bad: bool = False
    key_file: Path | None = None
    private: Path | None = None
    staging: Path | None = None

    def __post_init__(self) -> None:
        for option, value, allowed in (("--format", self.format, FORMATS), ("--color", self.color, COLORS)):
            if value not in allowed:
                raise UserError(f"{option} {value}: one of {', '.join(allowed)} expected")
        if self.image_size_px is not None and not 8 <= self.image_size_px <= 8192:
            raise UserError(f"--image-size {self.image_size_px}: 8 to 8192 px expected")
        if self.num_workers is not None and self.num_workers < 1:
            raise UserError(f"--workers {self.num_workers}: at least 1 expected")


def pack(
    source: str | Path, out: str | Path, options: PackOptions | None = None, progress: Progress | None = None
) -> Dataset:
    """Pack the images of ``source`` into a new shard set at ``out`` and open it.

    ``progress(done, total)`` is called as images are written, then as the audit reads and compares. ``out`` appears
    complete or not at all. Where it is an address (s3, gs) the set is packed on local disk and then put there.

    Raises:
        UserError: options, table or folder that cannot be packed; ``out`` not empty or being packed to.
        DataError: a missing or unreadable image (unless ``skip_bad``), a damaged source.
        LeakageError: a group in more than one given split.
        Interrupted: the store can't be reached.
    """
    options = options or PackOptions()
    if is_remote(out):
        options = dataclasses.replace(options, private=private_of(out, options))
        with staged_upload(str(out), options.staging, progress=progress) as dest:
            pack(source, dest, options, progress)
        return open_dataset(out)
    source, dest = Path(source), Path(parse_place(out).url)
    if options.private is not None and options.private.resolve().is_relative_to(dest.resolve()):
        raise UserError(f"--private {options.private} lies inside --out: it names patients, so name a folder elsewhere")
    kind = detect_format(source) if options.format == "auto" else options.format
    if kind not in ("table", "dicom") and (options.columns.any_named or options.image_root):
        raise UserError(f"{source} is packed as a {kind}, which has no columns: columns are named for tables only")
    if kind != "dicom" and options.dicom.any_named:
        raise UserError(
            f"{source} is packed as a {kind}: tags, --table, --window, --frames and --allow are for DICOM trees"
        )
    if kind in ("folder", "dicom") and dest.resolve().is_relative_to(source.resolve()):
        raise UserError(f"--out {dest} lies inside the folder that is packed: name a folder elsewhere")
    try:
        with work_folder(dest) as work:
            check_destination(dest)
            listing = _read(source, kind, options, work / "arrays", progress)
            _pack_listing(listing, dest, work, options, progress)
            sync_folder(dest.parent)
    except OSError as error:
        # Reading is caught where it happens, so this is about writing. No file name: it could be a patient's.
        raise UserError(f"cannot write the set at {dest}: {error.strerror or type(error).__name__}") from None
    return open_dataset(dest)


def private_of(out: str | Path, options: PackOptions) -> Path:
    """The folder of key and linkage of a set packed to ``out``: always of this machine."""
    place = parse_place(out)
    dest = Path.cwd() / place.name if place.remote else Path(place.url)
    return private_folder(dest) if options.private is None else options.private.absolute()


def _read(source: Path, kind: str, options: PackOptions, scratch: Path, progress: Progress | None) -> Listing:
    try:
        if kind == "dicom":
            return read_dicom_tree(
                source,
                options.columns,
                options.dicom,
                image_root=options.image_root,
                num_workers=options.num_workers or _num_cores(),
                progress=progress,
            )
        if kind == "folder":
            return read_folder(source)
        if kind == "table":
            return read_table(source, options.columns, options.image_root)
        return read_medmnist(source, scratch)
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror or type(error).__name__}") from None


def _pack_listing(listing: Listing, dest: Path, work: Path, options: PackOptions, progress: Progress | None) -> None:
    private, secret = open_private(options.private or private_folder(dest), options.key_file)
    identities = manifests.identify(listing, secret)
    # The linkage comes first, so that every key in a message can be looked up, however this ends.
    write_linkage(private, listing, identities, ["not packed"] * len(listing), list(listing.splits))
    missing = _missing_files(listing) | listing.bad
    write_problems(private, listing, identities, missing)
    if missing and not options.skip_bad:
        example = min(missing, key=lambda row: identities.keys[row])
        what = "missing" if not listing.bad else f"missing or damaged ({missing[example]})"
        raise DataError(
            f"{len(missing)} of {len(listing)} image files are {what} (for example key {identities.keys[example].hex()}); "
            f"they are named in {private / PROBLEMS_FILE}; put them in place, or leave them out with --skip-bad"
        )
    manifest = manifests.build_manifest(
        listing,
        identities,
        missing=missing,
        positive=options.positive,
        fractions=options.fractions,
        seed=options.seed,
        split_column=options.columns.split,
    )
    packing = _Packing(manifest, work / "set", private, options.skip_bad, progress)
    with open_workers(options.num_workers or _num_cores(), sum(map(len, manifest.order.values()))) as workers:
        info = packing.run(workers, options)
    status = [packing.excluded.get(row, "packed") for row in range(len(listing))]
    write_linkage(private, listing, identities, status, manifest.splits)
    write_problems(private, listing, identities, missing | packing.problems)
    write_dataset_file(work / "set", info)
    # A set that leaks is finished all the same, so that --fix and --accept have something to start from.
    auditing = None if progress is None else lambda stage, done, total: progress(done, total)
    found = audit(open_dataset(work / "set"), num_workers=options.num_workers, progress=auditing)
    write_dataset_file(work / "set", info | {"audit": found.summary})
    os.rename(work / "set", dest)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _missing_files(listing: Listing) -> dict[int, str]:
    if listing.kind != "table":
        return {}
    return {row: "missing file" for row, file in enumerate(listing.files) if not os.path.isfile(file)}


class _ColourFound(Exception):
    def __init__(self, key: bytes) -> None:
        super().__init__(key.hex())


class _Packing:
    """One pack's passes over the images: what was written, and what was left out."""

    def __init__(
        self, manifest: Manifest, folder: Path, private: Path, skip_bad: bool, progress: Progress | None
    ) -> None:
        self._manifest = manifest
        self._folder = folder
        self._private = private
        self._skip_bad = skip_bad
        self._progress = progress or (lambda done, total: None)
        self.problems: dict[int, str] = {}
        self._notes = list(manifest.notes)

    @property
    def excluded(self) -> dict[int, str]:
        """Entry to reason: left out before, or found bad in the pass."""
        return self._manifest.excluded | self.problems

    def run(self, workers: Workers, options: PackOptions) -> dict[str, Any]:
        """Write the shards and the index into a fresh folder; returns what ``dataset.json`` will say."""
        recipe = self._first_recipe(workers, options)
        try:
            written = self._write(workers, recipe)
        except _ColourFound as found:
            self._notes.append(f"stored in RGB: image {found} is in colour (--color grey converts)")
            recipe = dataclasses.replace(recipe, channels=3, only_grey=False)
            written = self._write(workers, recipe)
        return self._describe(written, recipe, options)

    def _pictures(self, rows: list[int]) -> Iterator[Picture]:
        listing = self._manifest.listing
        return (Picture(listing.files[row], listing.rows[row]) for row in rows)

    def _first_recipe(self, workers: Workers, options: PackOptions) -> Recipe:
        size = options.image_size_px
        small = size is not None and size <= MAX_PNG_PX
        encoding: Encoding = "png" if small else "jpeg95"
        rendering = options.dicom.rendering if self._manifest.listing.kind == "dicom" else None
        channels = 3 if options.color == "rgb" else 1
        recipe = Recipe(size, channels, only_grey=False, encoding=encoding, rendering=rendering)
        if options.color != "keep" and size is not None:
            return recipe
        rows = [row for order in self._manifest.order.values() for row in order]
        rows = sorted(rows, key=lambda row: self._manifest.identities.keys[row])[:_PROBED]
        looks = [
            (row, seen) for row, seen in zip(rows, workers.look(self._pictures(rows), recipe), strict=True) if seen
        ]
        if size is None and looks and all(seen.short_side_px <= MAX_PNG_PX for _, seen in looks):
            recipe = dataclasses.replace(recipe, encoding="png")
        if options.color == "keep":
            grey = all(seen.grey for _, seen in looks)
            if not grey:
                key = next(self._manifest.identities.keys[row] for row, seen in looks if not seen.grey).hex()
                self._notes.append(f"stored in RGB: image {key} is in colour (--color grey converts)")
            recipe = dataclasses.replace(recipe, channels=1 if grey else 3, only_grey=grey)
        return recipe

    def _write(self, workers: Workers, recipe: Recipe) -> dict[str, Any]:
        """One pass: ``{"splits": …, "index": …}``. Raises: _ColourFound, DataError."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        self.problems = {}
        kept = self._manifest.listing.kept
        kept_schema = pa.schema([]) if kept is None else kept.schema.remove_metadata()
        writer = SetWriter(self._folder, kept_schema, EXTENSION[recipe.encoding])
        try:
            splits = {}
            done = 0
            total = sum(map(len, self._manifest.order.values()))
            for split in sorted(self._manifest.order):
                rows = self._manifest.order[split]
                counts = _Counts(self._manifest.classes)
                writer.begin_split(split, len(rows))
                with closing(workers.store(self._pictures(rows), recipe)) as results:
                    for row, result, facts in zip(rows, results, self._facts(rows), strict=True):
                        if isinstance(result, Stored):
                            writer.add(facts, result)
                            counts.add(facts)
                        else:
                            self._refuse(row, result)
                        done += 1
                        self._progress(done, total)
                shards = writer.end_split()
                if shards:
                    splits[split] = counts.as_dict() | {"shards": shards}
            return {"splits": splits, "index": writer.finish()}
        except BaseException:
            writer.abandon()
            raise

    def _refuse(self, row: int, result: Failure | Coloured) -> None:
        identities, listing = self._manifest.identities, self._manifest.listing
        if isinstance(result, Coloured):
            raise _ColourFound(identities.keys[row])
        self.problems[row] = result.reason
        if self._skip_bad:
            return
        write_problems(self._private, listing, identities, self.problems)
        raise DataError(
            f"image {identities.keys[row].hex()} cannot be packed: {result.reason}; its file is named in "
            f"{self._private / PROBLEMS_FILE}; mend it, or leave such images out with --skip-bad"
        )

    def _facts(self, rows: list[int]) -> Iterator[Facts]:
        m, listing = self._manifest, self._manifest.listing
        for start in range(0, len(rows), _KEPT_ROWS):
            some = rows[start : start + _KEPT_ROWS]
            kept: list[dict[str, Any]] = [{}] * len(some)
            if listing.kept is not None:
                kept = listing.kept.take(pa.array(some, pa.int64())).to_pylist()
            for row, values in zip(some, kept, strict=True):
                key, group = m.identities.keys[row], m.identities.groups[row]
                yield Facts(key, group, int(m.labels[row]), listing.labels[row], listing.domains[row], values)

    def _describe(self, written: dict[str, Any], recipe: Recipe, options: PackOptions) -> dict[str, Any]:
        m = self._manifest
        splits = {name: written["splits"][name] for name in SPLITS if name in written["splits"]}
        present = {label for entry in splits.values() for label, count in entry["classes"].items() if count}
        if len(present) < 2:
            raise DataError(
                f"{len(self.problems)} images cannot be packed, and fewer than two classes are left; the images are "
                f"named in {self._private / LINKAGE_FILE}"
            )
        return {
            "format_version": FORMAT_VERSION,
            "tool_version": medtl_dist.__version__,
            "task": m.task,
            "classes": list(m.classes),
            "positive_class": m.positive_class,
            "preprocessing": {
                "image_size_px": recipe.image_size_px,
                "color": "grey" if recipe.channels == 1 else "rgb",
                "resize": "none" if recipe.image_size_px is None else "short_side_area",
                "window": None if recipe.rendering is None else recipe.rendering.as_json(),
                "encoding": recipe.encoding,
            },
            "splits": splits,
            "group_source": m.identities.source,
            "split_source": m.split_source,
            "found": len(m.listing),
            "excluded": manifests.exclusion_counts(m, self.excluded),
            "counted": manifests.fact_counts(m, self.excluded),
            "notes": self._notes,
            "cautions": manifests.cautions(m, splits, self.excluded),
            "audit": None,
            "index": written["index"],
        }


class _Counts:
    """A split's counts for ``dataset.json``, taken from what was really written."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        self._classes = classes
        self._labels: Counter[str] = Counter()
        self._domains: defaultdict[str, int] = defaultdict(int)
        self._groups: set[str] = set()

    def add(self, facts: Facts) -> None:
        self._labels[facts.class_name] += 1
        self._groups.add(facts.group)
        if facts.domain is not None:
            self._domains[facts.domain] += 1

    def as_dict(self) -> dict[str, Any]:
        return {
            "samples": self._labels.total(),
            "groups": len(self._groups),
            "classes": {name: self._labels[name] for name in self._classes},
            "domains": dict(sorted(self._domains.items())),
        }
