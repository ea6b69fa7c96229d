"""`medtl models`: the networks there are, with their stages, sizes and input."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def models(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...", help="Networks to show, timm/NAME included [default: all of torchvision's]."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the modules of each stage.")] = False,
) -> None:
    """List the networks that model.backbone can name.

    Example: medtl models resnet18 timm/tf_efficientnet_lite0
    """
    from medtl_dist.models.overview import overview, table

    rows = overview(names or None)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        typer.echo(table(rows))
