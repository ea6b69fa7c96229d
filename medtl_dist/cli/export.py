"""`medtl export`: parse, call the library, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def export(
    run_dir: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="Folder or address of a finished run; onnx: or a folder with ensemble.json."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="File to write; must not exist.")],
    fmt: Annotated[
        str,
        typer.Option(
            "--format", metavar="safetensors|onnx", help="Weights with metadata, or a graph from pixels to scores."
        ),
    ] = "safetensors",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON on standard output.")] = False,
) -> None:
    """Write a finished run's best model as one file, with its classes, preprocessing and threshold inside.

    Example: medtl export runs/first --format onnx --out first.onnx

    onnx: input `images` uint8 [batch, channels, side, side], normalised inside; outputs `logits`, `scores`.
    """
    from medtl_dist.train.export import export_run

    told = export_run(run_dir, fmt, out)
    if as_json:
        typer.echo(json.dumps(told))
        return
    typer.echo(f"{told['out']}  {told['bytes'] / 1e6:.1f} MB")
    typer.echo(f"checked  {told['checked']}")
    if fmt == "onnx" and told["runs_precision"] != "fp32":
        typer.echo(
            f"note  computes in float32; the run scored in {told['runs_precision']}, logits up to "
            f"{told['apart_from_the_runs_precision']:.1e} apart"
        )
