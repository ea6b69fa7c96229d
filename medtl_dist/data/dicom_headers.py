"""DICOM file ─► what its header says, as far as it is asked for, and whether it is an image that may be packed.

Runs in worker processes. A file is known by its content, never by its name.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from medtl_dist.data.dicom import is_dicom, read_header
from medtl_dist.data.dicom_tags import MAX_FRAMES, grey_of, inverted, num_frames, quiet, text_of
from medtl_dist.data.dicom_window import Rendering, chosen_frames
from medtl_dist.data.images import UnreadableImage

ALLOWABLE = ("burned-in", "secondary-capture", "ultrasound")
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
_MODALITIES = (
    "CR",
    "CT",
    "DX",
    "GM",
    "IO",
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
    "US",
    "XA",
    "XC",
)
_PHOTOMETRICS = ("MONOCHROME1", "MONOCHROME2", "RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
# What dataset.json counts, in the order of ``Found.facts``.
COUNTED = ("photometric", "modality", "burned_in_annotation")
UNREAD = ("unknown", "unknown", "unknown", "", "")


class Reading(NamedTuple):
    """What to find out: the values of ``keywords``, how frames are rendered, and what is ``allow``ed."""

    keywords: tuple[str, ...]
    rendering: Rendering
    allow: tuple[str, ...]


class Found(NamedTuple):
    """One DICOM file: ``refused`` or ``bad`` with the reason, else ""; ``values`` of the keywords asked for; ``facts``:
    photometric interpretation, modality, burned-in annotation, ``raw`` if meant for processing, ``contradictory`` if its
    polarity is; per chosen frame its place (-1: the only one) and the source of its window."""

    name: str
    refused: str
    bad: str
    values: tuple[str, ...]
    facts: tuple[str, str, str, str, str]
    frames: tuple[int, ...]
    windows: tuple[str, ...]

    @property
    def usable(self) -> bool:
        return not self.refused and not self.bad


def examine_all(files: Sequence[tuple[str, str]], reading: Reading) -> list[Found | None]:
    """``examine`` over (path, name)."""
    return [examine(path, name, reading) for path, name in files]


def examine(path: str | os.PathLike[str], name: str, reading: Reading) -> Found | None:
    """Read one file's header; None if it is no DICOM file. Never raises for a bad file: the result says why."""
    bad = Found(name, "", "file cannot be opened", ("",) * len(reading.keywords), UNREAD, (-1,), ("",))
    try:
        if not is_dicom(path):
            return None
        with quiet(), open(path, "rb") as file:
            magic = file.read(132).endswith(b"DICM")
            file.seek(0)
            try:
                return _found(read_header(file), name, magic, reading)
            except UnreadableImage as unreadable:
                return bad._replace(bad=unreadable.reason) if magic else None
    except OSError:
        return bad


def _found(header: Any, name: str, magic: bool, reading: Reading) -> Found | None:
    sop_class = text_of(header, "SOPClassUID") or text_of(header.file_meta, "MediaStorageSOPClassUID")
    if not magic and not sop_class.startswith("1.2.840.10008."):
        return None  # it began as DICOM by chance
    values = tuple(text_of(header, keyword) for keyword in reading.keywords)
    damage = ""
    if not _has_image(header) and (not sop_class or "Image Storage" in _class_name(sop_class)):
        damage = "damaged DICOM header"
    elif num_frames(header) > MAX_FRAMES:
        damage = f"more than {MAX_FRAMES} frames"
    if damage:
        return Found(name, "", damage, values, UNREAD, (-1,), ("",))
    refused = _refused(header, sop_class, reading.allow)
    frames = [] if refused else chosen_frames(reading.rendering.frames, num_frames(header))
    if not refused and not frames:
        refused = "several frames (--frames first, middle or all)"
    windows = () if refused else tuple(_window_source(header, frame, reading.rendering) for frame in frames)
    return Found(name, refused, "", values, _facts(header), tuple(frames) or (-1,), windows or ("",))


def _window_source(header: Any, frame: int, rendering: Rendering) -> str:
    if not text_of(header, "PhotometricInterpretation").startswith("MONOCHROME"):
        return "none (colour)"
    try:
        return grey_of(header, frame, rendering)[1]
    except UnreadableImage:
        return ""  # decoding will say so


def _refused(header: Any, sop_class: str, allow: tuple[str, ...]) -> str:
    """Why an object is left out, or ""."""
    if not _has_image(header) or sop_class in _NO_IMAGE:
        return f"no image ({_class_name(sop_class)})"
    if "secondary-capture" not in allow and (
        _is_class(sop_class, _SECONDARY_CAPTURE) or text_of(header, "ConversionType")
    ):
        return "secondary capture (--allow secondary-capture)"
    if "ultrasound" not in allow and (
        any(_is_class(sop_class, known) for known in _ULTRASOUND)
        or text_of(header, "Modality").upper() in _ULTRASOUND_MODALITIES
    ):
        return "ultrasound (--allow ultrasound)"
    if "burned-in" not in allow and text_of(header, "BurnedInAnnotation").upper() == "YES":
        return "burned-in annotation (--allow burned-in)"
    return ""


def _has_image(header: Any) -> bool:
    return all(text_of(header, keyword) for keyword in ("Rows", "Columns", "PhotometricInterpretation"))


def _is_class(sop_class: str, known: str) -> bool:
    return sop_class == known or sop_class.startswith(f"{known}.")


def _class_name(sop_class: str) -> str:
    from pydicom.uid import UID

    if not sop_class:
        return "without a SOP class"
    # The name of an unknown UID is the UID, which is a value of the file.
    return "of an unknown SOP class" if UID(sop_class).name == sop_class else UID(sop_class).name


def _facts(header: Any) -> tuple[str, str, str, str, str]:
    """Each one of few words that identify nobody."""
    photometric = text_of(header, "PhotometricInterpretation")
    modality = text_of(header, "Modality").upper()
    shape = text_of(header, "PresentationLUTShape")
    contradicts = shape in ("INVERSE", "IDENTITY") and inverted(header) != (photometric == "MONOCHROME1")
    burned_in = text_of(header, "BurnedInAnnotation").upper()
    return (
        next((known for known in _PHOTOMETRICS if known == photometric), "other"),
        next((known for known in _MODALITIES if known == modality), "other"),
        {"YES": "yes", "NO": "no"}.get(burned_in, "absent"),
        "raw" if text_of(header, "PresentationIntentType") == "FOR PROCESSING" else "",
        "contradictory" if contradicts and photometric.startswith("MONOCHROME") else "",
    )
