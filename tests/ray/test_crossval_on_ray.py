"""Folds at once on a local Ray: the same scores as one after another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from shard_sets import write_set

pytestmark = pytest.mark.ray


def _crossval(shards: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "medtl_dist.cli.main", "crossval", "--folds", "3", "--preset", "smoke"]
    settings = (f"data.shards={shards}", "train.threads=1", "train.epochs=1")
    command += [part for text in settings for part in ("--set", text)]
    command += ["--run-dir", str(folder), *more]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)


def test_folds_at_once_score_as_folds_one_after_another(tmp_path: Path) -> None:
    shards = write_set(tmp_path / "set", {"train": [13, 11], "val": [10], "test": [4]}).folder
    for name, more in (("turns", []), ("at_once", ["--parallel"])):
        done = _crossval(shards, tmp_path / name, *more)
        assert done.returncode == 0, done.stderr
    turns, at_once = (pq.read_table(tmp_path / name / "predictions" / "oof.parquet") for name in ("turns", "at_once"))
    assert turns.num_rows == 34
    assert at_once.equals(turns)
    assert not (tmp_path / "at_once" / "sets").exists()
    assert list((tmp_path / "at_once" / "trials").iterdir()) == []
    again = _crossval(shards, tmp_path / "at_once", "--parallel", "--resume")
    assert again.returncode == 0, again.stderr
    assert "3 of 3 folds had already finished" in again.stderr
