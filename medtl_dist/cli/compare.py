"""`medtl compare`: parse, call the library, print."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from medtl_dist.errors import UserError


def compare(
    first: Annotated[str, typer.Argument(metavar="RUN", help="Folder or address of a finished run.")],
    second: Annotated[str, typer.Argument(metavar="RUN", help="Another one, of the same images.")],
    split: Annotated[str, typer.Option("--split", help="val or test, which both runs have scored.")] = "val",
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON on standard output.")] = False,
) -> None:
    """Compare two finished runs: difference of their AUCs with a paired interval that knows about patients.

    Example: medtl compare runs/first runs/second --split test
    """
    if split not in ("val", "test"):
        raise UserError(f"--split {split}: expected val or test.")
    from medtl_dist.train.versus import compare_runs, describe

    content = compare_runs(first, second, split)
    if as_json:
        typer.echo(json.dumps(content))
        return
    for line in describe(content):
        typer.echo(line)
