"""table ─► manifest: a CSV, TSV or Parquet file that names images, labels, groups, splits and domains.

Identifying columns are read as text, so that patient ``007`` stays ``007``; only kept columns get a type. Messages name
columns and count rows; the values of a table stay out of them, class and split names excepted.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from medtl_dist.data.label_sets import LabelSets, as_texts, parse_cells, parse_lists
from medtl_dist.data.shards import INDEX_FIELDS
from medtl_dist.data.sources import Columns, Listing, class_order
from medtl_dist.data.split import SPLIT_ALIASES
from medtl_dist.errors import DataError, UserError

# Tried in this order when no column is named.
IMAGE_COLUMNS = ("file", "image", "path", "filename", "filepath", "image_path")
_LABEL_COLUMNS = ("label", "class", "target")
_RESERVED = {item.name for item in INDEX_FIELDS} | {"class"}


@dataclass(frozen=True)
class Rows:
    """A table's columns by their meaning, as in ``Listing``; ``images``: what names the image of each row, as written."""

    images: list[str]
    labels: list[str]
    splits: list[str | None]
    domains: list[str | None]
    units: dict[str, list[tuple[str, ...] | None]]
    kept: pa.Table | None
    notes: list[str]
    classes: list[str]
    label_sets: LabelSets | None = None


def read_table(source: Path, columns: Columns, image_root: Path | None = None) -> Listing:
    """Read a table of images; relative paths are relative to ``image_root``, else to the table's folder.

    ``columns.group`` entries are column names, or composites ``a+b``; several entries join the rows that share a unit.

    Raises: UserError, a column that is missing, empty or has unknown values; DataError, a damaged file.
    """
    rows = read_rows(source, columns)
    root = (image_root or source.parent).absolute()
    names = [relative_name(value, root) for value in rows.images]
    return Listing(
        kind="table",
        names=names,
        files=[os.path.join(root, name) for name in names],
        rows=[-1] * len(names),
        labels=rows.labels,
        splits=rows.splits,
        domains=rows.domains,
        units=rows.units,
        kept=rows.kept,
        classes=rows.classes,
        notes=rows.notes,
        label_sets=rows.label_sets,
    )


def read_rows(
    source: Path, columns: Columns, usual_images: Sequence[str] = IMAGE_COLUMNS, *, needs_label: bool = True
) -> Rows:
    """Read the named columns of a table. ``usual_images``: tried in this order for the column that names images.

    Raises: as ``read_table``.
    """
    header = column_names(source)
    image = _choose(columns.image, usual_images, "--image-col", header, source)
    wants_one = needs_label and not columns.labels
    label = _choose(columns.label, _LABEL_COLUMNS, "--label-col", header, source) if wants_one else None
    _check_label_options(columns, header, source)
    composites = {option: _composite(option, header, source) for option in columns.group}
    clash = [name for name in (label, *columns.labels) if [name] in composites.values()]
    if clash:
        raise UserError(f"--group-col {clash[0]} is the label column: groups are patients, or what else images share")
    for option, name in (("--split-col", columns.split), ("--domain-col", columns.domain)):
        if name is not None:
            _require(name, option, header, source)
    for name in columns.keep:
        _require(name, "--keep-col", header, source)
        if name in _RESERVED:
            raise UserError(f"--keep-col {name}: the index has a column of that name already; rename it in {source}")

    optional = [name for name in (label, columns.split, columns.domain) if name is not None]
    as_text = dict.fromkeys([image, *itertools.chain(*composites.values()), *optional, *columns.labels])
    table = _load(source, header, list(as_text), list(dict.fromkeys(columns.keep)))
    if table.num_rows == 0:
        raise UserError(f"{source} has no rows: a row per image expected")
    text = {name: _texts(table[f"text {name}"], name, source) for name in as_text}

    _require_filled([bool(value) for value in text[image]], f"image column {image!r}", source)
    units = {option: _units([text[name] for name in parts]) for option, parts in composites.items()}
    if units:
        _require_filled(
            [any(values) for values in zip(*units.values(), strict=True)],
            f"--group-col {', '.join(units)}",
            source,
            "fill it in, or give such rows an id of their own if they are patients of their own",
        )
    notes = []
    if columns.image is None:
        notes.append(f"images are named by column {image!r} (--image-col)")
    if columns.label is None and label is not None:
        notes.append(f"labels are read from column {label!r} (--label-col)")
    empty: list[str | None] = [None] * table.num_rows
    classes, sets = _label_sets(columns, label, text, source)
    labels = text[label] if label is not None else [""] * table.num_rows
    return Rows(
        images=text[image],
        labels=labels if sets is None else as_texts(sets),
        splits=_splits(text[columns.split], columns.split, source) if columns.split else empty,
        domains=[value or None for value in text[columns.domain]] if columns.domain else empty,
        units=units,
        kept=_kept(table, columns.keep) if columns.keep else None,
        notes=notes,
        classes=class_order({value for value in labels if value}) if sets is None else classes,
        label_sets=sets,
    )


