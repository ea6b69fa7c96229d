"""What may be kept of a table's columns (data/kept_columns.py)."""

from __future__ import annotations

import datetime

import pyarrow as pa
import pytest

from medtl_dist.data.kept_columns import cautions, guarded
from medtl_dist.errors import UserError


def test_ages_over_89_become_90_whatever_the_column_is_called() -> None:
    table = pa.table(
        {
            "age": [12, 95, None],
            "PatientAge": [89.5, 90.5, 101.0],
            "ageYears": [93, 1, 2],
            "AgeAtScan": ["045Y", "92", None],
            "AGE_TEXT": ["95 years", "P95Y", "18 months"],
            "stage": [95, 1, 2],
            "image": [95, 1, 2],
        }
    )
    assert guarded(table).to_pydict() == {
        "age": [12, 90, None],
        "PatientAge": [89.5, 90.0, 90.0],
        "ageYears": [90, 1, 2],
        "AgeAtScan": ["045Y", "90+", None],
        "AGE_TEXT": ["90+", "90+", "18 months"],
        "stage": [95, 1, 2],
        "image": [95, 1, 2],
    }


def test_ages_in_words_of_their_own_are_refused() -> None:
    with pytest.raises(UserError, match="--keep-col age: it holds ages over 89"):
        guarded(pa.table({"age": ["between 92 and 95"]}))
    table = pa.table({"age": ["80-89", "adult"]})
    assert guarded(table).equals(table)


@pytest.mark.parametrize(
    "value",
    [
        *("1990-03-12", "12/03/1990", "3/12/90", "12.03.1990", "19900312", 19900312, "1990-03-12 10:00:00", "10:15"),
        *("20240101103000.5", str(datetime.date(2020, 1, 2)), str(datetime.time(10, 1)), "2020-03", "12/2020"),
        *("05.01.20", "05-Jan-2020", "Jan 5, 2020", "5 January 2020", "20200105T101500", 1577836800, 1577836800000),
        "May 2020",
    ],
)
def test_dates_are_refused_and_not_repeated(value: str | int) -> None:
    table = pa.table({"sex": ["F"], "when": [value]})
    with pytest.raises(UserError, match=r"^--keep-col when: it holds dates") as caught:
        guarded(table)
    assert str(value) not in caught.value.message
    assert list(cautions(table)) == [
        "kept column 'when' holds dates, which identify patients: leave it out before the set is shared"
    ]


@pytest.mark.parametrize("name", ["StudyDate", "dob", "date_of_birth", "BIRTHDATE"])
def test_a_column_named_as_a_date_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"--keep-col {name}: it holds dates"):
        guarded(pa.table({name: [7]}))


@pytest.mark.parametrize(
    "value",
    ["1.2.840", "4.5.1", "AP", 12345678, 20, "2020", 1.5, "T1/T2", "3-4", "10-20", "march fracture", "update 7"],
)
def test_what_is_no_date_is_kept(value: str | float) -> None:
    table = pa.table({"value": [value]})
    assert guarded(table).equals(table)
    assert list(cautions(table)) == []


def test_a_table_made_for_sharing_is_not_changed_but_told() -> None:
    assert list(cautions(pa.table({"PatientAge": [93, 4], "sex": ["F", "M"]}))) == [
        "kept column 'PatientAge' holds ages over 89, which identify patients: write 90 instead before the set is shared"
    ]
    assert list(cautions(None)) == []
