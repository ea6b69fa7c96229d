"""DICOM tree ─► listing: headers read, what is no image left out and counted, labels and patients joined on.

Files are known by their content, not their name. What a header says stays in the ``Listing`` (and so in the private
folder) unless a tag is asked for by its keyword and may be kept (``dicom_attributes``).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from medtl_dist.data import dicom_attributes as attributes
from medtl_dist.data.dicom import (
    Rendering,
    chosen_frames,
    grey_of,
    inverted,
    is_dicom,
    num_frames,
    quiet,
    read_header,
    require_pydicom,
    text_of,
)
from medtl_dist.data.dicom_join import Joined, join_table
from medtl_dist.data.images import UnreadableImage
from medtl_dist.data.sources import Columns, Listing, class_order, files_below
from medtl_dist.errors import UserError

ALLOWABLE = ("burned-in", "secondary-capture", "ultrasound")
WINDOW_COLUMN = "window"
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_ULTRASOUND = ("1.2.840.10008.5.1.4.1.1.3", "1.2.840.10008.5.1.4.1.1.6")
_ULTRASOUND_MODALITIES = ("US", "IVUS", "BDUS")
# Objects with rows and columns of something else than an image: dose, segments, parametric maps.
_NO_IMAGE = (
    "1.2.840.10008.5.1.4.1.1.481.2",
    "1.2.840.10008.5.1.4.1.1.66.4",
    "1.2.840.10008.5.1.4.1.1.66.7",
    "1.2.840.10008.5.1.4.1.1.30",
)
# The only values that are counted by name; any other text in their place stays out of the set.
_MODALITIES = frozenset(
    (
        "BI",
        "CR",
        "CT",
        "DX",
        "ECG",
        "ES",
        "GM",
        "IO",
        "IVOCT",
        "IVUS",
        "LS",
        "MG",
        "MR",
        "NM",
        "OP",
        "OPT",
        "OT",
        "PT",
        "PX",
        "RF",
        "RG",
        "SM",
        "TG",
        "US",
        "XA",
        "XC",
    )
)
_PHOTOMETRICS = frozenset(
    ("MONOCHROME1", "MONOCHROME2", "RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
)


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


class Found(NamedTuple):
    """One DICOM file: ``refused`` or ``bad`` with the reason, else ""; the values asked for; per chosen frame its place
    (-1: the only one) and the source of its window."""

    name: str
    refused: str
    bad: str
    values: dict[str, str]
    facts: dict[str, str]
    frames: list[int]
    windows: list[str]


def read_dicom_tree(
    source: Path,
    columns: Columns,
    options: DicomOptions,
    image_root: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Listing:
    """Every DICOM file below ``source``, at any depth and of any name; links are followed.

    ``image_root``: folder that a table's files are relative to, None: ``source``. ``progress(done, total)`` is called
    as headers are read.

    Raises: UserError, options that contradict, no DICOM image, a label or patient that is not known; DataError, a damaged table.
    """
    require_pydicom()
    _check_options(columns, options)
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; --format dicom reads trees of DICOM files")
    units = [] if options.group_tags == ("none",) else list(options.group_tags)
    if not options.group_tags and not columns.group:
        units = ["PatientID"]
    found, others = _read_headers(source, _keywords(units, options), options, progress)
    if not any(not file.refused for file in found):
        raise UserError(f"{source} holds no DICOM image to pack: {_why_none(found, others)}")
    joined = None
    if options.table is not None:
        root = (image_root or source).absolute()
        values = [None if file.bad else {**file.values, "file": _below(source, file.name, root)} for file in found]
        needs_label = options.label_tag is None
        joined = join_table(options.table, columns, options.join_on, values, root, needs_label=needs_label)
        found = [
            file._replace(refused="no row in the table") if row is None and not file.refused and not file.bad else file
            for file, row in zip(found, joined.rows, strict=True)
        ]
    listing = _listing(source, found, units, options, joined)
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


def _keywords(units: list[str], options: DicomOptions) -> tuple[str, ...]:
    """The tags whose values are needed."""
    parts = [part for unit in units for part in unit.split("+")]
    single = [options.label_tag, options.domain_tag, options.join_on]
    uids = ["SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"]
    return tuple(dict.fromkeys([*parts, *uids, *options.keep_tags, *(tag for tag in single if tag and tag != "file")]))


def _read_headers(
    source: Path, keywords: tuple[str, ...], options: DicomOptions, progress: Callable[[int, int], None] | None
) -> tuple[list[Found], int]:
    names = list(files_below(source))
    found: list[Found] = []
    others = 0
    for done, name in enumerate(names, 1):
        file = examine(source / name, name, keywords, options)
        if file is None:
            others += 1
        else:
            found.append(file)
        if progress is not None:
            progress(done, len(names))
    return found, others


def examine(path: Path, name: str, keywords: tuple[str, ...], options: DicomOptions) -> Found | None:
    """Read one file's header; None if it is no DICOM file."""
    bad = Found(name, "", "file cannot be opened", {}, {}, [-1], [""])
    try:
        if not is_dicom(path):
            return None
        with quiet(), open(path, "rb") as file:
            magic = file.read(132).endswith(b"DICM")
            file.seek(0)
            try:
                return _found(read_header(file), name, magic, keywords, options)
            except UnreadableImage as unreadable:
                return bad._replace(bad=unreadable.reason) if magic else None
    except FileNotFoundError:
        return bad._replace(bad="missing file")  # a link to nowhere
    except OSError:
        return bad


