"""`medtl train --run-dir s3://…` on a real S3 server: the same run as on disk, through kills and the store's faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import assert_links
from dying_runs import assert_same_bits
from faulty_proxy import Fault, Proxy, Request
from s3_server import SECRET_KEY
from shard_sets import write_set
from stored_runs import copied

from medtl_dist.cli.main import run
from medtl_dist.store_folder import StoreFolder

pytestmark = [pytest.mark.store, pytest.mark.usefixtures("tiny_by_proxy")]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """60 training images: 10 steps an epoch."""
    place = tmp_path_factory.mktemp("shards") / "set"
    return write_set(place, {"train": [40, 20], "val": [12], "test": [12]}, size=(32, 32)).folder


def command(shards: str, run_dir: str | Path, *more: str) -> list[str]:
    fixed = ("model.backbone=tiny", "train.threads=1", "data.global_batch_size=6", "train.checkpoint_every_steps=3")
    settings = [part for text in (*fixed, f"data.shards={shards}") for part in ("--set", text)]
    return ["train", "--preset", "smoke", *settings, "--run-dir", str(run_dir), *more]


def impatient(*more: str) -> tuple[str, ...]:
    return ("--set", "data.storage_timeout_s=1", "--set", "data.storage_retries=1", *more)


def test_a_run_in_a_store_is_the_run_on_disk(
    shards: str, place: str, store: StoreFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command(shards, tmp_path / "near")) == 0
    capsys.readouterr()
    assert run(command(shards, place, "--test")) == 0
    said = capsys.readouterr()
    assert f"report {place}/report.html" in said.out
    assert "epoch 2: train loss" in said.err

    names = set(store.names())
    assert {"config.yaml", "log.jsonl", "results.json", "history.parquet", "report.html", "events"} <= names
    assert "progress.json" not in names
    far = copied(store, tmp_path / "far")
    assert_same_bits(tmp_path / "near", far)
    assert (far / "report.html").read_text().startswith("<!DOCTYPE html>")
    steps = [path.name for path in sorted((far / "checkpoints").iterdir())]
    assert steps == [path.name for path in sorted((tmp_path / "near" / "checkpoints").iterdir())]
    manifest = json.loads(store.read(f"checkpoints/{steps[-1]}-000001/manifest.json"))
    assert manifest["fence"] == 1
    assert any((far / "events").iterdir())
    assert json.loads((far / "results.json").read_text())["test_openings"] == {"count": 1, "configurations": 1}
    for path in far.rglob("*"):
        assert path.is_dir() or SECRET_KEY.encode() not in path.read_bytes()

    store.write("budget.json", b'{"max_gpu_hours": 8.0, "gpu_hours": 1.5}')
    assert run(["status", place, "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["state"], len(status["epochs"]), status["run"]) == ("finished", 2, "first")
    assert status["budget"] == {"max_gpu_hours": 8.0, "gpu_hours": 1.5}
    assert status["checkpoints"] == [int(step) for step in steps]
    store.delete("report.html")
    assert run(["report", place]) == 0
    assert store.exists("report.html")
    assert run(["evaluate", place, "--split", "test"]) == 0
    assert "opened 2 times by 1 configuration\n" in capsys.readouterr().out
    assert run(command(shards, place, "--resume")) == 0
    assert f"{place} had already finished." in capsys.readouterr().err
    # It was held three times, and each time released.
    assert json.loads(store.read(".lease/00000002"))["released"] is True


def test_sigkill_in_an_epoch_then_the_same_command_equals_an_undisturbed_run(
    shards: str,
    place: str,
    store: StoreFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run(command(shards, tmp_path / "near")) == 0
    script = [sys.executable, str(Path(__file__).with_name("killed_run.py"))]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    arguments = command(shards, place, "--resume")
    killed = subprocess.run([*script, "3", "10", *arguments], check=False, timeout=120, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [name[:8] for name in store.names("checkpoints")] == ["00000010", "00000012"]
    capsys.readouterr()
    assert run(arguments) == 0
    said = capsys.readouterr().err
    assert "waiting up to" not in said  # its process was of this machine, and is no more
    assert "resumed at epoch 1, step 2, from checkpoint 12" in said
    assert_same_bits(tmp_path / "near", copied(store, tmp_path / "far"))
    assert store.names("checkpoints")[-1] == "00000020-000002"


def test_a_file_is_linked_by_a_copy(store: StoreFolder) -> None:
    assert_links(store)


def test_the_stores_hiccups_do_not_change_a_run(
    shards: str, place: str, store: StoreFolder, proxy: Proxy, tmp_path: Path
) -> None:
    kinds = [Fault("503"), Fault("reset", 0), Fault("delay", 0.2), Fault("503")]
    number = 0

    def now_and_then(request: Request) -> Fault | None:
        nonlocal number
        number += 1
        return kinds[number // 19 % len(kinds)] if number % 19 == 0 else None

    assert run(command(shards, tmp_path / "near")) == 0
    proxy.choose = now_and_then
    assert run(command(shards, place)) == 0
    assert number > 100
    assert_same_bits(tmp_path / "near", copied(store, tmp_path / "far"))


@pytest.mark.parametrize("kind", ["reset", "stall"])
def test_a_store_that_is_gone_ends_the_run_in_bounded_time_and_it_goes_on_later(
    shards: str,
    place: str,
    store: StoreFolder,
    proxy: Proxy,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    def gone_after_a_checkpoint(request: Request) -> Fault | None:
        return Fault(kind) if proxy.count("manifest.json", "PUT", "POST") >= 2 else None

    proxy.choose = gone_after_a_checkpoint
    began = time.monotonic()
    assert run(command(shards, place, *impatient())) == 75
    assert time.monotonic() - began < 40
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"error: {place}/")
    assert "with --resume goes on" in message
    proxy.choose = lambda request: None
    assert run(command(shards, place, *impatient("--resume"))) == 0
    assert "from checkpoint " in capsys.readouterr().err
    assert run(command(shards, tmp_path / "near")) == 0
    assert_same_bits(tmp_path / "near", copied(store, tmp_path / "far"))


def test_mistakes_are_one_line(
    shards: str, place: str, store: StoreFolder, proxy: Proxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(code: int, part: str, *arguments: str) -> None:
        assert run(list(arguments)) == code
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert part in line

    fails(2, f"{place} is not a run folder: it has no config.yaml", "status", place)
    fails(2, f"{place} is not a run folder: it has no config.yaml", "report", place)
    fails(2, "no such bucket", *command(shards, "s3://nobody-has-this/runs/first"))
    fails(2, "s3://sets is a whole bucket", *command(shards, "s3://sets"))
    fails(2, "a web server can only be read from", *command(shards, "https://127.0.0.1/run"))
    store.write("note.txt", b"somebody's")
    fails(2, f"{place} is not a run folder, but it is not empty", *command(shards, place))
    store.delete("note.txt")
    assert run(command(shards, place, "--set", "train.epochs=1")) == 0
    fails(2, "already holds a run", *command(shards, place))
    fails(2, "train.epochs: 1 -> 2", *command(shards, place, "--resume"))
    proxy.choose = lambda request: Fault("403") if request.method == "PUT" else None
    fails(2, "access refused", *command(shards, f"{place}-2"))
