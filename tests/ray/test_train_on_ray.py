"""The main job on Ray Train: two workers, real X-rays, and what comes back from a worker that cannot go on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from kept_weights import weights_in
from ranks import run_ranks
from shard_sets import write_set
from sklearn.metrics import average_precision_score, roc_auc_score

from medtl_dist.config import Config, load_config
from medtl_dist.data.shards import read_split
from medtl_dist.run import Folder, LocalRun
from medtl_dist.train.loop import fit

pytestmark = pytest.mark.ray

_ROOT = Path(__file__).resolve().parents[2]
_DATA = Path(os.environ.get("MEDTL_DATA_DIR", _ROOT.parent / "shared" / "data"))


def _medtl(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, against a cluster of its own (token authentication, loopback)."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "medtl_dist.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)


def _fit_locally(rank: int, world_size: int, config: Config, folder: str) -> None:
    fit(config, LocalRun(Folder.local(folder), torch.device("cpu"), rank=rank, world_size=world_size, local_rank=rank))


def test_ray_workers_do_what_spawned_processes_do_bit_for_bit(tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "set", {"train": [11, 9, 6], "val": [9, 5]})
    options = [f"data.shards={dataset.folder}", "train.threads=1", "train.epochs=2", "cluster.num_workers=2"]
    config = load_config(preset="smoke", overrides=options)
    run_ranks(2, _fit_locally, config, str(tmp_path / "local"))
    done = _medtl(
        "train", "--preset", "smoke", *(part for o in options for part in ("--set", o)), "--run-dir", tmp_path / "ray"
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ray" / ".ray").exists()
    for name in sorted((tmp_path / "local" / "checkpoints").iterdir()):
        ours = weights_in(name)
        for key, tensor in weights_in(tmp_path / "ray" / "checkpoints" / name.name).items():
            assert torch.equal(tensor, ours[key]), key
    results = [json.loads((tmp_path / run / "results.json").read_text()) for run in ("local", "ray")]
    assert results[0]["splits"] == results[1]["splits"]


def test_damage_found_by_a_worker_is_one_line_and_burns_no_retry(tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "set", {"train": [11, 9, 6], "val": [9, 5]})
    row = read_split(dataset, "train", columns=["key", "shard", "offset", "size"]).to_pylist()[3]
    with (tmp_path / "set" / row["shard"]).open("r+b") as tar:
        tar.seek(row["offset"] + row["size"] // 2)
        tar.write(b"\xff\x00\xff")
    done = _medtl(
        "train", "--preset", "smoke", "--set", f"data.shards={dataset.folder}", "--set", "cluster.num_workers=2",
        "--run-dir", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert row["key"].hex() in errors[0]
    assert "Traceback" not in done.stderr
    notes = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert sum("random initial weights" in note.get("text", "") for note in notes) == 1  # one attempt


@pytest.mark.skipif(not (_DATA / "kermany_cxr_224").is_dir(), reason="no kermany_cxr_224 in MEDTL_DATA_DIR")
def test_real_x_rays_from_files_to_report(tmp_path: Path) -> None:
    shards, folder = tmp_path / "set", tmp_path / "run"
    rows = pd.read_csv(_DATA / "kermany_cxr_224" / "labels.csv")
    some = (rows.split == "test") | rows.patient_id.isin(rows.patient_id.unique()[:600])
    rows[some].to_csv(tmp_path / "labels.csv", index=False)
    packed = _medtl(
        "data", "pack", tmp_path / "labels.csv", "--image-root", _DATA / "kermany_cxr_224", "--out", shards,
        "--label-col", "class", "--group-col", "split+patient_id",
        "--split-col", "split", "--image-size", "32",
    )  # fmt: skip
    assert packed.returncode == 0, packed.stderr
    done = _medtl(
        "train", "--preset", "smoke", "--set", f"data.shards={shards}", "--set", "data.global_batch_size=32",
        "--set", "train.epochs=1", "--set", "cluster.num_workers=2", "--run-dir", folder, "--test",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "results.json").read_text())
    index = pq.read_table(shards / "index.parquet").to_pandas()
    assert (index.split == "test").sum() == 624
    for split in ("val", "test"):
        table = pq.read_table(folder / "predictions" / f"{split}.parquet").to_pandas()
        assert table.key.is_unique
        assert set(table.key) == {key.hex() for key in index[index.split == split].key}
        entry = results["splits"][split]
        assert entry["auc"] == pytest.approx(roc_auc_score(table.label, table.logit_PNEUMONIA), abs=1e-12)
        expected = average_precision_score(table.label, table.logit_PNEUMONIA)
        assert entry["average_precision"] == pytest.approx(expected, abs=1e-12)
    assert results["training"]["world_size"] == 2
    assert results["splits"]["test"]["n_groups"] == index[index.split == "test"].group.nunique()
    assert (folder / "report.html").is_file()
    shutil.rmtree(shards)
    assert _medtl("report", folder).returncode == 0  # from the run folder alone
