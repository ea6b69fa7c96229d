"""`medtl train --max-gpu-hours` of a chain on Ray Train workers: counted in ranks, over its stages, stopped and gone on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from shard_sets import write_set

pytestmark = pytest.mark.ray


def _medtl(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "medtl_dist.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)


def test_a_chain_on_two_workers_stops_at_its_limit_and_goes_on_with_a_larger_one(tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "set", {"train": [11, 9, 6], "val": [9, 5]})
    options = [f"data.shards={dataset.folder}", "train.threads=1", "train.epochs=1", "cluster.num_workers=2"]
    options += ["transfer.stages=[{name: source}, {name: target, train: {epochs: 2}}]"]
    folder = tmp_path / "run"
    command = ["train", "--preset", "smoke", *(part for o in options for part in ("--set", o)), "--run-dir", folder]
    done = _medtl(*command, "--max-gpu-hours", "1e-9")
    # The source's one epoch is trained whole: there was nothing to stop before its end. The target is not begun.
    assert (done.returncode, (folder / "stages/1-source/results.json").exists()) == (5, True), done.stderr
    assert "GPU hours are used; its checkpoints are kept" in done.stderr
    assert not (folder / "stages/2-target/checkpoints").exists()
    source, whole = (json.loads((folder / name / "budget.json").read_text()) for name in ("stages/1-source", "."))
    assert whole == {"max_gpu_hours": 1e-9, "gpu_hours": source["gpu_hours"]}
    assert source["gpu_hours"] > 0

    done = _medtl(*command, "--resume", "--max-gpu-hours", "1")
    assert done.returncode == 0, done.stderr
    target = json.loads((folder / "stages/2-target/budget.json").read_text())
    assert target["max_gpu_hours"] == 1 - source["gpu_hours"]
    epochs = [json.loads(line) for line in (folder / "stages/2-target/log.jsonl").read_text().splitlines()]
    seconds = sum(row["epoch_s"] for row in epochs if row.get("kind") == "epoch")
    assert target["gpu_hours"] * 3600 > 2 * seconds  # of two ranks, the start and the end as well
