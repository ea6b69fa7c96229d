"""`medtl status`: where a run stands, also for who did not start it."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from medtl_dist.cli.follow import epoch_line, progress_facts
from medtl_dist.cli.jobs import CaBundle, TokenFile, job_status


def status(
    run: Annotated[
        str, typer.Argument(help="Run folder, or its s3:// address; with --address a submitted run's name.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
    address: Annotated[str | None, typer.Option(help="Ask this cluster's job server, http(s)://HOST:PORT.")] = None,
    token_file: TokenFile = None,
    ca_bundle: CaBundle = None,
) -> None:
    """Say where a run stands, while it goes on or after it.

    \b
    Examples:
      medtl status runs/chest-resnet101-20261123-031500
      medtl status xrays-1 --address https://ray.example.org
    """
    if address is not None:
        job_status(run, address, token_file, ca_bundle, as_json=as_json)
        return
    from medtl_dist.store_folder import folder_at
    from medtl_dist.train.run_store import status_in

    found = status_in(folder_at(run))
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    _print(found)
    for part in found["parts"]:
        typer.echo("")
        _print(part)


def _print(found: dict[str, Any]) -> None:
    news = found["seconds_since_news"]
    typer.echo(f"{found['run']}: {found['state']}" + ("" if news is None else f", last news {news:.0f} s ago"))
    for row in found["epochs"]:
        typer.echo(epoch_line(row))
        spent = {name.removesuffix("_s").replace("_", " "): row.get(name) for name in _SPENT}
        if all(seconds is not None for seconds in spent.values()):
            typer.echo("  " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in spent.items()))
    progress = found["progress"]
    if progress and found["state"] == "running":
        typer.echo(
            f"epoch {min(progress['epoch'] + 1, progress['epochs'])}/{progress['epochs']}, " + progress_facts(progress)
        )
    if found["budget"] is not None:
        used, most = found["budget"]["gpu_hours"], found["budget"]["max_gpu_hours"]
        typer.echo(f"GPU hours: {used:.4g} used, " + ("no limit now" if most is None else f"of {most:g}"))
    if found["state"] == "stopped" and not found["parts"]:
        newest = found["checkpoints"][-1] if found["checkpoints"] else None
        where = "there is no checkpoint yet" if newest is None else f"its newest checkpoint is of step {newest}"
        typer.echo(f"{where}; the same `medtl train` command with --resume goes on.")


_SPENT = ("data_wait_s", "compute_s", "communication_s", "evaluation_s", "checkpoint_s")
