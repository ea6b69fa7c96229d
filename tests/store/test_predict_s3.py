"""`medtl predict` of a set, and with a run, in a real S3 server: the scores of the same on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from conftest import put
from faulty_proxy import Fault, Proxy
from predict_runs import config_on, pack_table, train, write_images
from s3_server import S3Server
from stored_runs import copied

from medtl_dist.cli.main import run as medtl
from medtl_dist.data.shards import open_dataset
from medtl_dist.errors import Interrupted
from medtl_dist.run import LocalRun
from medtl_dist.storage import StorageOptions
from medtl_dist.store_folder import store_folder
from medtl_dist.train.loop import fit
from medtl_dist.train.predict import PredictOptions, predict
from medtl_dist.train.run_copy import scorable
from medtl_dist.train.run_store import opened_run

pytestmark = [pytest.mark.store, pytest.mark.usefixtures("tiny_by_proxy")]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return pack_table(write_images(tmp_path / "images"), tmp_path / "set")


def _trained_at(place: str, shards: Path) -> None:
    config = config_on(shards, "model.frozen_depth=2")
    with opened_run(place, config, resume=False, say=print) as folder:
        fit(config, LocalRun(folder))


def test_a_set_in_a_store_scores_as_on_disk(tmp_path: Path, shards: Path, address: str, s3: S3Server) -> None:
    run = train(shards, tmp_path / "run")
    put(open_dataset(shards), address, s3)
    options = PredictOptions(part_size=16)
    predict(run, str(shards), tmp_path / "disk.parquet", options)
    outcome = predict(run, address, tmp_path / "store.parquet", options)
    assert outcome.scored == 48
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "store.parquet"), pd.read_parquet(tmp_path / "disk.parquet"), check_exact=True
    )


def test_a_run_in_a_store_is_used_as_on_disk(
    tmp_path: Path, shards: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _trained_at(place, shards)
    store = store_folder(place, StorageOptions())
    near = copied(store, tmp_path / "near" / "first")
    before = {info.path: info.size for info in store.files()}
    for where, name in ((place, "far"), (str(near), "near")):
        command = [
            "predict",
            where,
            str(tmp_path / "images" / "labels.csv"),
            "--out",
            str(tmp_path / f"{name}.parquet"),
        ]
        assert medtl(command) == 0
        assert medtl(["export", where, "--out", str(tmp_path / f"{name}.safetensors")]) == 0
    for end in ("parquet", "safetensors"):
        assert (tmp_path / f"far.{end}").read_bytes() == (tmp_path / f"near.{end}").read_bytes()
    capsys.readouterr()
    assert medtl(["compare", str(near), place, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["comparison"]["difference"] == 0
    assert {info.path: info.size for info in store.files()} == before

    pack_table(write_images(tmp_path / "others", 24, seed=7), tmp_path / "elsewhere")
    for where in (place, str(near)):
        assert medtl(["evaluate", where, "--data", str(tmp_path / "elsewhere")]) == 0
        told = capsys.readouterr().out
        assert "its test split  opened 1 time by 1 configuration" in told
        assert told.endswith(f"page  {where}/external/elsewhere/report.html\n")
    for split in ("train", "val", "test"):
        name = f"external/elsewhere/predictions/{split}.parquet"
        assert store.read(name) == (near / name).read_bytes()
    assert json.loads(store.read(max(f".lease/{name}" for name in store.names(".lease"))))["released"] is True
    predict(place, str(shards), tmp_path / "set.parquet", PredictOptions(part_size=16))
    val = pd.read_parquet(near / "predictions" / "val.parquet")
    scores = pd.read_parquet(tmp_path / "set.parquet")
    assert (scores[scores.split == "val"].logit_SICK.to_numpy() == val.logit_SICK.to_numpy()).all()


def test_a_store_that_refuses_or_is_gone_is_one_line(
    tmp_path: Path,
    shards: Path,
    place: str,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _trained_at(place, shards)
    commands = [
        ["predict", place, str(tmp_path / "images"), "--out", str(tmp_path / "scores.parquet")],
        ["export", place, "--out", str(tmp_path / "model.safetensors")],
        ["compare", place, place],
        ["evaluate", place, "--data", str(shards)],
    ]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "another")
        for command in commands:
            assert medtl(command) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"error: {place}/")
            assert "access refused" in line
    store = store_folder(place, StorageOptions(timeout_s=1.0, retries=0))
    # Gone in the midst of the checkpoint: nothing is half there afterwards.
    proxy.choose = lambda request: Fault("reset", 0) if "frozen.safetensors" in request.path else None
    with pytest.raises(Interrupted, match=rf"^{place}/checkpoints/\d+-000001/frozen.safetensors can't be read"):
        scorable(store).__enter__()
