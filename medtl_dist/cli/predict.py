"""`medtl predict`: parse, call the library, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from medtl_dist.cli.progress import stages_bar
from medtl_dist.errors import DataError


def predict(
    run_dir: Annotated[
        str, typer.Argument(metavar="RUN", help="Folder or address of a finished run, or a folder with ensemble.json.")
    ],
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="An image, a folder of images, a CSV/Parquet table, a DICOM tree, a MedMNIST .npz, or a shard set (folder, s3://).",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE.parquet", help="Where the scores go; begun before: goes on.")
    ],
    kind: Annotated[
        str, typer.Option("--format", metavar="auto|folder|table|medmnist|dicom|shards", help="What INPUT is.")
    ] = "auto",
    image_col: Annotated[
        str | None, typer.Option("--image-col", metavar="COLUMN", help="Of a table [default: file, image, path …].")
    ] = None,
    image_root: Annotated[
        Path | None, typer.Option("--image-root", metavar="FOLDER", help="What a table's files are relative to.")
    ] = None,
    group_col: Annotated[
        str | None,
        typer.Option(
            "--group-col",
            metavar="COLUMN",
            help="Patients: column of a table or DICOM keyword, A+B for two; adds FILE.patients.parquet.",
        ),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            "--window", metavar="tags|percentile|LO,HI", help="DICOM for a run that was trained on image files."
        ),
    ] = None,
    allow: Annotated[
        str,
        typer.Option(
            "--allow", metavar="A,B", help="DICOM left out otherwise: burned-in, secondary-capture, ultrasound."
        ),
    ] = "",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Exit with 0 even if inputs could not be read.")] = False,
    part_size: Annotated[
        int, typer.Option("--part-size", metavar="N", help="Images per part: what an interruption costs at most.")
    ] = 1024,
    workers: Annotated[
        int | None, typer.Option("--workers", metavar="N", help="Decoding processes [default: by the device].")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            help="Score on a Ray cluster (`local`: one of its own here). All nodes need the same folders, or stores.",
        ),
    ] = None,
    actors: Annotated[
        int | None,
        typer.Option("--actors", metavar="N", help="With --address: models at once [default: by the cluster]."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON on standard output.")] = False,
) -> None:
    """Score images with a finished run's best checkpoint, its preprocessing and its threshold; no labels needed.

    Example: medtl predict runs/first new_xrays/ --out scores.parquet

    Interrupted, the same command goes on. Bad inputs are listed in FILE.errors.parquet, and the exit code is 3.
    """
    from medtl_dist.data.inputs import InputOptions
    from medtl_dist.train.predict import PredictOptions
    from medtl_dist.train.predict import predict as make

    inputs = InputOptions(
        kind=kind,
        image_column=image_col,
        image_root=image_root,
        group=group_col,
        allow=tuple(part for part in allow.split(",") if part),
        num_workers=workers or 1,
    )
    options = PredictOptions(inputs=inputs, window=window, part_size=part_size, num_workers=workers)
    make_parts = None
    if address is not None or actors is not None:
        from cluster.predict import parts_on_ray  # Ray is imported only where it is used

        make_parts = parts_on_ray(address, actors)
    with stages_bar() as show:
        outcome = make(run_dir, source, out, options, make_parts=make_parts, progress=show)
    told = describe(outcome)
    if as_json:
        typer.echo(json.dumps(told))
    else:
        for line in _lines(told):
            typer.echo(line)
    if outcome.bad and not skip_bad:
        reasons = "; ".join(f"{count} × {reason}" for reason, count in outcome.reasons.items())
        raise DataError(
            f"{outcome.bad} inputs could not be scored ({reasons}); they are listed in {outcome.errors}. The others are in "
            f"{outcome.out}; accept that with --skip-bad, or mend the inputs and write another file."
        )


def describe(outcome: Any) -> dict[str, Any]:
    """The outcome as plain JSON values."""
    return {
        "out": str(outcome.out),
        "scored": outcome.scored,
        "bad": outcome.bad,
        "left_out": outcome.left_out,
        "reasons": outcome.reasons,
        "errors": None if outcome.errors is None else str(outcome.errors),
        "patients": None if outcome.patients is None else str(outcome.patients),
        "resumed_parts": outcome.resumed,
        "notes": list(outcome.notes),
    }


def _lines(told: dict[str, Any]) -> list[str]:
    counts = f"{told['scored']} images scored"
    if told["left_out"]:
        counts += f", {told['left_out']} left out on purpose"
    if told["bad"]:
        counts += f", {told['bad']} could not be read"
    lines = [f"{counts}: {told['out']}"]
    lines += [f"patients  {told['patients']}"] if told["patients"] else []
    lines += [f"errors  {told['errors']}"] if told["errors"] else []
    return lines + [f"note  {text}" for text in told["notes"]]
