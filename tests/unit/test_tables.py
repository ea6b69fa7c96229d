"""Tables as listings: columns found or named, text kept as text, and errors that name columns but never values."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medtl_dist.data.sources import Columns
from medtl_dist.data.tables import read_table
from medtl_dist.errors import DataError, UserError

HEADER = "file,label,patient,visit,split,site,age,sex,seen\n"
ROWS = [
    "a.png,normal,007,1,train,north,61,F,2020-01-02\n",
    "sub/./b.png,pneumonia,7,1,,south,,M,\n",
    "sub/../c.png, normal ,8,2,Valid,,3,,2021-05-06\n",
]


def table(tmp_path: Path, text: str = HEADER + "".join(ROWS), name: str = "t.csv") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_columns_are_found_and_text_stays_text(tmp_path: Path) -> None:
    columns = Columns(group=("patient",), split="split", domain="site", keep=("age", "sex", "seen"))
    listing = read_table(table(tmp_path), columns)
    assert listing.names == ["a.png", "sub/b.png", "c.png"]
    assert listing.files == [str(tmp_path / name) for name in listing.names]
    assert listing.labels == ["normal", "pneumonia", "normal"]
    assert listing.splits == ["train", None, "val"]
    assert listing.domains == ["north", "south", None]
    assert listing.units == {"patient": [("007",), ("7",), ("8",)]}
    assert listing.kept is not None
    assert listing.kept.to_pydict() == {
        "age": [61, None, 3],
        "sex": ["F", "M", None],
        "seen": ["2020-01-02", None, "2021-05-06"],
    }
    assert listing.notes == [
        "images are named by column 'file' (--image-col)",
        "labels are read from column 'label' (--label-col)",
    ]


def test_composites_and_joined_columns(tmp_path: Path) -> None:
    listing = read_table(table(tmp_path), Columns(group=("split+visit", "patient")))
    assert listing.units == {
        "split+visit": [("train", "1"), None, ("Valid", "2")],
        "patient": [("007",), ("7",), ("8",)],
    }


def test_a_column_with_a_plus_in_its_name_wins_over_a_composite(tmp_path: Path) -> None:
    path = table(tmp_path, "file,label,a+b,a,b\n1.png,x,g,1,2\n")
    assert read_table(path, Columns(group=("a+b",))).units == {"a+b": [("g",)]}


def test_parquet_reads_as_the_same_listing(tmp_path: Path) -> None:
    """Integers with gaps are floats in a table that pandas wrote: 7.0 is patient 7."""
    data = pa.table(
        {
            "file": ["a.png", "b.png"],
            "label": pa.array(["x", "y"]).dictionary_encode(),
            "patient": [7.0, 8.5],
            "sick": [True, None],
            "seen": [date(2020, 1, 2), None],
            "dose": pa.array([1.5, float("nan")], pa.float32()),
        }
    )
    path = tmp_path / "t.parquet"
    pq.write_table(data, path)
    listing = read_table(path, Columns(group=("patient",), keep=("sick", "seen", "dose", "patient")))
    assert listing.labels == ["x", "y"]
    assert listing.units == {"patient": [("7",), ("8.5",)]}
    assert listing.kept is not None
    assert listing.kept.schema.types == [pa.bool_(), pa.string(), pa.float64(), pa.float64()]
    assert listing.kept["seen"].to_pylist() == ["2020-01-02", None]


@pytest.mark.parametrize("mark", [";", "\t"])
def test_other_delimiters_and_a_byte_order_mark(tmp_path: Path, mark: str) -> None:
    path = table(tmp_path, "\ufefffile,label\n1.png,x\n".replace(",", mark))
    assert read_table(path, Columns()).labels == ["x"]


def test_absolute_paths_below_the_root_become_relative(tmp_path: Path) -> None:
    path = table(tmp_path, f"file,label\n{tmp_path}/images/1.png,x\n/elsewhere/2.png,y\n")
    listing = read_table(path, Columns(), image_root=tmp_path / "images")
    assert listing.names == ["1.png", "/elsewhere/2.png"]
    assert listing.files == [str(tmp_path / "images/1.png"), "/elsewhere/2.png"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns(label="diagnosis"), "--label-col diagnosis: .* no such column; its columns: file, label, patient,"),
        (Columns(image="x"), "--image-col x: .* no such column; its columns:"),
        (Columns(group=("split+x",)), "--group-col x: .* no such column"),
        (Columns(split="x"), "--split-col x: .* no such column"),
        (Columns(domain="x"), "--domain-col x: .* no such column"),
        (Columns(keep=("x",)), "--keep-col x: .* no such column"),
        (Columns(keep=("split",)), "--keep-col split: the index has a column of that name already; rename it"),
        (Columns(split="site"), "--split-col site: .* has 'north', 'south'; train, val or test expected"),
        (Columns(group=("age",)), "--group-col age is empty in 1 of 3 rows of .*: fill it in, or give such rows an id"),
        (Columns(group=("label",)), "--group-col label is the label column"),
    ],
)
def test_wrong_columns_are_refused(tmp_path: Path, columns: Columns, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_table(table(tmp_path), columns)


def test_joined_columns_may_have_gaps_if_one_is_filled(tmp_path: Path) -> None:
    assert read_table(table(tmp_path), Columns(group=("age", "patient"))).units["age"] == [("61",), None, ("3",)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "no column file or image; name it with --image-col; its columns: a, b"),
        ("file,b\n1,2\n", "no column label or class; name it with --label-col; its columns: file, b"),
        ("file,label\n", "has no rows"),
        ("", "is empty"),
        ("file,label,label\n1,2,3\n", "more than one column 'label'"),
        ("file,label\n,x\n", "image column 'file' is empty in 1 of 1 rows"),
        ("file,label\n1.png,x\nJohn Doe,2,3\n", r"not a well-formed table \(.*Expected 2 columns, got 3\)"),
    ],
)
def test_tables_that_cannot_be_read_are_refused_without_their_values(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_table(table(tmp_path, text), Columns())
    assert "John" not in str(caught.value)


def test_text_of_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes("file,label\nMüller.png,x\n".encode("latin-1"))
    with pytest.raises(UserError, match="save the table as UTF-8"):
        read_table(path, Columns())


def test_damaged_parquet_and_no_table(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="not a Parquet file, or a damaged one"):
        read_table(path, Columns())
    with pytest.raises(UserError, match="no such table"):
        read_table(tmp_path / "none.csv", Columns())


def test_columns_of_lists_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"file": ["1.png"], "label": [["x", "y"]]}), path)
    with pytest.raises(UserError, match=r"column 'label' .* holds list.*: text or numbers expected"):
        read_table(path, Columns())