def _found(header: Any, name: str, magic: bool, keywords: tuple[str, ...], options: DicomOptions) -> Found | None:
    sop_class = text_of(header, "SOPClassUID") or text_of(header.file_meta, "MediaStorageSOPClassUID")
    if not magic and not sop_class.startswith("1.2.840.10008."):
        return None  # it began as DICOM by chance
    values = {keyword: text_of(header, keyword) for keyword in keywords}
    rendering = options.rendering
    count = num_frames(header)
    refused = _refused(header, sop_class, options)
    frames = [] if refused else chosen_frames(rendering.frames, count)
    if not refused and not frames:
        refused = "several frames (--frames first, middle or all)"
    windows = [""]
    if not refused:
        try:
            colour = not text_of(header, "PhotometricInterpretation").startswith("MONOCHROME")
            windows = ["none (colour)" if colour else grey_of(header, frame, rendering)[1] for frame in frames]
        except UnreadableImage:
            windows = [""] * len(frames)  # decoding will say so
    return Found(name, refused, "", values, _facts(header), frames or [-1], windows)


def _refused(header: Any, sop_class: str, options: DicomOptions) -> str:
    """Why an object is left out, or ""."""
    image = all(text_of(header, keyword) for keyword in ("Rows", "Columns", "PhotometricInterpretation"))
    if not image or sop_class in _NO_IMAGE:
        return f"no image ({_class_name(sop_class)})"
    if "secondary-capture" not in options.allow and (
        _is_class(sop_class, _SECONDARY_CAPTURE) or text_of(header, "ConversionType")
    ):
        return "secondary capture (--allow secondary-capture)"
    if "ultrasound" not in options.allow and (
        any(_is_class(sop_class, known) for known in _ULTRASOUND)
        or text_of(header, "Modality").upper() in _ULTRASOUND_MODALITIES
    ):
        return "ultrasound (--allow ultrasound)"
    if "burned-in" not in options.allow and text_of(header, "BurnedInAnnotation").upper() == "YES":
        return "burned-in annotation (--allow burned-in)"
    return ""


def _is_class(sop_class: str, known: str) -> bool:
    return sop_class == known or sop_class.startswith(f"{known}.")


def _class_name(sop_class: str) -> str:
    from pydicom.uid import UID

    if not sop_class:
        return "without a SOP class"
    # The name of an unknown UID is the UID, which is a value of the file.
    return "of an unknown SOP class" if UID(sop_class).name == sop_class else UID(sop_class).name


