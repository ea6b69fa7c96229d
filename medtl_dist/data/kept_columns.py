"""kept columns ─► columns that don't identify: dates are found, ages over 89 become 90.

The rules follow HIPAA's Safe Harbor (45 CFR 164.514(b)(2)(i)(C)): no date finer than a year, no age
over 89. What is refused of a DICOM archive's table is a caution for a table that somebody made for sharing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from medtl_dist.errors import UserError

OLDEST = 90
_SEPARATED = re.compile(
    r"(\d{1,2}([-/. ])\d{1,2}\2(\d{2}|\d{4})|\d{2,4}([-/. ])\d{1,2}\4\d{1,2})([T ].*)?"
    r"|\d{4}[-/]\d{1,2}|\d{1,2}[-/]\d{4}|\d{1,2}:\d{2}(:\d{2}.*)?"
)
_RUN_TOGETHER = re.compile(r"(1[89]|20)\d{2}(0[1-9]|1[0-2])([0-2]\d|3[01])(T?\d{2,}.*)?")
_MONTH = re.compile(
    r"\b(jan(uary)?|feb(ruary)?|mar(ch)?|apr(il)?|may|june?|july?|aug(ust)?|sept?(ember)?|oct(ober)?|nov(ember)?|dec(ember)?)\b",
    re.IGNORECASE,
)
_WITHIN = re.compile(r"(?<!\d)(1[89]|20)\d{2}([-/.]?)(0?[1-9]|1[0-2])\2([0-2]?\d|3[01])(?!\d)")
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_DATE_WORDS = frozenset(("date", "dates", "datetime", "timestamp", "dob", "birth", "birthdate", "birthday"))
_AGE = re.compile(
    r"P?(\d{1,3})(?:\.\d+)? ?(y|yr|yrs|years?|m|mo|mos|months?|w|wk|wks|weeks?|d|days?)?\+?", re.IGNORECASE
)
_PER_YEAR = {"y": 1.0, "m": 12.0, "w": 365.25 / 7, "d": 365.25}
# Seconds, and milliseconds, since 1970 for the years 1985 to 2040.
_STAMPS = ((4.7e8, 2.2e9), (4.7e11, 2.2e12))


def is_date(text: str) -> bool:
    """Whether a text is a date, a month of a year or a time, however it is written."""
    text = text.strip()
    if _SEPARATED.fullmatch(text) or _RUN_TOGETHER.fullmatch(text):
        return True
    return len(text) <= 40 and any(map(str.isdigit, text)) and _MONTH.search(text) is not None


def holds_date(text: str) -> bool:
    """Whether there is a date somewhere in a text."""
    return _WITHIN.search(text) is not None


def age_in_years(text: str) -> int | None:
    """``018M``, ``95 years``, ``P95Y`` as whole years (1, 90, 90); without a unit years are meant; 90 for all older than 89;
    None for other texts."""
    found = _AGE.fullmatch(text.strip())
    if found is None:
        return None
    return min(int(int(found[1]) / _PER_YEAR[(found[2] or "y")[0].lower()]), OLDEST)


def dated_columns(table: pa.Table) -> list[str]:
    """The columns that hold dates, or say so by their names."""
    return [name for name in table.column_names if _is_dated(name, table[name])]


def aged_columns(table: pa.Table) -> list[str]:
    """The columns that hold ages over 89, by their names and values."""
    named = (name for name in table.column_names if _is_age(name))
    return [name for name in named if any(_capped(value) != value for value in table[name].unique().to_pylist())]


def guarded(table: pa.Table) -> pa.Table:
    """The table with ages over 89 as 90 (``90+`` where they are texts).

    Raises: UserError, a column with dates in it, or an age that is none.
    """
    for name in dated_columns(table):
        raise UserError(
            f"--keep-col {name}: it holds dates, which identify patients; an age or an interval may be kept"
        )
    for place, name in enumerate(table.column_names):
        if not _is_age(name):
            continue
        column = table[name]
        capped = pa.chunked_array([pa.array(list(map(_capped, column.to_pylist())), column.type)])
        if any(int(number) > OLDEST for text in _texts(capped) for number in re.findall(r"\d+", text)):
            raise UserError(f"--keep-col {name}: it holds ages over 89 in words of its own; numbers of years expected")
        table = table.set_column(place, name, capped)
    return table


def cautions(table: pa.Table | None) -> Iterator[str]:
    """What somebody who packs these columns should know."""
    if table is None:
        return
    for name in dated_columns(table):
        yield f"kept column {name!r} holds dates, which identify patients: leave it out before the set is shared"
    for name in aged_columns(table):
        yield f"kept column {name!r} holds ages over 89, which identify patients: write 90 instead before the set is shared"


def _is_dated(name: str, column: pa.ChunkedArray) -> bool:
    return bool(_DATE_WORDS & _words(name)) or any(map(is_date, _texts(column))) or _stamps(column)


def _is_age(name: str) -> bool:
    return bool({"age", "ages"} & _words(name))


def _words(name: str) -> set[str]:
    return {word.lower() for word in _WORDS.findall(name)}


def _texts(column: pa.ChunkedArray) -> list[str]:
    values = (value for value in column.unique().to_pylist() if value is not None and not isinstance(value, float))
    return [str(value).strip() for value in values]


def _stamps(column: pa.ChunkedArray) -> bool:
    """Whether the numbers are all of the size of time stamps."""
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        return False
    values = [value for value in column.unique().to_pylist() if value is not None]
    return bool(values) and any(all(low <= value <= high for value in values) for low, high in _STAMPS)


def _capped(value: Any) -> Any:
    if isinstance(value, str):
        return "90+" if age_in_years(value) == OLDEST else value
    return value if value is None or isinstance(value, bool) else min(value, OLDEST)
