"""`medtl runs`: what is done with run folders as such."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

app = typer.Typer(help="Look after run folders.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Look after run folders."""


@app.command()
def clean(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder, or its s3:// address.")],
    yes: Annotated[bool, typer.Option("--yes", help="Remove what is listed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List what killed writers left in a run folder: unfinished checkpoints and uploads, temporary files. --yes removes it.

    Whole checkpoints stay, and nothing is touched while a process trains there.

    Example: medtl runs clean s3://hospital/runs/first --yes
    """
    from medtl_dist.store_folder import folder_at
    from medtl_dist.train.orphans import found_orphans, remove
    from medtl_dist.train.run_store import owner_here

    folder = folder_at(run)
    with found_orphans(folder, owner_here()) as orphans:
        if yes:
            remove(folder, orphans)
    if as_json:
        rows = [{k: v for k, v in dataclasses.asdict(orphan).items() if k != "upload"} for orphan in orphans]
        typer.echo(json.dumps({"removed": yes, "orphans": rows}, indent=1))
        return
    for orphan in orphans:
        typer.echo(f"{orphan.name}  {orphan.what}, {orphan.num_bytes / 2**20:.1f} MiB")
    total = sum(orphan.num_bytes for orphan in orphans) / 2**20
    done = "removed" if yes else "found; --yes removes them" if orphans else "found"
    typer.echo(f"{len(orphans)} orphan{'' if len(orphans) == 1 else 's'}, {total:.1f} MiB, {done}")
