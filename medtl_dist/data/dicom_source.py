"""DICOM tree ─► listing: headers read, what is no image left out and counted, labels and patients joined on.

Files are known by their content, not their name. What a header says stays in the ``Listing`` (and so in the private
folder) unless a tag is asked for by its keyword and may be kept (``dicom_attributes``).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from medtl_dist.data import dicom_attributes as attributes
from medtl_dist.data.dicom_headers import ALLOWABLE, Found, Reading, examine_all
from medtl_dist.data.dicom_join import default_join, join_table
from medtl_dist.data.dicom_listing import WINDOW_COLUMN, Headers, list_images
from medtl_dist.data.dicom_tags import require_pydicom
from medtl_dist.data.dicom_window import Rendering
from medtl_dist.data.encoding import open_workers
from medtl_dist.data.sources import Columns, Listing, files_below
from medtl_dist.errors import UserError

# Starting processes takes as long as reading so many headers.
_MIN_FOR_PROCESSES = 1000


@dataclass(frozen=True)
class DicomOptions:
    """The options of ``medtl data pack`` for DICOM trees. Raises: UserError, a value out of range.

    Attributes:
        rendering: window and frames.
        table: of labels and more, joined on; its columns are named by ``Columns``.
        join_on: keyword of a tag, or ``file``; None: by the table's columns.
        label_tag: classes, instead of a table's.
        group_tags: patients: keywords, or composites ``A+B``; several are joined; ``none``: unknown. Empty: a table's
            group columns, else PatientID.
        domain_tag: domains, instead of a table's.
        keep_tags: to carry into the set.
        keep_window: keep a column that says where each image's window comes from.
        allow: of ``burned-in | secondary-capture | ultrasound``, which are left out otherwise.
    """

    rendering: Rendering = field(default_factory=Rendering)
    table: Path | None = None
    join_on: str | None = None
    label_tag: str | None = None
    group_tags: tuple[str, ...] = ()
    domain_tag: str | None = None
    keep_tags: tuple[str, ...] = ()
    keep_window: bool = False
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = sorted(set(self.allow) - set(ALLOWABLE))
        if unknown:
            raise UserError(f"--allow {','.join(unknown)}: of {', '.join(ALLOWABLE)} expected")
        if "none" in self.group_tags and len(self.group_tags) > 1:
            raise UserError("--group-tag none stands alone: it says that patients are unknown")

    @property
    def any_named(self) -> bool:
        return self != DicomOptions()


def read_dicom_tree(
    source: Path,
    columns: Columns,
    options: DicomOptions,
    *,
    image_root: Path | None = None,
    num_workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Listing:
    """Every DICOM file below ``source``, at any depth and of any name; links are followed.

    ``image_root``: folder that a table's files are relative to, None: ``source``. ``progress(done, total)`` is called
    as headers are read.

    Raises: UserError, options that contradict, no DICOM image, a patient who is not known, an ambiguous join; DataError,
    a damaged table.
    """
    require_pydicom()
    _check_options(columns, options)
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; --format dicom reads trees of DICOM files")
    units = [] if options.group_tags == ("none",) else list(options.group_tags)
    if not options.group_tags and not columns.group:
        units = ["PatientID"]
    join_on = None if options.table is None else options.join_on or default_join(options.table, columns)
    reading = Reading(_keywords(units, join_on, options), options.rendering, options.allow)
    found, others = _read_headers(source, reading, num_workers, progress)
    if all(file.refused for file in found):
        reasons = sorted(Counter(file.refused for file in found).items())
        told = "; ".join([*(f"{count} × {reason}" for reason, count in reasons), f"{others} files that are not DICOM"])
        raise UserError(f"{source} holds no DICOM image to pack: {told}")
    headers = Headers(found, reading.keywords)
    joined = None
    if options.table is not None and join_on is not None:
        root = (image_root or source).absolute()
        if join_on == "file":
            values = [Path(os.path.relpath(source.absolute() / file.name, root)).as_posix() for file in found]
        else:
            values = headers.texts(join_on)
        joined = join_table(options.table, columns, join_on, values, root, needs_label=options.label_tag is None)
        headers = headers.without_rows(joined)
    listing = list_images(
        source, headers, units, joined,
        label_tag=options.label_tag, domain_tag=options.domain_tag, keep_tags=options.keep_tags,
        keep_window=options.keep_window, policy=options.rendering.policy,
    )  # fmt: skip
    if others:
        listing.cautions.append(f"{others} files that are not DICOM were left alone")
    return listing


def _check_options(columns: Columns, options: DicomOptions) -> None:
    if options.table is None and (columns.any_named or options.join_on):
        raise UserError("columns are named, but no table: --table FILE names the one that holds them")
    if options.table is None and options.label_tag is None:
        raise UserError(
            "DICOM files are labelled by a table (--table labels.csv --label-col COLUMN) or by a tag (--label-tag)"
        )
    for tag, column, what in (
        (options.label_tag, columns.label, "label"), (options.domain_tag, columns.domain, "domain"),
    ):  # fmt: skip
        if tag is not None:
            attributes.check_kept_tag(tag, f"--{what}-tag")
            if column is not None:
                raise UserError(f"--{what}-tag {tag} and --{what}-col {column}: only one can be the {what}")
    for tag in options.keep_tags:
        attributes.check_kept_tag(tag, "--keep-tag")
        if tag in columns.keep:
            raise UserError(f"--keep-tag {tag} and --keep-col {tag} would be columns of one name: keep one")
    if options.keep_window and WINDOW_COLUMN in columns.keep:
        raise UserError(f"--keep-window and --keep-col {WINDOW_COLUMN} would be columns of one name: keep one")
    for tag in options.group_tags:
        for part in tag.split("+") if tag != "none" else ():
            attributes.check_group_tag(part)
    if options.join_on not in (None, "file"):
        attributes.check_group_tag(str(options.join_on), "--join-on")


def _keywords(units: list[str], join_on: str | None, options: DicomOptions) -> tuple[str, ...]:
    """The tags whose values are needed; SOPInstanceUID tells copies."""
    parts = [part for unit in units for part in unit.split("+")]
    single = [tag for tag in (options.label_tag, options.domain_tag, join_on) if tag and tag != "file"]
    return tuple(dict.fromkeys(["SOPInstanceUID", *parts, *options.keep_tags, *single]))


def _read_headers(
    source: Path, reading: Reading, num_workers: int, progress: Callable[[int, int], None] | None
) -> tuple[list[Found], int]:
    """What was found, in the order of the names, and how many other files there are."""
    names = sorted(files_below(source))
    found: list[Found] = []
    with open_workers(num_workers, len(names), _MIN_FOR_PROCESSES) as workers:
        files = ((str(source / name), name) for name in names)
        for done, file in enumerate(workers.ordered(partial(examine_all, reading=reading), files, 64), 1):
            if file is not None:
                found.append(file)
            if progress is not None:
                progress(done, len(names))
    return found, len(names) - len(found)
