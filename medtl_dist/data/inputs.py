"""images without labels ─► entries: what `medtl predict` is asked to score, in an order that never changes.

Files are written to a listing, a row group per part, so that no process holds them all; a shard set has its index. Names
of files are bytes (a name need not be text) and appear in the user's own output, in no message.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from medtl_dist.data import sources
from medtl_dist.data.dicom import is_dicom
from medtl_dist.data.dicom_attributes import check_group_tag
from medtl_dist.data.dicom_headers import Found, Reading, examine_all
from medtl_dist.data.dicom_tags import require_pydicom
from medtl_dist.data.dicom_window import Rendering
from medtl_dist.data.encoding import Picture, open_workers
from medtl_dist.data.partition import Span, parts_of
from medtl_dist.data.shards import DATASET_FILE, Dataset, open_dataset
from medtl_dist.data.sources import IMAGE_SUFFIXES, Columns, detect_format, files_below
from medtl_dist.data.tables import read_rows, relative_name
from medtl_dist.errors import DataError, UserError
from medtl_dist.storage import StorageOptions, is_remote

KINDS = ("auto", "folder", "table", "medmnist", "dicom", "shards")
LISTING_FILE = "inputs.parquet"
_LISTING = pa.schema(
    [
        ("file", pa.binary()),
        ("row", pa.int32()),
        ("group", pa.string()),
        ("refused", pa.string()),
        ("bad", pa.string()),
    ]
)
_MIN_HEADERS_FOR_PROCESSES = 1000


@dataclass(frozen=True)
class InputOptions:
    """``kind``: one of KINDS; ``image_column``, ``image_root``: of a table, as when packing; ``group``: column of a table
    or DICOM keyword, ``A+B`` for a composite; ``allow``: DICOM objects that are left out otherwise; ``num_workers``: to read
    DICOM headers with."""

    kind: str = "auto"
    image_column: str | None = None
    image_root: Path | None = None
    group: str | None = None
    allow: tuple[str, ...] = ()
    num_workers: int = 1


@dataclass(frozen=True)
class Inputs:
    """What is scored; picklable. ``spans``: its parts; ``digest``: changes with the files' names, places and lengths;
    ``grouped``: whether patients are known; ``notes``: choices that the user should know."""

    kind: str
    root: str
    digest: str
    spans: tuple[Span, ...]
    grouped: bool
    listing: str | None = None
    dataset: Dataset | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def num_images(self) -> int:
        return sum(map(len, self.spans))


class Entry(NamedTuple):
    """One file, or one ``row`` (frame) of it; -1: the only one. ``refused``, ``bad``: why there is nothing to score."""

    file: bytes
    row: int = -1
    group: str | None = None
    refused: str | None = None
    bad: str | None = None


def list_inputs(
    source: str | Path,
    options: InputOptions,
    work: Path,
    *,
    rendering: Rendering | None,
    part_size: int,
    storage: StorageOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Inputs:
    """List the images of ``source``; ``work`` is a folder for the listing and for unzipped arrays.

    ``rendering``: how DICOM frames become pixels; None: nobody knows, and a DICOM tree is refused.
    Raises: UserError, nothing there, nothing to score, options of another kind; DataError, damage.
    """
    kind = kind_of(source) if options.kind == "auto" else options.kind
    if kind not in KINDS[1:]:
        raise UserError(f"--format {options.kind}: one of {', '.join(KINDS)} expected")
    _check_options(kind, options, rendering)
    if kind == "shards":
        return _of_set(open_dataset(source, storage), part_size)
    path = Path(source).absolute()
    work.mkdir(parents=True, exist_ok=True)
    others = itertools.count()
    salt = b""
    try:
        if kind == "folder":
            root, entries = _of_folder(path, others)
        elif kind == "table":
            root, entries = _of_table(path, options)
        elif kind == "dicom":
            assert rendering is not None
            root, entries = _of_dicom(path, options, rendering, others, progress)
        else:
            root = work / "arrays"
            entries, salt = _of_archive(path, root)
        target = work / LISTING_FILE
        count, digest = _write_listing(target, root, entries, part_size, salt)
    except OSError as error:
        raise UserError(f"cannot list {path}: {error.strerror or type(error).__name__}") from None
    num_others = next(others)
    if count == 0:
        raise UserError(
            f"{path} holds no image to score ({num_others} other files): a folder, table or set of images expected"
        )
    notes = (f"{num_others} files that are no image were left alone",) if num_others else ()
    spans = tuple(parts_of([count], part_size))
    return Inputs(kind, str(root), digest, spans, options.group is not None, str(target), None, notes)


def kind_of(source: str | Path) -> str:
    """What ``source`` is, as ``sources.detect_format`` tells, or ``shards``; a single image or DICOM file counts as a
    folder or tree of one. Raises: UserError, nothing there."""
    if is_remote(source):
        return "shards"
    path = Path(source)
    if path.is_dir() and (path / DATASET_FILE).is_file():
        return "shards"
    if path.is_file() and path.suffix.lower() not in sources.TABLE_SUFFIXES | {".npz"}:
        try:
            return "dicom" if is_dicom(path) else "folder"
        except OSError:
            return "folder"  # whoever reads it will say so
    return detect_format(path)


def read_entries(inputs: Inputs, number: int) -> list[Entry]:
    """The entries of a part of listed files. Raises: DataError, the listing is gone or damaged."""
    assert inputs.listing is not None
    try:
        with pq.ParquetFile(inputs.listing) as file:
            rows = file.read_row_group(number).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{inputs.listing}: the list of inputs can't be read ({type(error).__name__})") from None
    return [Entry(**row) for row in rows]


def picture_of(inputs: Inputs, entry: Entry) -> Picture:
    """Where an entry's pixels are."""
    return Picture(os.path.join(inputs.root, os.fsdecode(entry.file)), entry.row)


