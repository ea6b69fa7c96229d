"""DICOM tags ─► columns: which attributes may enter a set, and as what.

Nothing does unless it is named, and what identifies a patient does not even then. By value representation: dates, times,
names, identifiers and free text are refused; numbers, ages and coded strings are let through, a coded string only if
it is one (capitals, digits, underscore, space; at most 16). Of the short texts, which devices fill in but people can,
only those below are. Ages over 89 become 90.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import pyarrow as pa

from medtl_dist.data.kept_columns import age_in_years, holds_date
from medtl_dist.data.shards import INDEX_FIELDS
from medtl_dist.errors import UserError

# Texts that describe the device and its settings, not the patient, the place or the people (compare PS3.15 table E.1-1).
_TEXTS = frozenset(("Manufacturer", "ManufacturerModelName", "SoftwareVersions", "EthnicGroup", "ConvolutionKernel"))
_DATES = ("DA", "DT", "TM")
_WHOLE = ("IS", "US", "SS", "UL", "SL")
_DECIMAL = ("DS", "FL", "FD")
# What a group may be made of: it is hashed, and never written.
_HASHED = ("LO", "SH", "CS", "UI", "PN", "IS", "DA", "AE")
_SEXES = ("F", "M", "O")
_CODE = re.compile(r"[A-Z0-9_ ]{1,16}(\\[A-Z0-9_ ]{1,16}){0,9}")
_TAKEN = {item.name for item in INDEX_FIELDS} | {"class"}


def representation(keyword: str, option: str) -> str:
    """The value representation of a tag by its keyword. Raises: UserError, no such keyword."""
    from pydicom.datadict import dictionary_VR, tag_for_keyword

    tag = tag_for_keyword(keyword)
    if tag is None:
        raise UserError(f"{option} {keyword}: no DICOM tag has this keyword; written as PatientSex, BodyPartExamined")
    return dictionary_VR(tag)


def check_group_tag(keyword: str, option: str = "--group-tag") -> None:
    """Raises: UserError, an unknown tag, or one that is no identifier."""
    vr = representation(keyword, option)
    if vr not in _HASHED:
        raise UserError(f"{option} {keyword} ({vr}): an identifier such as PatientID or StudyInstanceUID expected")


def check_kept_tag(keyword: str, option: str) -> None:
    """Whether values of this tag may be written into a set. Raises: UserError, with the reason they may not."""
    from pydicom.datadict import dictionary_VM, tag_for_keyword

    vr = representation(keyword, option)
    table = "a table (--table) may hold what was decided to be harmless"
    if vr in _DATES:
        raise UserError(f"{option} {keyword} ({vr}): dates and times identify patients; PatientAge may be kept")
    if vr not in ("CS", "AS", *_WHOLE, *_DECIMAL) and keyword not in _TEXTS:
        raise UserError(f"{option} {keyword} ({vr}): names, identifiers and free text stay out of a set; {table}")
    if vr != "CS" and dictionary_VM(tag_for_keyword(keyword) or 0) != "1" and keyword not in _TEXTS:
        raise UserError(f"{option} {keyword}: a tag of several numbers cannot be a column; {table}")
    if keyword in _TAKEN:
        raise UserError(f"{option} {keyword}: the index has a column of that name already")


def code(text: str) -> str:
    """A coded string in capitals, "" if it is something else in a coded string's place."""
    text = text.upper()
    return text if _CODE.fullmatch(text) else ""


def clean_text(keyword: str, vr: str, text: str) -> str:
    """The value of a permitted tag as text; "" if it does not fit its representation."""
    if keyword == "PatientSex":
        return code(text) if code(text) in _SEXES else ""
    if vr == "CS":
        return code(text)
    if keyword in _TEXTS:  # filled in by devices, but people can write into them
        return "" if "^" in text or len(text) > 64 or holds_date(text) else text
    value = _value(vr, text)
    return "" if value is None else str(value)


def kept_column(keyword: str, vr: str, texts: Sequence[str]) -> tuple[pa.Array, int]:
    """A permitted tag as a column (whole years, int64, float64 or text; null where empty), and how many values were
    dropped because they do not fit the tag."""
    if vr == "CS" or keyword in _TEXTS:
        values: list = [(clean_text(keyword, vr, text) or None) for text in texts]
        kind = pa.string()
    else:
        values = [_value(vr, text) for text in texts]
        kind = pa.float64() if vr in _DECIMAL else pa.int64()
    dropped = sum(value is None and text != "" for value, text in zip(values, texts, strict=True))
    return pa.array(values, kind), dropped


def _value(vr: str, text: str) -> int | float | None:
    if vr == "AS":
        return age_in_years(text)
    try:
        value = float(text)
        return value if vr in _DECIMAL else int(value)
    except (ValueError, OverflowError):
        return None
