"""`medtl data pack | info`: images → shard set, and what a set holds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medtl_dist.cli import dicom_options as dicom

if TYPE_CHECKING:
    from medtl_dist.data.shards import Dataset

app = typer.Typer(
    name="data", help="Make and inspect shard sets.", no_args_is_help=True, pretty_exceptions_enable=False,
    rich_markup_mode=None,
)  # fmt: skip


@app.command()
def pack(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="Folder of images, DICOM tree, CSV/Parquet table, or MedMNIST .npz."),
    ],
    out: Annotated[
        str,
        typer.Option(
            metavar="DEST", help="New folder of the set, or s3:// or gs:// address; must not exist, or be empty."
        ),
    ],
    source_format: Annotated[
        str, typer.Option("--format", metavar="auto|folder|table|medmnist|dicom", help="What SOURCE is.")
    ] = "auto",
    image_col: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of image files [default: file, image, path …].")
    ] = None,
    label_col: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of classes [default: label, class, target].")
    ] = None,
    group_col: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN",
            help="Column of patients, who stay on one side of a split; A+B: one id of two columns; "
            "repeated: rows that share any of them stay together.",
        ),
    ] = None,
    split_col: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of train | val | test; kept and completed.")
    ] = None,
    domain_col: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of domains (hospital, scanner).")
    ] = None,
    keep_col: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="Column to carry into the set as it is (age, sex, view); repeatable."),
    ] = None,
    image_root: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Folder that a table's files are relative to [default: the table's; DICOM: SOURCE]."
        ),
    ] = None,
    positive: Annotated[
        str | None, typer.Option(metavar="CLASS", help="Positive one of two classes [default: last in sorted order].")
    ] = None,
    split: Annotated[
        str, typer.Option(metavar="TRAIN,VAL,TEST", help="Shares, where splits are not given.")
    ] = "0.7,0.15,0.15",
    image_size: Annotated[
        int | None,
        typer.Option(metavar="PX", help="Short side to store, aspect kept, never enlarged [default: native size]."),
    ] = None,
    color: Annotated[
        str, typer.Option(metavar="keep|grey|rgb", help="keep: grey if every image is grey, else RGB.")
    ] = "keep",
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the splits and of the order.")] = 0,
    workers: Annotated[int | None, typer.Option(metavar="N", help="Processes [default: one per core].")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out and count bad images instead of stopping at the first.")
    ] = False,
    key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Key of the hashes, 64 hex digits [default: one in DEST.private]."),
    ] = None,
    private: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Local folder of key and linkage [default: DEST.private; of an address: ./NAME.private].",
        ),
    ] = None,
    staging: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Where a set for an address is packed before it is put there [default: .]."
        ),
    ] = None,
    table: dicom.Table = None,
    join_on: dicom.JoinOn = None,
    label_tag: dicom.LabelTag = None,
    group_tag: dicom.GroupTag = None,
    domain_tag: dicom.DomainTag = None,
    keep_tag: dicom.KeepTag = None,
    keep_window: dicom.KeepWindow = False,
    window: dicom.WindowPolicy = "percentile",
    frames: dicom.Frames = "single",
    allow: dicom.Allow = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print dataset.json instead of a summary.")] = False,
) -> None:
    """Pack images into a shard set: tars, index and dataset.json in DEST; key and linkage in DEST.private.

    \b
    Examples:
      medtl data pack xrays/ --out sets/xrays --image-size 256
      medtl data pack labels.csv --out sets/cxr --label-col class \\
          --group-col split+patient_id --split-col split --keep-col age --image-size 256
      medtl data pack pneumoniamnist.npz --out sets/pneumoniamnist
      medtl data pack labels.csv --out s3://bucket/sets/cxr --staging /scratch --private keys/cxr
      medtl data pack archive/ --out sets/ward --table labels.csv \\
          --join-on StudyInstanceUID --label-col finding --keep-tag PatientAge --image-size 256
    """
    from medtl_dist.data.audit import refuse_leaks
    from medtl_dist.data.dicom_source import DicomOptions
    from medtl_dist.data.dicom_window import parse_window
    from medtl_dist.data.pack import PackOptions, private_of
    from medtl_dist.data.pack import pack as run_pack
    from medtl_dist.data.sources import Columns
    from medtl_dist.data.split import parse_fractions

    options = PackOptions(
        format=source_format,
        columns=Columns(
            image=image_col,
            label=label_col,
            group=tuple(group_col or ()),
            split=split_col,
            domain=domain_col,
            keep=tuple(keep_col or ()),
        ),
        dicom=DicomOptions(
            rendering=parse_window(window, frames),
            table=table,
            join_on=join_on,
            label_tag=label_tag,
            group_tags=tuple(group_tag or ()),
            domain_tag=domain_tag,
            keep_tags=tuple(keep_tag or ()),
            keep_window=keep_window,
            allow=tuple(part for text in allow or () for part in text.split(",")),
        ),
        image_root=image_root,
        positive=positive,
        fractions=parse_fractions(split),
        image_size_px=image_size,
        color=color,
        seed=seed,
        num_workers=workers,
        skip_bad=skip_bad,
        key_file=key_file,
        private=private,
        staging=staging,
    )
    with packing_bar() as progress:
        dataset = run_pack(source, out, options, progress)
    _print(dataset, as_json)
    if not as_json:
        typer.echo(
            f"{private_of(out, options)} names files and patients: keep it apart from the set, and do not share it"
        )
    refuse_leaks(dataset, dataset.info["audit"])


@app.command()
def info(
    dest: Annotated[
        str, typer.Argument(metavar="DEST", help="Folder of a shard set, or s3://, gs:// or https:// address.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print dataset.json instead of a summary.")] = False,
) -> None:
    """Say what a shard set holds: images, patients and classes per split, and what was left out.

    Example: medtl data info sets/xrays
    Example: medtl data info s3://bucket/sets/xrays
    """
    from medtl_dist.data.shards import open_dataset

    _print(open_dataset(dest), as_json)


@contextmanager
def packing_bar(doing: str = "packing") -> Iterator[Callable[[int, int], None] | None]:
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print(dataset: Dataset, as_json: bool) -> None:
    if as_json:
        facts = {"folder": dataset.folder, "sha256": dataset.sha256, **dataset.info}
        typer.echo(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    for line in summary(dataset):
        typer.echo(line)


def summary(dataset: Dataset) -> list[str]:
    """The readable lines of ``pack`` and ``info``."""
    info, stored = dataset.info, dataset.info["preprocessing"]
    packed = sum(entry["samples"] for entry in info["splits"].values())
    size = f"short side {stored['image_size_px']} px" if stored["image_size_px"] else "native size"
    positive = f", positive {dataset.positive_class}" if dataset.positive_class else ""
    unknown = dataset.group_source == "none"
    groups = "none, patients are unknown" if unknown else dataset.group_source
    lines = [
        f"{dataset.folder}: {packed:,} images, {dataset.task}{positive}; {dataset.color}, {size}, {stored['encoding']}",
        f"groups: {groups}; splits: {info['split_source']['method']}",
    ]
    if "adopted" in info:
        label, domain = info["adopted"]["label"], info["adopted"]["domain"]
        fields = [f"label from {'.cls' if label is None else f'field {label!r}'}"]
        fields += [f"domain from field {domain!r}"] if domain is not None else []
        lines.append(f"adopted: tars of another tool, indexed where they lie; {', '.join(fields)}")
    rows = [["split", "images", "groups", *dataset.classes, "shards"]]
    for split in dataset.splits:
        entry = info["splits"][split]
        counts = [entry["classes"].get(name, 0) for name in dataset.classes]
        groups = "-" if unknown else f"{entry['groups']:,}"
        rows.append([split, f"{entry['samples']:,}", groups, *(f"{n:,}" for n in counts), f"{len(entry['shards']):,}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    for split in dataset.splits:
        if domains := info["splits"][split].get("domains"):
            lines.append(f"domains of {split}: {', '.join(f'{name} {count:,}' for name, count in domains.items())}")
    left_out = sum(entry["samples"] for entry in info["excluded"])
    lines.append(f"found {info['found']:,}, left out {left_out:,}")
    for entry in info["excluded"]:
        where = ", ".join(entry[place] for place in ("split", "class") if entry[place]) or "before the split"
        lines.append(f"  {entry['samples']:,} × {entry['reason']} ({where}; {entry['groups']:,} groups)")
    lines += [f"note: {text}" for text in info.get("notes", ())]
    lines += [f"caution: {text}" for text in info.get("cautions", ())]
    return lines
