"""nodes → how many workers they can hold: whether a run can start, or go on elsewhere after a node is lost."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import ray
from ray._private.state import state

from medtl_dist.config import Config


def needs_of(config: Config, *, use_gpu: bool) -> dict[str, float]:
    """What each worker is given."""
    return {"CPU": config.cluster.cpus_per_worker} | ({"GPU": 1.0} if use_gpu else {})


def room_on(nodes: Iterable[Mapping[str, Any]], leaving: Collection[str], needs: Mapping[str, float]) -> int:
    """Workers that the living nodes could hold if nothing else ran on them; those that are ``leaving`` hold none.

    A worker lies on one node whole, so half a worker's CPUs here and half there are none.
    """
    total = 0
    for node in nodes:
        if not node["Alive"] or node["NodeID"] in leaving:
            continue
        total += int(min(node["Resources"].get(name, 0.0) // amount for name, amount in needs.items()))
    return total


def room_now(needs: Mapping[str, float], *, even_leaving: bool = False) -> int:
    """The same of the connected cluster, at this moment."""
    return room_on(ray.nodes(), () if even_leaving else state.get_draining_nodes() or {}, needs)
