"""An epoch's numbers of one rank ─► Ray's metrics, which every node's agent offers to Prometheus."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

EXPORTED = {
    "rank_images_per_s": "Images per second that this rank trained in its last epoch.",
    "rank_data_wait_fraction": "Share of the last epoch's training time that this rank waited for data.",
    "rank_communication_fraction": "Share of it in the agreement before each step, waiting for the slowest rank included.",
    "rank_slowness": "This rank's own time a step (data and forward pass) over the median of the other ranks', last epoch.",
    "rank_straggler": "1 where this rank was over 1.5 in both of the last two epochs, and holds the others up.",
}


def export(metrics: Mapping[str, float | int | None], *, rank: int, run: str) -> None:
    """Set the gauges ``medtl_rank_…`` of this rank; what else the metrics hold is left alone."""
    for name in EXPORTED:
        value = metrics.get(name)
        if value is not None:
            _gauge(name).set(float(value), tags={"rank": str(rank), "run": run})


@functools.cache
def _gauge(name: str) -> Any:
    from ray.util.metrics import Gauge

    return Gauge(f"medtl_{name}", description=EXPORTED[name], tag_keys=("rank", "run"))
