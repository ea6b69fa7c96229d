"""`medtl data verify | index`: is a shard set whole, and how tars of other tools become one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from medtl_dist.cli import data_options as options
from medtl_dist.cli.data import summary
from medtl_dist.cli.progress import one_bar


def verify(
    dest: options.Place,
    workers: options.Workers = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every fault, as JSON.")] = False,
) -> None:
    """Check a whole shard set: tars, index, dataset.json, checksums, pixels, labels, groups; exit code 3 on a fault.

    \b
    Examples:
      medtl data verify sets/xrays
      medtl data verify s3://bucket/sets/xrays
    """
    from medtl_dist.data.verify import verify as run_verify

    with one_bar("verifying") as progress:
        report = run_verify(dest, workers, progress)
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=1, ensure_ascii=False))
    else:
        for line in report.lines():
            typer.echo(line)
    report.check()


def index(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of tars as webdataset writes them.")],
    label_field: Annotated[
        str | None, typer.Option(metavar="FIELD", help="Field of .json with the class [default: the .cls member].")
    ] = None,
    group_field: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD",
            help="Field of .json with the patient; A+B: one id of two fields ('split' is the tar's split); "
            "repeated: samples that share any of them are one group.",
        ),
    ] = None,
    domain_field: Annotated[
        str | None, typer.Option(metavar="FIELD", help="Field of .json with the domain (hospital, scanner).")
    ] = None,
    keep_field: Annotated[
        list[str] | None, typer.Option(metavar="FIELD", help="Field of .json to carry into the index; repeatable.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="SPLIT=GLOB,…", help="Which tars are which split [default: by name, as train-000.tar]."),
    ] = None,
    positive: options.Positive = None,
    workers: options.Workers = None,
    key_file: options.KeyFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Make a set of tars that webdataset wrote: index and dataset.json beside them, the tars left as they are.

    \b
    Examples:
      medtl data index tars/
      medtl data index tars/ --label-field finding --group-field patient --split train=a-*.tar,val=b-*.tar
    """
    from medtl_dist.data.adopt import AdoptOptions, adopt, parse_splits
    from medtl_dist.data.sidecars import Fields

    chosen = AdoptOptions(
        fields=Fields(label_field, tuple(group_field or ()), domain_field, tuple(keep_field or ())),
        splits=parse_splits(split) if split else (),
        positive=positive,
        num_workers=workers,
        key_file=key_file,
    )
    with one_bar("indexing") as progress:
        dataset = adopt(folder, chosen, progress)
    if as_json:
        facts = {"folder": dataset.folder, "sha256": dataset.sha256, **dataset.info}
        typer.echo(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    for line in summary(dataset):
        typer.echo(line)
    typer.echo(f"{folder}.private names files and patients: keep it apart from the set, and do not share it")
