"""A sweep on a cluster of two nodes: what frozen layers give lies on each node's own disk, and is gone with the sweep."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from nodes import Command, Machine, wait_for

from cluster.node_cache import NodeFolder, cache_place

pytestmark = pytest.mark.ray

_OPTIONS = (
    "model.backbone=timm/test_resnet", "model.frozen_depth=2", "train.epochs=4", "train.threads=1", "augment.views=2",
    "tune.scheduler=none", "tune.prefix_cache=on",
)  # fmt: skip


def test_the_cache_lies_on_each_node_s_disk_and_goes_with_the_sweep(
    cluster: Machine, shards: str, tmp_path: Path
) -> None:
    space, folder, scratch = tmp_path / "space.yaml", tmp_path / "sweep", tmp_path / "scratch"
    space.write_text("knobs: [{key: optim.lr, type: log_uniform, low: 1.0e-4, high: 1.0e-1}]")
    scratch.mkdir()
    place = cache_place(folder, None, own_cluster=False)
    assert isinstance(place, NodeFolder)
    parts = (f"medtl-{os.geteuid()}", place.name)
    places = [Path(base, *parts) for base in (tempfile.gettempdir(), scratch)]
    second = cluster.start_node(2, "second", TMPDIR=str(scratch))
    try:
        # As many at once as both nodes have CPUs, and one more.
        options = (f"cluster.address={cluster.address}", f"data.shards={shards}", *_OPTIONS)
        given = ["tune", "--preset", "smoke", "--space", str(space), "--num-trials", "5", "--sweep-dir", str(folder)]
        given += [part for option in options for part in ("--set", option)]
        command = Command([sys.executable, "-m", "medtl_dist.cli.main", *given], cluster.environment(), folder)
        with contextlib.ExitStack() as stack:
            stack.callback(command.process.kill)
            for path in places:
                wait_for(f"a cache in {path}", lambda path=path: list(path.glob("*/*/data.bin")))
            code, errors = command.finish()
        assert code == 0, errors
    finally:
        cluster.kill_node(second)
    table = pq.read_table(folder / "sweep.parquet")
    assert table.column("state").to_pylist() == ["finished"] * 5
    assert None not in table.column("cached_s").to_pylist()
    assert not (folder / "cache").exists()
    assert [path for path in places if path.exists()] == []