def _facts(header: Any) -> dict[str, str]:
    """What ``dataset.json`` counts, each one of few words that identify nobody."""
    photometric = text_of(header, "PhotometricInterpretation")
    modality = text_of(header, "Modality").upper()
    shape = text_of(header, "PresentationLUTShape")
    contradicts = shape in ("INVERSE", "IDENTITY") and inverted(header) != (photometric == "MONOCHROME1")
    return {
        "photometric": photometric if photometric in _PHOTOMETRICS else "other",
        "modality": modality if modality in _MODALITIES else "other",
        "burned_in_annotation": {"YES": "yes", "NO": "no"}.get(text_of(header, "BurnedInAnnotation").upper(), "absent"),
        "intent": "raw" if text_of(header, "PresentationIntentType") == "FOR PROCESSING" else "other",
        "polarity": "contradictory" if contradicts and photometric.startswith("MONOCHROME") else "as tagged",
    }


def _why_none(found: list[Found], others: int) -> str:
    reasons = Counter(file.refused for file in found)
    parts = [f"{count} × {reason}" for reason, count in sorted(reasons.items())]
    return "; ".join([*parts, f"{others} files that are not DICOM"])


def _below(source: Path, name: str, root: Path) -> str:
    return Path(os.path.relpath(source.absolute() / name, root)).as_posix()


def _listing(
    source: Path, found: list[Found], units: list[str], options: DicomOptions, joined: Joined | None
) -> Listing:
    """Spread the files over their frames, and bring together what is known of each."""
    of_file = [number for number, file in enumerate(found) for _ in file.frames]
    rows = [None if joined is None else joined.rows[number] for number in of_file]
    names = [found[number].name for number in of_file]
    labels = _texts(found, options.label_tag) if joined is None or options.label_tag else joined.labels
    domains: list[str | None] = [None] * len(found) if joined is None else joined.domains
    if options.domain_tag:
        domains = [text or None for text in _texts(found, options.domain_tag)]
    splits: list[str | None] = [None] * len(found) if joined is None else joined.splits
    windows = [window for file in found for window in file.windows]
    refused = {entry: found[number].refused for entry, number in enumerate(of_file) if found[number].refused}
    bad = {entry: found[number].bad for entry, number in enumerate(of_file) if found[number].bad}
    unit_columns = _units(found, units, joined)
    counted = {"window": [window or "none" for window in windows]}
    for fact in ("photometric", "modality", "burned_in_annotation"):
        counted[fact] = [found[number].facts.get(fact, "unknown") for number in of_file]
    listing = Listing(
        kind="dicom",
        names=names,
        files=[str(source / name) for name in names],
        rows=[frame for file in found for frame in file.frames],
        labels=[labels[number] for number in of_file],
        splits=[splits[number] for number in of_file],
        domains=[domains[number] for number in of_file],
        units={unit: [column[number] for number in of_file] for unit, column in unit_columns.items()},
        kept=None,
        classes=[],
        notes=[] if joined is None else list(joined.notes),
        cautions=[] if joined is None else list(joined.cautions),
        refused=refused,
        bad=bad,
        counted=counted,
    )
    left = [entry for entry in range(len(names)) if entry not in refused and entry not in bad]
    listing.cautions.extend(
        _cautions([found[of_file[entry]] for entry in left], [windows[entry] for entry in left], options)
    )
    kept = _kept(found, of_file, rows, windows, options, joined, listing.cautions)
    classes = {listing.labels[entry] for entry in left if listing.labels[entry]}
    return replace(listing, kept=kept, classes=class_order(classes))


def _texts(found: list[Found], keyword: str | None) -> list[str]:
    """A permitted tag's values as text, per file."""
    name = keyword or ""
    vr = attributes.representation(name, "--label-tag")
    return [attributes.clean_text(name, vr, file.values.get(name, "")) for file in found]


