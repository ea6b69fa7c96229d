"""`medtl crossval --run-dir s3://…` on a real S3 server: killed in its second fold and taken up, it is that of a disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from dying_runs import assert_same_bits
from faulty_proxy import Fault, Proxy
from s3_server import SECRET_KEY
from shard_sets import write_set
from stored_runs import copied

from medtl_dist.cli.main import run
from medtl_dist.store_folder import StoreFolder

pytestmark = [pytest.mark.store, pytest.mark.usefixtures("tiny_by_proxy")]
FOLDS = ("01-1", "01-2", "01-3")


def command(shards: str, place: str | Path, *more: str) -> list[str]:
    settings = (
        f"data.shards={shards}", "model.backbone=tiny", "train.threads=1", "train.epochs=2", "train.checkpoint_every_steps=3",
        "data.global_batch_size=6", "data.storage_timeout_s=2", "data.storage_retries=1",
    )  # fmt: skip
    given = [part for text in settings for part in ("--set", text)]
    return ["crossval", "--folds", "3", "--preset", "smoke", *given, "--run-dir", str(place), *more]


def test_killed_in_its_second_fold_and_without_a_store_in_its_third_it_is_the_one_of_a_disk(
    place: str, store: StoreFolder, proxy: Proxy, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shards = write_set(tmp_path / "set", {"train": [23, 21], "val": [20], "test": [4]}).folder
    near = tmp_path / "near" / "first"
    assert run(command(shards, near)) == 0

    script = [sys.executable, str(Path(__file__).with_name("killed_run.py"))]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    arguments = command(shards, place, "--resume")
    killed = subprocess.run([*script, "2@01-2", "3", *arguments], check=False, timeout=120, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert store.part("folds/01-2").names("checkpoints") != []
    first = {info.path: info.mtime_ns for info in store.files("folds/01-1/checkpoints")}
    assert store.exists("folds/01-1/predictions/held_out.parquet")
    assert store.names("sets") == ["01-2"]

    proxy.choose = lambda request: Fault("reset") if "folds/01-3/checkpoints/" in request.path else None
    capsys.readouterr()
    assert run(arguments) == 75
    message = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")][-1]
    assert message.startswith(f"error: {place}/folds/01-3/checkpoints")
    assert "--resume goes on" in message

    proxy.choose = lambda request: None
    assert run(arguments) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == f"page  {place}/crossval.html"
    assert "2 of 3 folds had already finished" in said.err
    assert {info.path: info.mtime_ns for info in store.files("folds/01-1/checkpoints")} == first
    assert store.names("sets") == []
    for name in FOLDS:
        fold = copied(store.part(f"folds/{name}"), tmp_path / "far" / name)
        assert_same_bits(near / "folds" / name, fold)
        held_out = "predictions/held_out.parquet"
        assert (fold / held_out).read_bytes() == (near / "folds" / name / held_out).read_bytes()
    assert store.read("predictions/oof.parquet") == (near / "predictions" / "oof.parquet").read_bytes()
    told, again = json.loads((near / "crossval.json").read_text()), json.loads(store.read("crossval.json"))
    assert [told[key] for key in ("auc", "auc_ci", "per_repeat")] == [
        again[key] for key in ("auc", "auc_ci", "per_repeat")
    ]
    for info in store.files():
        assert SECRET_KEY.encode() not in store.read(info.path.removeprefix(f"{store.path}/"))
