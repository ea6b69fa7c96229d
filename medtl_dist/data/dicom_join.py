"""table + DICOM headers ─► labels, patients, splits: each file's row of the table, or none.

A join is by a tag (SOP, Series or Study instance UID, or any identifier) or by file path. What is ambiguous is refused:
two rows that say different things of one value, and one row for two objects under an id that names one object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from medtl_dist.data.sources import Columns
from medtl_dist.data.tables import IMAGE_COLUMNS, Rows, column_names, read_rows, relative_name
from medtl_dist.errors import UserError

# These name one object each: two files of one row are copies, or a mistake.
_ONE_OBJECT = ("SOPInstanceUID", "file")


@dataclass(frozen=True)
class Joined:
    """Per file its row of the table, None without one, and what the row says."""

    rows: list[int | None]
    labels: list[str]
    splits: list[str | None]
    domains: list[str | None]
    units: dict[str, list[tuple[str, ...] | None]]
    kept: pa.Table | None
    notes: list[str]
    cautions: list[str]


def join_table(
    table: Path,
    columns: Columns,
    join_on: str,
    values: Sequence[str],
    root: Path,
    *,
    needs_label: bool,
) -> Joined:
    """Find each file's row. ``values``: per file what it is joined on: a tag's value ("": none), or for ``file`` its path
    relative to ``root``.

    Raises: UserError, no such column, nothing in common, or an ambiguous join; DataError, a damaged table.
    """
    rows = read_rows(table, columns, IMAGE_COLUMNS if join_on == "file" else (join_on,), needs_label=needs_label)
    wanted = [relative_name(value, root) for value in rows.images] if join_on == "file" else rows.images
    by_value, repeated = _unique_rows(rows, wanted, join_on, table)
    found = [by_value.get(value) if value else None for value in values]
    matched = [row for row in found if row is not None]
    if not matched:
        raise UserError(
            f"no DICOM file has a row in {table} by {join_on}: --join-on names the tag (or file), --image-col the column"
        )
    copies = len(matched) - len(set(matched))
    if copies and join_on in _ONE_OBJECT:
        raise UserError(
            f"{copies} rows of {table} match more than one file by {join_on}, which names one object: remove the copies, "
            "or join on file paths with --join-on file"
        )
    without = len(values) - len(matched)
    unused = len(by_value) - len(set(matched))
    cautions = [f"{unused} of {len(by_value)} rows of the table match no DICOM file"] if unused else []
    cautions += [f"{without} of {len(values)} DICOM files have no row in the table"] if without else []
    cautions += [f"{repeated} rows of the table repeat another"] if repeated else []
    return Joined(
        rows=found,
        labels=[_of(rows.labels, row, "") for row in found],
        splits=[_of(rows.splits, row, None) for row in found],
        domains=[_of(rows.domains, row, None) for row in found],
        units={unit: [_of(values, row, None) for row in found] for unit, values in rows.units.items()},
        kept=rows.kept,
        notes=[f"the table is joined on {join_on} (--join-on)", *rows.notes],
        cautions=cautions,
    )


def default_join(table: Path, columns: Columns) -> str:
    """By which value to join: what the named column is called, else the finest that the table has a column for.

    Raises: as ``read_rows``.
    """
    image_column, names = columns.image, column_names(table)
    uids = ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
    if image_column is not None:
        return image_column if image_column in uids else "file"
    if "SOPInstanceUID" in names or any(name in names for name in IMAGE_COLUMNS):
        return "SOPInstanceUID" if "SOPInstanceUID" in names else "file"
    return next((uid for uid in uids if uid in names), "file")


def _unique_rows(rows: Rows, wanted: list[str], join_on: str, table: Path) -> tuple[dict[str, int], int]:
    """Value to row, and how many rows say again what another said. Raises: UserError, rows that contradict."""
    by_value: dict[str, int] = {}
    repeated = contradicting = 0
    for row, value in enumerate(wanted):
        earlier = by_value.setdefault(value, row)
        if earlier != row:
            repeated += 1
            contradicting += _facts(rows, earlier) != _facts(rows, row)
    if contradicting:
        raise UserError(
            f"{contradicting} rows of {table} have the {join_on} of another row, but say something else: "
            f"one row per {join_on} expected, or a finer --join-on"
        )
    return by_value, repeated


def _facts(rows: Rows, row: int) -> tuple[Any, ...]:
    units = tuple(column[row] for column in rows.units.values())
    kept = () if rows.kept is None else tuple(str(value) for value in rows.kept.slice(row, 1).to_pylist())
    return (rows.labels[row], rows.splits[row], rows.domains[row], units, kept)


def _of(column: Sequence[Any], row: int | None, otherwise: Any) -> Any:
    return otherwise if row is None else column[row]
