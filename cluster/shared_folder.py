"""Run folder and shard set on local paths ─► seen from every node of the cluster, or refused before training starts.

The driver leaves a probe in the run folder, and a task on every node that can have a worker says what it finds there.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from medtl_dist.config import Config
from medtl_dist.errors import UserError
from medtl_dist.storage import Folder, parse_place

_PATIENCE_S = 60.0

Digests = Mapping[str, str | None]  # a file's SHA-256, None where there is none


def check_shared(config: Config, run_folder: Folder) -> None:
    """Whether all nodes see the run folder and the shard set, where these are local paths and nodes are several.

    Raises: UserError, naming the path and the nodes that don't.
    """
    nodes = {
        str(node["NodeID"]): str(node["NodeName"])
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) > 0
    }
    if len(nodes) < 2:
        return
    with _probes(config, run_folder) as paths:
        here = digests(list(paths))
        tasks = {
            node: ray.remote(digests)
            .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
            .remote(list(paths))
            for node in nodes
        }
        there: dict[str, Digests] = {}
        for node, task in tasks.items():
            with contextlib.suppress(
                GetTimeoutError, RayError
            ):  # a node that can't answer gets no blame for the folder
                there[nodes[node]] = ray.get(task, timeout=_PATIENCE_S)
    refuse_unshared(paths, here, there)


def digests(paths: list[str]) -> dict[str, str | None]:
    """Of files as this machine sees them."""
    found: dict[str, str | None] = {}
    for path in paths:
        try:
            found[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        except OSError:
            found[path] = None
    return found


def refuse_unshared(paths: Mapping[str, str], here: Digests, there: Mapping[str, Digests]) -> None:
    """``paths``: what the user named, by the file that stands for it; ``there``: what each node sees.

    Raises: UserError, a node sees another file than the driver, or none.
    """
    for path, named in paths.items():
        without = sorted(node for node, seen in there.items() if seen.get(path) != here.get(path))
        if without:
            shown = ", ".join(without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
            raise UserError(
                f"{named} is not the same folder on all nodes of the cluster (not on {shown}): name a folder that every node "
                "mounts, like NFS, or an address, like s3://bucket/folder."
            )


@contextlib.contextmanager
def _probes(config: Config, run_folder: Folder) -> Iterator[dict[str, str]]:
    """A file for each local path that counts → what to call it in a message."""
    found: dict[str, str] = {}
    shards = parse_place(config.data.shards) if config.data.shards is not None else None
    if shards is not None and not shards.remote:
        found[f"{shards.path}/dataset.json"] = f"data.shards = {shards.url}"
    if run_folder.remote:
        yield found
        return
    name = f".shared-{secrets.token_hex(8)}"
    try:
        run_folder.write(name, secrets.token_bytes(16))
        yield found | {run_folder.at(name): f"the run folder {run_folder.url}"}
    finally:
        with contextlib.suppress(OSError):
            run_folder.delete(name)
