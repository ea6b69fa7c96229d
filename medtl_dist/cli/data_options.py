"""The options of `medtl data`, as types of its commands' parameters; those for DICOM trees are in ``dicom_options``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Source = Annotated[
    Path,
    typer.Argument(metavar="SOURCE", help="Folder of images, DICOM tree, CSV/Parquet table, or MedMNIST .npz."),
]
Out = Annotated[
    str,
    typer.Option(metavar="DEST", help="New folder of the set, or s3:// or gs:// address; must not exist, or be empty."),
]
Format = Annotated[str, typer.Option("--format", metavar="auto|folder|table|medmnist|dicom", help="What SOURCE is.")]
ImageCol = Annotated[
    str | None, typer.Option(metavar="COLUMN", help="Column of image files [default: file, image, path …].")
]
LabelCol = Annotated[
    list[str] | None,
    typer.Option(
        metavar="COLUMN",
        help="Column of classes [default: label, class, target]; repeated: a column per class, see --label-cols.",
    ),
]
LabelCols = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,…",
        help="Several labels an image: a column per class, of 1 or true, 0 or false, empty or -1 for unknown.",
    ),
]
LabelSep = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="Several labels an image: what separates the classes that a cell names, as |"),
]
Negative = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="With --label-sep: what a cell says for none of the classes (No Finding)."),
]
GroupCol = Annotated[
    list[str] | None,
    typer.Option(
        metavar="COLUMN",
        help="Column of patients, who stay on one side of a split; A+B: one id of two columns; "
        "repeated: rows that share any of them stay together.",
    ),
]
SplitCol = Annotated[
    str | None, typer.Option(metavar="COLUMN", help="Column of train | val | test; kept and completed.")
]
DomainCol = Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of domains (hospital, scanner).")]
KeepCol = Annotated[
    list[str] | None,
    typer.Option(metavar="COLUMN", help="Column to carry into the set as it is (age, sex, view); repeatable."),
]
ImageRoot = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", help="Folder that a table's files are relative to [default: the table's; DICOM: SOURCE]."
    ),
]
Positive = Annotated[
    str | None, typer.Option(metavar="CLASS", help="Positive one of two classes [default: last in sorted order].")
]
Shares = Annotated[str, typer.Option(metavar="TRAIN,VAL,TEST", help="Shares, where splits are not given.")]
ImageSize = Annotated[
    int | None,
    typer.Option(metavar="PX", help="Short side to store, aspect kept, never enlarged [default: native size]."),
]
Color = Annotated[str, typer.Option(metavar="keep|grey|rgb", help="keep: grey if every image is grey, else RGB.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of the splits and of the order.")]
Workers = Annotated[int | None, typer.Option(metavar="N", help="Processes [default: one per core].")]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out and count bad images instead of stopping at the first.")
]
KeyFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Key of the hashes, 64 hex digits [default: one in the private folder]."),
]
Private = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Local folder of key and linkage [default: DEST.private; of an address: ./NAME.private].",
    ),
]
Staging = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Where a set for an address is packed before it is put there [default: .]."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print dataset.json instead of a summary.")]
Place = Annotated[
    str, typer.Argument(metavar="DEST", help="Folder of a shard set, or s3://, gs:// or https:// address.")
]
