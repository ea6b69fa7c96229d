"""What of a DICOM header may enter a set: refused by kind, ages capped, coded strings checked."""

from __future__ import annotations

import pyarrow as pa
import pytest

from medtl_dist.data.dicom_attributes import (
    check_group_tag,
    check_kept_tag,
    clean_text,
    kept_column,
)
from medtl_dist.data.kept_columns import age_in_years
from medtl_dist.errors import UserError


@pytest.mark.parametrize(
    "keyword",
    [
        "PatientAge",
        "PatientSex",
        "ViewPosition",
        "BodyPartExamined",
        "KVP",
        "Manufacturer",
        "SeriesNumber",
        "ImageType",
    ],
)
def test_what_describes_may_be_kept(keyword: str) -> None:
    check_kept_tag(keyword, "--keep-tag")


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ("PatientBirthDate", "dates and times identify patients; PatientAge may be kept"),
        ("StudyDate", "dates and times"),
        ("AcquisitionDateTime", "dates and times"),
        ("StudyTime", "dates and times"),
        ("PatientName", "names, identifiers and free text"),
        ("PatientID", "names, identifiers and free text"),
        ("AccessionNumber", "names, identifiers and free text"),
        ("SOPInstanceUID", "names, identifiers and free text"),
        ("StudyDescription", "names, identifiers and free text"),
        ("InstitutionName", "names, identifiers and free text"),
        ("StationName", "names, identifiers and free text"),
        ("DeviceSerialNumber", "names, identifiers and free text"),
        ("PatientComments", "names, identifiers and free text"),
        ("PixelData", "names, identifiers and free text"),
        ("RequestAttributesSequence", "names, identifiers and free text"),
        ("PixelSpacing", "several numbers"),
        ("patient_sex", "no DICOM tag has this keyword"),
    ],
)
def test_what_identifies_may_not(keyword: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^--keep-tag {keyword}.*{message}"):
        check_kept_tag(keyword, "--keep-tag")


def test_groups_are_made_of_identifiers() -> None:
    check_group_tag("PatientID")
    check_group_tag("StudyInstanceUID")
    with pytest.raises(UserError, match=r"--group-tag PixelData \(OB or OW\): an identifier"):
        check_group_tag("PixelData")


@pytest.mark.parametrize(
    ("text", "years"),
    [
        ("045Y", 45), ("000Y", 0), ("018M", 1), ("011M", 0), ("060W", 1), ("364D", 0), ("366D", 1), ("62", 62), ("7y", 7),
        ("089Y", 89), ("090Y", 90), ("103Y", 90), ("999Y", 90), ("999M", 83),
        ("", None), ("Y", None), ("abc", None), ("-5Y", None), ("1990", None), ("45 Y", 45),
    ],
)  # fmt: skip
def test_ages(text: str, years: int | None) -> None:
    assert age_in_years(text) == years


def test_columns_have_the_type_of_their_tag() -> None:
    column, dropped = kept_column("PatientAge", "AS", ["045Y", "", "095Y", "Anna"])
    assert (column.to_pylist(), column.type, dropped) == ([45, None, 90, None], pa.int64(), 1)
    column, dropped = kept_column("KVP", "DS", ["70.5", "", "CANARY"])
    assert (column.to_pylist(), column.type, dropped) == ([70.5, None, None], pa.float64(), 1)
    column, dropped = kept_column("SeriesNumber", "IS", ["3", "x", "inf"])
    assert (column.to_pylist(), column.type, dropped) == ([3, None, None], pa.int64(), 2)
    column, dropped = kept_column(
        "PatientSex", "CS", ["f", "M", "Müller, Anna", "A NAME OF MORE THAN SIXTEEN", "DOE^JOHN", ""]
    )
    assert (column.to_pylist(), dropped) == (["F", "M", None, None, None, None], 3)
    column, _ = kept_column("ImageType", "CS", ["DERIVED\\PRIMARY"])
    assert column.to_pylist() == ["DERIVED\\PRIMARY"]


def test_texts_of_classes() -> None:
    assert clean_text("BodyPartExamined", "CS", "Chest") == "CHEST"
    assert clean_text("BodyPartExamined", "CS", "left lung of A. Doe") == ""
    assert clean_text("Manufacturer", "LO", "Fuji Photo Film Co.,Ltd.") == "Fuji Photo Film Co.,Ltd."
    assert clean_text("SeriesNumber", "IS", "12") == "12"
    assert clean_text("SeriesNumber", "IS", "") == ""


@pytest.mark.parametrize("text", ["Dr. Jane Doe 1950-01-01", "DOE^JANE", "v2 19500101", "x" * 65])
def test_texts_of_devices_that_say_more_than_the_device_are_dropped(text: str) -> None:
    assert clean_text("SoftwareVersions", "LO", text) == ""
