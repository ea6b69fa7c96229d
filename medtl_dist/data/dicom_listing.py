"""DICOM headers + rows of a table ─► listing: one entry per image or left-out file, with what is known of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from medtl_dist.data import dicom_attributes as attributes
from medtl_dist.data import kept_columns
from medtl_dist.data.dicom_headers import COUNTED, Found
from medtl_dist.data.dicom_join import Joined
from medtl_dist.data.sources import Listing, class_order
from medtl_dist.errors import UserError

WINDOW_COLUMN = "window"


class Headers(NamedTuple):
    """The DICOM files of a tree; ``keywords``: the names of their ``values``."""

    found: list[Found]
    keywords: tuple[str, ...]

    def texts(self, keyword: str) -> list[str]:
        """A tag's value per file."""
        place = self.keywords.index(keyword)
        return [file.values[place] for file in self.found]

    def without_rows(self, joined: Joined) -> Headers:
        """The same, files without a row of the table refused."""
        found = [
            file._replace(refused="no row in the table") if row is None and file.usable else file
            for file, row in zip(self.found, joined.rows, strict=True)
        ]
        return Headers(found, self.keywords)


def list_images(
    source: Path,
    headers: Headers,
    units: list[str],
    joined: Joined | None,
    *,
    label_tag: str | None,
    domain_tag: str | None,
    keep_tags: Sequence[str],
    keep_window: bool,
    policy: str,
) -> Listing:
    """Spread the files over their frames, and bring together what is known of each.

    Raises: UserError, a patient who is not known, a kept column that may not be.
    """
    found = headers.found
    of_file = [number for number, file in enumerate(found) for _ in file.frames]
    files = [found[number] for number in of_file]
    nothing: list[str | None] = [None] * len(found)
    labels = joined.labels if joined is not None else []
    if label_tag is not None:
        labels = _texts(headers, label_tag, "--label-tag")
    domains = nothing if joined is None else joined.domains
    if domain_tag is not None:
        domains = [text or None for text in _texts(headers, domain_tag, "--domain-tag")]
    splits = nothing if joined is None else joined.splits
    windows = [window for file in found for window in file.windows]
    left = [entry for entry, file in enumerate(files) if file.usable]

    cautions = [] if joined is None else list(joined.cautions)
    cautions += _cautions([files[entry] for entry in left], [windows[entry] for entry in left], policy)
    cautions += _copies(headers)
    kept = _joined_columns(joined, of_file)
    for tag in dict.fromkeys(keep_tags):
        vr = attributes.representation(tag, "--keep-tag")
        texts = headers.texts(tag)
        kept[tag], dropped = attributes.kept_column(tag, vr, [texts[number] for number in of_file])
        if dropped:
            cautions.append(f"{dropped} values of {tag} are not what its representation {vr} allows, and were dropped")
    if keep_window:
        kept[WINDOW_COLUMN] = pa.array([window or None for window in windows], pa.string())
    counted = {"window": windows}
    for place, fact in enumerate(COUNTED):
        counted[fact] = [file.facts[place] for file in files]
    names = [file.name for file in files]
    return Listing(
        kind="dicom",
        names=names,
        files=[str(source / name) for name in names],
        rows=[frame for file in found for frame in file.frames],
        labels=[labels[number] for number in of_file],
        splits=[splits[number] for number in of_file],
        domains=[domains[number] for number in of_file],
        units={unit: [column[number] for number in of_file] for unit, column in _units(headers, units, joined).items()},
        kept=pa.table(kept) if kept else None,
        classes=class_order({labels[of_file[entry]] for entry in left} - {""}),
        notes=[] if joined is None else list(joined.notes),
        cautions=cautions,
        refused={entry: file.refused for entry, file in enumerate(files) if file.refused},
        bad={entry: file.bad for entry, file in enumerate(files) if file.bad},
        counted=counted,
    )


def _texts(headers: Headers, keyword: str, option: str) -> list[str]:
    vr = attributes.representation(keyword, option)
    return [attributes.clean_text(keyword, vr, text) for text in headers.texts(keyword)]


def _joined_columns(joined: Joined | None, of_file: list[int]) -> dict[str, Any]:
    if joined is None or joined.kept is None:
        return {}
    rows = pa.array([joined.rows[number] for number in of_file], pa.int64())
    guarded = kept_columns.guarded(joined.kept.take(rows))
    return {name: guarded[name] for name in guarded.column_names}


def _units(headers: Headers, units: list[str], joined: Joined | None) -> dict[str, list[tuple[str, ...] | None]]:
    """Per group tag or column and file, who the patient is."""
    columns: dict[str, list[tuple[str, ...] | None]] = {} if joined is None else dict(joined.units)
    for unit in units:
        values = list(zip(*(headers.texts(part) for part in unit.split("+")), strict=True))
        # A composite with a gap names nobody.
        columns[f"{unit} (tag)" if unit in columns else unit] = [value if all(value) else None for value in values]
    if not columns:
        return {}
    first = next(iter(columns))
    nameless = 0
    for number, file in enumerate(headers.found):
        if all(column[number] is None for column in columns.values()):
            nameless += file.usable
            columns[first][number] = ("no patient", file.name)  # left out, and on its own
    if nameless:
        raise UserError(
            f"{', '.join(columns)} is empty in {nameless} of {len(headers.found)} DICOM files: whose images are they? "
            "Name another with --group-tag (repeated: PatientID and StudyInstanceUID are joined), a table's column with "
            "--group-col, or say that patients are unknown with --group-tag none"
        )
    return columns


def _cautions(files: list[Found], windows: list[str], policy: str) -> list[str]:
    """What to know about the images that will be packed; ``files`` and ``windows`` per image."""
    total = len(files)
    count = Counter(fact for file in files for fact in enumerate(file.facts))
    found = []
    if absent := count[2, "absent"]:
        found.append(
            f"BurnedInAnnotation is absent in {absent} of {total} images: names may be written in their pixels; "
            "look at a sample before you share the set"
        )
    sources = Counter(windows)
    if len(sources) > 1:
        said = ", ".join(f"{name or 'unusable'} {number}" for name, number in sorted(sources.items()))
        found.append(f"windows come from several sources ({said}): a model can learn the device instead of the disease")
    if policy == "percentile" and (absolute := count[1, "CT"]):
        found.append(
            f"{absolute} of {total} images are CT, each stretched by its own percentiles; --window LO,HI (as -1000,400) "
            "keeps Hounsfield units comparable"
        )
    if raw := count[3, "raw"]:
        found.append(f"{raw} of {total} images are meant for processing (raw detector values), not for presentation")
    if contradictory := count[4, "contradictory"]:
        found.append(
            f"{contradictory} of {total} images have a PresentationLUTShape that contradicts their photometric "
            "interpretation; the shape was followed"
        )
    return found


def _copies(headers: Headers) -> list[str]:
    uids = Counter(
        uid for uid, file in zip(headers.texts("SOPInstanceUID"), headers.found, strict=True) if uid and file.usable
    )
    copies = uids.total() - len(uids)
    return [f"{copies} files have the SOPInstanceUID of another: they may be copies"] if copies else []
