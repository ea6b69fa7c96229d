"""The options of `medtl data pack` that are for DICOM trees, as types of its parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Table = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="DICOM: table of labels (and groups, splits …), joined to the files."),
]
JoinOn = Annotated[
    str | None,
    typer.Option(
        metavar="KEYWORD|file",
        help="DICOM: what the table's --image-col holds: SOPInstanceUID, SeriesInstanceUID, StudyInstanceUID, another "
        "identifier, or file paths [default: by the table's columns].",
    ),
]
LabelTag = Annotated[
    str | None, typer.Option(metavar="KEYWORD", help="DICOM: tag of classes, as BodyPartExamined, instead of a table.")
]
GroupTag = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEYWORD",
        help="DICOM: tag of patients; A+B and repeated as --group-col; none: unknown [default: PatientID].",
    ),
]
DomainTag = Annotated[str | None, typer.Option(metavar="KEYWORD", help="DICOM: tag of domains, as Manufacturer.")]
KeepTag = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEYWORD",
        help="DICOM: tag to carry into the set (PatientAge in years, 90 for all older; PatientSex …); dates, names, "
        "identifiers and free text are refused; repeatable.",
    ),
]
KeepWindow = Annotated[
    bool, typer.Option("--keep-window", help="DICOM: keep a column window: where each image's window comes from.")
]
WindowPolicy = Annotated[
    str,
    typer.Option(
        metavar="tags|percentile|LO,HI",
        help="DICOM: grey window of every image: the file's first (percentile if none), its 0.5th to 99.5th percentile, or "
        "one range in the modality's units.",
    ),
]
Frames = Annotated[
    str,
    typer.Option(
        metavar="single|first|middle|all",
        help="DICOM: of files of several frames none (left out and counted), the first, the middle one or all.",
    ),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        metavar="WHAT",
        help="DICOM: pack what is left out because names may be written in its pixels: burned-in, secondary-capture, "
        "ultrasound; comma or repeated.",
    ),
]