def shown_name(file: bytes) -> str:
    """A file's name as text; bytes that are none as ``\\xNN``."""
    return file.decode("utf-8", "backslashreplace")


def _check_options(kind: str, options: InputOptions, rendering: Rendering | None) -> None:
    if kind != "table" and (options.image_column or options.image_root):
        raise UserError("--image-col and --image-root are for a table of images")
    if kind not in ("table", "dicom") and options.group:
        raise UserError(
            f"--group-col {options.group}: a {kind} names no patients in columns; give a table or a DICOM tree"
        )
    if kind != "dicom" and options.allow:
        raise UserError(f"--allow {','.join(options.allow)} is for DICOM trees")
    if kind == "dicom" and rendering is None:
        raise UserError(
            "the run was trained on image files, so its checkpoint says nothing of how DICOM becomes pixels: say it with "
            "--window tags, percentile or LO,HI; numbers of another window than the training images' mean little"
        )


def _of_set(dataset: Dataset, part_size: int) -> Inputs:
    counts = [sum(shard.samples for shard in dataset.shards(split)) for split in dataset.splits]
    spans = tuple(parts_of(counts, part_size))
    return Inputs("shards", dataset.folder, dataset.sha256, spans, dataset.group_source != "none", None, dataset)


def _of_folder(path: Path, others: Iterator[int]) -> tuple[Path, Iterator[Entry]]:
    if path.is_file():
        return path.parent, iter([Entry(os.fsencode(path.name))])
    if not path.is_dir():
        raise UserError(f"no such file or folder: {path}")

    def entries() -> Iterator[Entry]:
        for name in files_below(path):
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                yield Entry(os.fsencode(name))
            else:
                next(others)

    return path, entries()