def _check_label_options(columns: Columns, header: list[str], source: Path) -> None:
    if columns.labels and columns.label_separator is not None:
        raise UserError("--label-sep is for one label column; several columns (--label-cols) have a class each")
    if columns.negative is not None and columns.label_separator is None:
        raise UserError(f"--negative {columns.negative} is what a label column with --label-sep says for no class")
    if columns.label_separator == "":
        raise UserError("--label-sep is empty: the text between two labels expected, as |")
    if len(columns.labels) == 1 or len(set(columns.labels)) < len(columns.labels):
        raise UserError(
            f"--label-cols {','.join(columns.labels)}: two or more different columns expected, one per class"
        )
    for name in columns.labels:
        _require(name, "--label-cols", header, source)


def _label_sets(
    columns: Columns, label: str | None, text: dict[str, list[str]], source: Path
) -> tuple[list[str], LabelSets | None]:
    """Classes in their order (of columns, or sorted), and the rows' label sets; None where a row has one label."""
    if columns.labels:
        return list(columns.labels), parse_cells({name: text[name] for name in columns.labels}, source)
    if columns.label_separator is None or label is None:
        return [], None
    classes, sets = parse_lists(text[label], columns.label_separator, columns.negative, source)
    names = class_order(classes)
    place = {name: number for number, name in enumerate(sorted(classes))}
    return names, sets[:, [place[name] for name in names]]


def column_names(source: Path) -> list[str]:
    """The columns of a table. Raises: as ``read_table``."""
    if not source.is_file():
        raise UserError(f"no such table: {source}")
    if source.suffix.lower() in (".parquet", ".pq"):
        try:
            header = pq.read_schema(source).names
        except (pa.ArrowException, OSError):
            raise DataError(f"{source} is not a Parquet file, or a damaged one") from None
    else:
        header = _csv_columns(source)
    repeated = sorted(name for name, count in Counter(header).items() if count > 1)
    if repeated:
        raise UserError(f"{source} has more than one column {', '.join(map(repr, repeated))}: rename them")
    return header


def _csv_delimiter(source: Path) -> str:
    with source.open("rb") as file:
        first = file.readline(1_000_000)
    # A comma wins a tie; spreadsheets of half the world write semicolons.
    return max(",;\t", key=lambda mark: first.count(mark.encode()))


def _csv_columns(source: Path) -> list[str]:
    try:
        with csv.open_csv(
            source,
            read_options=csv.ReadOptions(use_threads=False),
            parse_options=csv.ParseOptions(delimiter=_csv_delimiter(source), newlines_in_values=True),
        ) as reader:
            return reader.schema.names
    except pa.ArrowInvalid as error:
        raise _bad_csv(source, error) from None


def _bad_csv(source: Path, error: pa.ArrowInvalid) -> UserError:
    # Arrow quotes the row, which may name a patient: keep only where and what.
    text = str(error)
    row = re.search(r"Row #\d+", text)
    count = re.search(r"Expected \d+ columns, got \d+", text)
    if "UTF8" in text or "UTF-8" in text:
        return UserError(f"{source} is not UTF-8 text: save the table as UTF-8")
    if "Empty CSV" in text:
        return UserError(f"{source} is empty: a header and a row per image expected")
    where = ": ".join(found.group() for found in (row, count) if found)
    return UserError(f"{source} is not a well-formed table ({where or 'a value that cannot be read'})")


