"""images ─► manifest: what a folder, a table or a MedMNIST archive holds, one entry per image, before any choice.

A source is read into columns of text; nothing here decodes an image (tables: ``tables.py``, DICOM:
``dicom_source.py``). Names of files and patients stay inside the ``Listing``: messages name columns, classes and
counts, never a value that could be a patient's.
"""

from __future__ import annotations

import itertools
import os
import posixpath
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from medtl_dist.data.dicom import is_dicom
from medtl_dist.data.label_sets import LabelSets, as_texts
from medtl_dist.data.split import SPLIT_ALIASES
from medtl_dist.errors import DataError, UserError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".pgm", ".ppm", ".pnm", ".jp2")
)
TABLE_SUFFIXES = frozenset((".csv", ".tsv", ".txt", ".parquet", ".pq"))
FORMATS = ("auto", "folder", "table", "medmnist", "dicom")
# So many files of a folder are looked at to tell DICOM from images.
_LOOKED_AT = 64
# Left by operating systems and archivers, never by the owner of the images.
_CLUTTER = frozenset(("__MACOSX", "lost+found", "Thumbs.db", "desktop.ini"))


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what; None lets the usual names be tried (``read_table``).

    Label sets (``label_sets``): ``labels``, a column per class; or ``label_separator`` between the classes that the one
    label column names, and ``negative``, what it says for none of them.
    """

    image: str | None = None
    label: str | None = None
    group: tuple[str, ...] = ()
    split: str | None = None
    domain: str | None = None
    keep: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    label_separator: str | None = None
    negative: str | None = None

    @property
    def any_named(self) -> bool:
        named = (self.image, self.label, self.group, self.split, self.domain, self.keep, self.negative)
        return any(named) or self.several_labels

    @property
    def several_labels(self) -> bool:
        """Whether an image has a label set rather than one label."""
        return bool(self.labels) or self.label_separator is not None


@dataclass(frozen=True)
class Listing:
    """A source as columns, all of the length of ``names``; entries in no promised order.

    ``names``: relative posix path of the file (its identity, with ``rows``); ``files``: the path to open;
    ``rows``: position within the file, -1 for a file of one image; ``labels``: class name, "" where there is none;
    ``splits``: ``train | val | test`` or None; ``units``: per ``--group-col`` a column of tuples of texts, None where
    empty; ``listed``: row of the table, for the linkage; ``classes``: every class the source declares, in order of
    label; ``notes``: choices that were made for the user; ``cautions``: what the user should know; ``refused``: entry to
    the reason it is left out whatever the options; ``bad``: entry to the reason it cannot be read, known before its
    pixels are; ``label_sets``: int8 [n, classes] where an image may have several labels (``labels`` then only tells rows
    apart), else None; ``counted``: facts of the images that ``dataset.json`` counts by class, each of the length of ``names``.
    """

    kind: str
    names: list[str]
    files: list[str]
    rows: list[int]
    labels: list[str]
    splits: list[str | None]
    domains: list[str | None]
    units: dict[str, list[tuple[str, ...] | None]]
    kept: pa.Table | None
    classes: list[str]
    notes: list[str] = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)
    counted: dict[str, list[str]] = field(default_factory=dict)
    label_sets: LabelSets | None = None

    def __len__(self) -> int:
        return len(self.names)


def detect_format(source: Path) -> str:
    """``folder | table | medmnist | dicom`` by what ``source`` is; a folder is ``dicom`` if most of its first files are.

    Raises: UserError, nothing there, or of no known kind.
    """
    if source.is_dir():
        return "dicom" if _holds_dicom(source) else "folder"
    if not source.exists():
        raise UserError(f"no such file or folder: {source}")
    if source.suffix.lower() in TABLE_SUFFIXES:
        return "table"
    if source.suffix.lower() == ".npz":
        return "medmnist"
    raise UserError(
        f"{source} is none of: a folder of images, a table (.csv, .tsv, .parquet), a MedMNIST archive (.npz); "
        f"--format {'|'.join(FORMATS[1:])} says what it is"
    )


def _holds_dicom(source: Path) -> bool:
    dicom = images = 0
    for name in itertools.islice(files_below(source), _LOOKED_AT):
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
            images += 1
        else:
            try:
                dicom += is_dicom(source / name)
            except OSError:  # whoever reads it will say so
                continue
    return dicom > images


def class_order(classes: set[str]) -> list[str]:
    """Class names sorted; by value where all are whole numbers (2 before 10)."""
    if all(name.lstrip("-").isascii() and name.lstrip("-").isdigit() for name in classes):
        return sorted(classes, key=lambda name: (int(name), name))
    return sorted(classes)


def read_folder(source: Path) -> Listing:
    """An ``ImageFolder`` tree: ``class/…/image`` or ``split/class/…/image`` (a folder named train, or nothing but
    folders named as splits, on top). Links are followed.

    Raises: UserError, no images, files beside the folders of classes only, or a class folder without any image.
    """
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; --format folder reads class/image trees")
    top = _subfolders(source)
    lowered = {name: SPLIT_ALIASES.get(name.lower()) for name in top}
    has_splits = "train" in lowered.values() or (bool(top) and all(lowered.values()))
    if has_splits and not all(lowered.values()):
        others = ", ".join(sorted(name for name, split in lowered.items() if split is None))
        raise UserError(f"{source} has train beside {others}: move what is neither train, val nor test elsewhere")
    if has_splits and len(set(lowered.values())) < len(top):
        raise UserError(f"{source} has two folders for one split ({', '.join(sorted(top))}): merge or move one")

    names: list[str] = []
    labels: list[str] = []
    splits: list[str | None] = []
    classes: set[str] = set()
    other_files = 0
    for split_folder in sorted(top) if has_splits else [""]:
        for label in _subfolders(source / split_folder):
            classes.add(label)
            images, others = _images_below(source / split_folder / label)
            other_files += others
            names += [posixpath.join(split_folder, label, image) for image in images]
            labels += [label] * len(images)
            splits += [lowered[split_folder] if has_splits else None] * len(images)
    if not names:
        raise UserError(
            f"{source} holds no images in class folders: expected class/image.png or train/class/image.png "
            f"({_table_hint(source) or 'a table of files is packed by naming the table'})"
        )
    empty = classes - set(labels)
    if empty:
        raise UserError(
            f"class {', '.join(map(repr, sorted(empty)))} of {source} has no image: add images or remove the folder"
        )
    if len(classes) < 2 and (hint := _table_hint(source)):
        raise UserError(f"{source} has one class folder only ({next(iter(classes))}); {hint}")
    cautions = [f"{other_files} files without an image's extension were left alone"] if other_files else []
    return Listing(
        kind="folder",
        names=names,
        files=[str(source / name) for name in names],
        rows=[-1] * len(names),
        labels=labels,
        splits=splits,
        domains=[None] * len(names),
        units={},
        kept=None,
        classes=class_order(classes),
        cautions=cautions,
    )


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(".") and e.name not in _CLUTTER)


def _images_below(folder: Path) -> tuple[list[str], int]:
    """Relative posix paths of the images at any depth, sorted, and the number of other files."""
    images: list[str] = []
    others = 0
    for name in files_below(folder):
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
            images.append(name)
        else:
            others += 1
    return sorted(images), others


def files_below(folder: Path) -> Iterator[str]:
    """Relative posix paths of the files at any depth, clutter left out, links followed; folders in sorted order."""
    visited: set[str] = set()  # a link to a parent folder must not send us round for ever
    for root, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _CLUTTER)
        for name in sorted(files):
            if not name.startswith(".") and name not in _CLUTTER:
                yield Path(os.path.relpath(os.path.join(root, name), folder)).as_posix()


def _raise(error: OSError) -> None:
    raise error  # os.walk would leave out what it cannot read


def _table_hint(source: Path) -> str:
    tables = sorted(p.name for p in source.iterdir() if p.suffix.lower() in TABLE_SUFFIXES - {".txt"})
    return f"it has a table: medtl data pack {source / tables[0]}" if tables else ""


def read_medmnist(source: Path, scratch: Path) -> Listing:
    """A MedMNIST archive: ``{train,val,test}_images`` uint8 [n, h, w] or [n, h, w, 3] and ``_labels`` integers [n, 1],
    or of several labels an image 0 and 1 [n, classes].

    The arrays are unzipped into ``scratch`` one after the other and later mapped, never loaded: memory stays bounded.
    Nothing is unpickled. The official splits are kept; there are no patients.

    Raises: UserError, another kind of archive; DataError, a damaged one.
    """
    if not source.is_file():
        raise UserError(f"no such file: {source}")
    names: list[str] = []
    files: list[str] = []
    rows: list[int] = []
    labels: list[np.ndarray] = []
    splits: list[str | None] = []
    try:
        with zipfile.ZipFile(source) as archive:
            members = set(archive.namelist())
            present = [split for split in ("train", "val", "test") if f"{split}_images.npy" in members]
            if not present:
                raise UserError(
                    f"{source} is not a MedMNIST archive: it has no train_images; it holds: "
                    f"{', '.join(sorted(name.removesuffix('.npy') for name in members)[:8]) or 'nothing'}"
                )
            for split in present:
                images = _unzip_array(archive, f"{split}_images.npy", scratch, source)
                classes = _medmnist_labels(archive, split, scratch, source)
                _check_medmnist_images(images, len(classes), split, source)
                if labels and labels[0].shape[1] != classes.shape[1]:
                    raise DataError(f"{source}: {split} has another number of labels than train: download it again")
                names += [source.name] * len(classes)
                files += [str(scratch / f"{split}_images.npy")] * len(classes)
                rows += range(len(classes))
                labels.append(classes)
                splits += [split] * len(classes)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{source} is damaged ({error}): download it again") from None
    columns = np.concatenate(labels)
    several = columns.shape[1] > 1
    texts = as_texts(columns.astype(np.int8)) if several else [str(int(label)) for label in columns[:, 0]]
    return Listing(
        kind="medmnist",
        names=names,
        files=files,
        rows=rows,
        labels=texts,
        splits=splits,
        domains=[None] * len(names),
        units={},
        kept=None,
        classes=[str(number) for number in range(columns.shape[1])] if several else class_order(set(texts)),
        label_sets=columns.astype(np.int8) if several else None,
    )


def _unzip_array(archive: zipfile.ZipFile, member: str, scratch: Path, source: Path) -> np.ndarray:
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        path = Path(archive.extract(member, scratch))
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except KeyError:
        raise UserError(f"{source} is not a MedMNIST archive: it has no {member.removesuffix('.npy')}") from None
    except ValueError:
        raise UserError(
            f"{source}: {member.removesuffix('.npy')} is not a plain array (objects are never unpickled): "
            "use the official MedMNIST file"
        ) from None


def _medmnist_labels(archive: zipfile.ZipFile, split: str, scratch: Path, source: Path) -> np.ndarray:
    """Integers [n, 1], or 0 and 1 [n, classes]."""
    labels = _unzip_array(archive, f"{split}_labels.npy", scratch, source)
    if labels.ndim not in (1, 2) or labels.shape[1:] == (0,) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{source}: {split}_labels has shape {labels.shape}, {labels.dtype}; integers [n, 1] expected")
    labels = labels.reshape(len(labels), -1)
    if labels.shape[1] > 1 and not np.isin(labels, (0, 1)).all():
        raise UserError(
            f"{source}: {split}_labels has {labels.shape[1]} labels per image, and not only 0 and 1 among them"
        )
    return labels


def _check_medmnist_images(images: np.ndarray, num_labels: int, split: str, source: Path) -> None:
    flat = images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)
    if not flat or images.dtype != np.uint8:
        raise UserError(
            f"{source}: {split}_images has shape {images.shape}, {images.dtype}; uint8 [n, h, w] or [n, h, w, 3] "
            "expected (3D sets cannot be packed)"
        )
    if len(images) != num_labels:
        raise DataError(f"{source}: {len(images)} {split} images but {num_labels} labels: download it again")
