"""`medtl cluster local`: a Ray cluster of several nodes on this machine, for trying out what runs on a real one."""

from __future__ import annotations

import json
import signal
import time
from typing import Annotated

import typer

app = typer.Typer(
    name="cluster", help="Ray clusters.", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)


@app.callback()
def _group() -> None:
    """Ray clusters."""  # keeps `local` a command of its own while there is no second one


@app.command()
def local(
    nodes: Annotated[int, typer.Option(help="Nodes, the head included.")] = 2,
    cpus_per_node: Annotated[int, typer.Option(help="CPUs that each node offers.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs that each node offers.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the address and token file as a line of JSON.")
    ] = False,
) -> None:
    """Run a Ray cluster on this machine's loopback, with a token of its own, until Ctrl-C or SIGTERM.

    Example: medtl cluster local --nodes 3
    """
    from cluster.local_nodes import local_cluster
    from medtl_dist.errors import Interrupted

    def leave(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, leave)
    try:
        with local_cluster(nodes, cpus_per_node=cpus_per_node, gpus_per_node=gpus_per_node) as cluster:
            if as_json:
                facts = {
                    "address": cluster.address,
                    "gcs_address": cluster.gcs_address,
                    "token_file": str(cluster.token_file),
                }
                typer.echo(json.dumps(facts | {"pids": list(cluster.pids)}))
            else:
                typer.echo(f"{nodes} nodes; Ctrl-C ends them.")
                typer.echo(f"medtl submit train … --address {cluster.address} --token-file {cluster.token_file}")
            while cluster.alive():
                time.sleep(0.5)
            raise Interrupted("a node of the local cluster has ended; start it again.")
    except KeyboardInterrupt:
        typer.echo("the cluster has ended.", err=True)
    finally:
        signal.signal(signal.SIGTERM, before)