def _units(found: list[Found], units: list[str], joined: Joined | None) -> dict[str, list[tuple[str, ...] | None]]:
    """Per group tag or column and file, who the patient is."""
    columns: dict[str, list[tuple[str, ...] | None]] = {} if joined is None else dict(joined.units)
    for unit in units:
        values = [tuple(file.values.get(part, "") for part in unit.split("+")) for file in found]
        # A composite with a gap names nobody.
        columns[f"{unit} (tag)" if unit in columns else unit] = [value if all(value) else None for value in values]
    if not columns:
        return {}
    first = next(iter(columns))
    nameless = 0
    for number, file in enumerate(found):
        if all(column[number] is None for column in columns.values()):
            nameless += not file.refused and not file.bad
            columns[first][number] = ("no patient", file.name)  # left out, and on its own
    if nameless:
        raise UserError(
            f"{', '.join(columns)} is empty in {nameless} of {len(found)} DICOM files: nobody can say whose images they are; "
            "name another with --group-tag (repeated: PatientID and StudyInstanceUID are joined), a table's column with "
            "--group-col, or say that patients are unknown with --group-tag none"
        )
    return columns


def _kept(
    found: list[Found],
    of_file: list[int],
    rows: list[int | None],
    windows: list[str],
    options: DicomOptions,
    joined: Joined | None,
    cautions: list[str],
) -> pa.Table | None:
    columns: dict[str, Any] = {}
    if joined is not None and joined.kept is not None:
        guarded = attributes.guard_kept_columns(joined.kept.take(pa.array(rows, pa.int64())))
        columns |= {name: guarded[name] for name in guarded.column_names}
    for tag in dict.fromkeys(options.keep_tags):
        vr = attributes.representation(tag, "--keep-tag")
        texts = [found[number].values.get(tag, "") for number in of_file]
        columns[tag], dropped = attributes.kept_column(tag, vr, texts)
        if dropped:
            cautions.append(f"{dropped} values of {tag} are not what its representation {vr} allows, and were dropped")
    if options.keep_window:
        columns[WINDOW_COLUMN] = pa.array(windows, pa.string())
    return pa.table(columns) if columns else None


def _cautions(files: list[Found], windows: list[str], options: DicomOptions) -> list[str]:
    """What to know about the images that will be packed; ``files`` and ``windows`` per image."""
    total = len(files)
    count = Counter(pair for file in files for pair in file.facts.items())
    sources = Counter(windows)
    found = []
    if absent := count["burned_in_annotation", "absent"]:
        found.append(
            f"BurnedInAnnotation is absent in {absent} of {total} images: names may be written in their pixels; "
            "look at a sample before you share the set"
        )
    if len(sources) > 1:
        said = ", ".join(f"{name or 'unusable'} {number}" for name, number in sorted(sources.items()))
        found.append(f"windows come from several sources ({said}): a model can learn the vendor instead of the disease")
    if options.rendering.policy == "percentile" and (absolute := count["modality", "CT"]):
        found.append(
            f"{absolute} of {total} images are CT, each stretched by its own percentiles; --window LO,HI (as -1000,400) "
            "keeps Hounsfield units comparable"
        )
    if raw := count["intent", "raw"]:
        found.append(f"{raw} of {total} images are meant for processing (raw detector values), not for presentation")
    if contradictory := count["polarity", "contradictory"]:
        found.append(
            f"{contradictory} of {total} images have a PresentationLUTShape that contradicts their photometric "
            "interpretation; the shape was followed"
        )
    names = Counter((file.values.get("SOPInstanceUID", ""), frame) for file in _once(files) for frame in file.frames)
    if copies := sum(number - 1 for (uid, _), number in names.items() if uid):
        found.append(f"{copies} images have the SOPInstanceUID of another: they may be copies")
    return found


def _once(files: list[Found]) -> list[Found]:
    return list({file.name: file for file in files}.values())
