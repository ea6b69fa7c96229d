"""`medtl data pack | info`: images → shard set, and what a set holds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

from medtl_dist.cli import data_options as options
from medtl_dist.cli import dicom_options as dicom
from medtl_dist.cli.progress import one_bar

if TYPE_CHECKING:
    from medtl_dist.data.shards import Dataset

app = typer.Typer(
    name="data", help="Make and inspect shard sets.", no_args_is_help=True, pretty_exceptions_enable=False,
    rich_markup_mode=None,
)  # fmt: skip


@app.command()
def pack(
    source: options.Source,
    out: options.Out,
    source_format: options.Format = "auto",
    image_col: options.ImageCol = None,
    label_col: options.LabelCol = None,
    label_cols: options.LabelCols = None,
    label_sep: options.LabelSep = None,
    negative: options.Negative = None,
    group_col: options.GroupCol = None,
    split_col: options.SplitCol = None,
    domain_col: options.DomainCol = None,
    keep_col: options.KeepCol = None,
    image_root: options.ImageRoot = None,
    positive: options.Positive = None,
    split: options.Shares = "0.7,0.15,0.15",
    image_size: options.ImageSize = None,
    color: options.Color = "keep",
    seed: options.Seed = 0,
    workers: options.Workers = None,
    skip_bad: options.SkipBad = False,
    key_file: options.KeyFile = None,
    private: options.Private = None,
    staging: options.Staging = None,
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
    as_json: options.AsJson = False,
) -> None:
    """Pack images into a shard set: tars, index and dataset.json in DEST; key and linkage in DEST.private.

    \b
    Examples:
      medtl data pack xrays/ --out sets/xrays --image-size 256
      medtl data pack labels.csv --out sets/cxr --label-col class \\
          --group-col split+patient_id --split-col split --keep-col age --image-size 256
      medtl data pack Data_Entry.csv --out sets/nih --image-col "Image Index" \\
          --label-col "Finding Labels" --label-sep "|" --negative "No Finding" --group-col "Patient ID"
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

    columns_of_labels = tuple(label_cols.split(",")) if label_cols else ()
    if label_col and (label_cols or len(label_col) > 1):
        columns_of_labels = (*label_col, *columns_of_labels)
    chosen = PackOptions(
        format=source_format,
        columns=Columns(
            image=image_col,
            label=label_col[0] if label_col and not columns_of_labels else None,
            labels=columns_of_labels,
            label_separator=label_sep,
            negative=negative,
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
    with one_bar("packing") as progress:
        dataset = run_pack(source, out, chosen, progress)
    _print(dataset, as_json)
    if not as_json:
        typer.echo(
            f"{private_of(out, chosen)} names files and patients: keep it apart from the set, and do not share it"
        )
    refuse_leaks(dataset, dataset.info["audit"])


@app.command()
def info(
    dest: options.Place,
    as_json: options.AsJson = False,
) -> None:
    """Say what a shard set holds: images, patients and classes per split, and what was left out.

    Example: medtl data info sets/xrays
    Example: medtl data info s3://bucket/sets/xrays
    """
    from medtl_dist.data.shards import open_dataset

    _print(open_dataset(dest), as_json)


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
    several = dataset.task == "multilabel"
    shown = () if several else dataset.classes
    rows = [["split", "images", "groups", *shown, "shards"]]
    for split in dataset.splits:
        entry = info["splits"][split]
        counts = [entry["classes"].get(name, 0) for name in shown]
        groups = "-" if unknown else f"{entry['groups']:,}"
        rows.append([split, f"{entry['samples']:,}", groups, *(f"{n:,}" for n in counts), f"{len(entry['shards']):,}"])
    lines += _aligned(rows)
    if several:
        lines += _aligned(_class_rows(dataset))
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


def _aligned(rows: list[list[str]]) -> list[str]:
    """Rows as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(others, widths[1:], strict=True))]
        )
        for first, *others in rows
    ]


def _class_rows(dataset: Dataset) -> list[list[str]]:
    """Of several labels an image: positives, negatives and unknowns of each class in each split."""
    rows = [["class", *(f"{split} +/-/?" for split in dataset.splits)]]
    for name in dataset.classes:
        entries = [dataset.info["splits"][split] for split in dataset.splits]
        counts = [[entry[what].get(name, 0) for what in ("classes", "negatives", "unknown")] for entry in entries]
        rows.append([name, *("/".join(f"{n:,}" for n in some) for some in counts)])
    return rows