def _of_table(path: Path, options: InputOptions) -> tuple[Path, Iterator[Entry]]:
    groups = (options.group,) if options.group else ()
    rows = read_rows(path, Columns(image=options.image_column, group=groups), needs_label=False)
    root = (options.image_root or path.parent).absolute()
    names = (os.fsencode(relative_name(image, root)) for image in rows.images)
    if options.group is None:
        return root, (Entry(name) for name in names)
    units = rows.units[options.group]
    return root, (Entry(name, group="+".join(unit or ())) for name, unit in zip(names, units, strict=True))


def _of_dicom(
    path: Path,
    options: InputOptions,
    rendering: Rendering,
    others: Iterator[int],
    progress: Callable[[int, int], None] | None,
) -> tuple[Path, Iterator[Entry]]:
    require_pydicom()
    keywords = tuple(options.group.split("+")) if options.group else ()
    for keyword in keywords:
        check_group_tag(keyword, "--group-col")
    if path.is_file():
        root, names = path.parent, [path.name]
    elif path.is_dir():
        root, names = path, list(files_below(path))
    else:
        raise UserError(f"no such file or folder: {path}")
    reading = Reading(keywords, rendering, options.allow)

    def entries() -> Generator[Entry]:
        with open_workers(options.num_workers, len(names), _MIN_HEADERS_FOR_PROCESSES) as workers:
            files = ((str(root / name), name) for name in names)
            for done, found in enumerate(workers.ordered(partial(examine_all, reading=reading), files, 64), 1):
                if found is None:
                    next(others)
                else:
                    yield from _frames(found, bool(keywords))
                if progress is not None:
                    progress(done, len(names))

    return root, entries()


def _frames(found: Found, grouped: bool) -> Iterator[Entry]:
    name, group = os.fsencode(found.name), "+".join(found.values) if grouped else None
    for frame in found.frames if found.usable else (-1,):
        yield Entry(name, frame, group, found.refused or None, found.bad or None)


def _of_archive(path: Path, scratch: Path) -> tuple[Iterator[Entry], bytes]:
    """Every image of the archive's splits, the arrays unzipped into ``scratch`` anew; and the archive's checksums."""
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    shutil.rmtree(scratch, ignore_errors=True)
    counts: dict[str, int] = {}
    checksums = b""
    try:
        with zipfile.ZipFile(path) as archive:
            for split in ("train", "val", "test"):
                member = f"{split}_images.npy"
                if member in archive.namelist():
                    images = sources._unzip_array(archive, member, scratch, path)
                    sources._check_medmnist_images(images, len(images), split, path)
                    counts[member] = len(images)
                    checksums += struct.pack("<I", archive.getinfo(member).CRC)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path} is damaged ({error}): download it again") from None
    if not counts:
        raise UserError(f"{path} is not a MedMNIST archive: it has no train_images, val_images or test_images")
    entries = (Entry(member.encode(), row) for member, count in counts.items() for row in range(count))
    return entries, checksums


def _write_listing(target: Path, root: Path, entries: Iterable[Entry], part_size: int, salt: bytes) -> tuple[int, str]:
    """The number of entries and a digest of their names, places and lengths (and of ``salt``); a row group per part."""
    digest, count = hashlib.sha256(salt), 0
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    rest = iter(entries)
    with pq.ParquetWriter(temporary, _LISTING) as writer:
        while chunk := list(itertools.islice(rest, part_size)):
            for entry in chunk:
                said = "\0".join(str(value) for value in entry[1:])
                length = _length(os.path.join(root, os.fsdecode(entry.file)))
                digest.update(entry.file + f"\0{said}\0{length}\n".encode())
            columns = {
                name: list(values) for name, values in zip(_LISTING.names, zip(*chunk, strict=True), strict=True)
            }
            writer.write_table(pa.table(columns, schema=_LISTING), row_group_size=part_size)
            count += len(chunk)
    os.replace(temporary, target)
    return count, digest.hexdigest()


def _length(path: str) -> int:
    """A file's bytes; -1: there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
