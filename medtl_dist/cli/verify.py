"""`medtl data verify | index`: is a shard set whole, and how tars of other tools become one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from medtl_dist.cli.data import packing_bar


def verify(
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Folder of a shard set.")],
    workers: Annotated[int | None, typer.Option(metavar="N", help="Processes [default: one per core].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every fault, as JSON.")] = False,
) -> None:
    """Check a whole shard set: tars, index, dataset.json, checksums, pixels, labels, groups; exit code 3 on a fault.

    Example: medtl data verify sets/xrays
    """
    from medtl_dist.data.verify import verify as run_verify

    with packing_bar("verifying") as progress:
        report = run_verify(dest, workers, progress)
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=1, ensure_ascii=False))
    else:
        for line in report.lines():
            typer.echo(line)
    report.check()