def _load(source: Path, header: list[str], as_text: list[str], keep: list[str]) -> pa.Table:
    """The columns ``text NAME`` as they stand, and ``keep NAME`` with a type."""
    if source.suffix.lower() in (".parquet", ".pq"):
        try:
            with pq.ParquetFile(source) as file:
                table = file.read(columns=list(dict.fromkeys([*as_text, *keep])))
        except (pa.ArrowException, OSError):
            raise DataError(f"{source} is damaged: its pages cannot be read") from None
        text, typed = table, table
    else:
        text = _read_csv(source, as_text, dict.fromkeys(as_text, pa.string()))
        typed = _read_csv(source, keep, {}) if keep else text
    columns = [text[name] for name in as_text] + [typed[name] for name in keep]
    return pa.table(columns, names=[f"text {name}" for name in as_text] + [f"keep {name}" for name in keep])


def _read_csv(source: Path, columns: list[str], types: dict[str, pa.DataType]) -> pa.Table:
    try:
        return csv.read_csv(
            source,
            parse_options=csv.ParseOptions(delimiter=_csv_delimiter(source), newlines_in_values=True),
            convert_options=csv.ConvertOptions(include_columns=columns, column_types=types),
        )
    except pa.ArrowInvalid as error:
        raise _bad_csv(source, error) from None


def _choose(named: str | None, usual: Sequence[str], option: str, header: list[str], source: Path) -> str:
    if named is not None:
        _require(named, option, header, source)
        return named
    for name in usual:
        if name in header:
            return name
    raise UserError(f"{source} has no column {' or '.join(usual[:2])}; name it with {option}; {_listed(header)}")


def _require(name: str, option: str, header: list[str], source: Path) -> None:
    if name not in header:
        raise UserError(f"{option} {name}: {source} has no such column; {_listed(header)}")


def _listed(header: list[str]) -> str:
    return f"its columns: {', '.join(header)}"


def _composite(option: str, header: list[str], source: Path) -> list[str]:
    if option in header:  # a column whose own name has a plus
        return [option]
    parts = option.split("+")
    for part in parts:
        _require(part, "--group-col", header, source)
    return parts


def _texts(column: pa.ChunkedArray, name: str, source: Path) -> list[str]:
    """A column as stripped texts, "" for null; whole floats (12.0, a table's way of integers with gaps) as integers."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _texts(column.cast(kind.value_type), name, source)
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        raise UserError(f"column {name!r} of {source} holds {kind}: text or numbers expected")
    values = column.to_pylist()
    if pa.types.is_floating(kind):
        return ["" if v is None or math.isnan(v) else str(int(v) if v.is_integer() else v) for v in values]
    return ["" if value is None else str(value).strip() for value in values]


def relative_name(value: str, root: Path) -> str:
    """A path of a table as relative posix path below ``root`` where it lies there."""
    if os.path.isabs(value):
        relative = os.path.relpath(value, root)
        return value if relative.startswith("..") else Path(relative).as_posix()
    return Path(os.path.normpath(value)).as_posix()


def _units(parts: list[list[str]]) -> list[tuple[str, ...] | None]:
    # A composite with a gap names nobody: "train" alone is not a patient.
    return [values if all(values) else None for values in zip(*parts, strict=True)]


def _require_filled(filled: list[bool], what: str, source: Path, remedy: str = "fill it in or remove the rows") -> None:
    empty = filled.count(False)
    if empty:
        raise UserError(f"{what} is empty in {empty} of {len(filled)} rows of {source}: {remedy}")


def _splits(values: list[str], column: str, source: Path) -> list[str | None]:
    unknown = sorted({value for value in values if value and value.lower() not in SPLIT_ALIASES})
    if unknown:
        shown = ", ".join(map(repr, unknown[:5])) + (" …" if len(unknown) > 5 else "")
        raise UserError(f"--split-col {column}: {source} has {shown}; train, val or test expected (empty: to be drawn)")
    return [SPLIT_ALIASES[value.lower()] if value else None for value in values]


def _kept(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """Kept columns as int64, float64, bool or text; anything else (dates …) becomes text, an empty text null."""
    columns: dict[str, pa.Array | pa.ChunkedArray] = {}
    for name in dict.fromkeys(names):
        column = table[f"keep {name}"]
        kind = column.type
        if pa.types.is_integer(kind):
            columns[name] = column.cast(pa.int64())
        elif pa.types.is_floating(kind):
            columns[name] = column.cast(pa.float64())
        elif pa.types.is_boolean(kind):
            columns[name] = column
        else:
            values = [None if v is None or not str(v).strip() else str(v).strip() for v in column.to_pylist()]
            columns[name] = pa.array(values, pa.string())
    return pa.table(columns)
