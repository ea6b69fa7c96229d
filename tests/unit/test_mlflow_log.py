"""Numbers on an MLflow server (train/mlflow_log.py): MLflow's own client, on a folder and before servers that fail."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medtl_dist.config import Config, load_config
from medtl_dist.errors import ConfigError, UserError
from medtl_dist.storage import Folder
from medtl_dist.train import mlflow_log
from medtl_dist.train.mlflow_log import MlflowLog

pytest.importorskip("mlflow", reason="the extra mlflow is not installed")


def config_for(uri: str) -> Config:
    return load_config(preset="smoke", overrides=[f"train.mlflow_uri={uri}", "optim.lr=0.125"])


@contextlib.contextmanager
def logging_to(uri: str, folder: Path, notes: list[str]) -> Iterator[MlflowLog]:
    log = MlflowLog(config_for(uri), Folder.local(folder), notes.append)
    try:
        yield log
    finally:
        log.close()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return f"file://{tmp_path / 'mlruns'}"


def runs_in(store: str) -> list[Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name(mlflow_log.EXPERIMENT)
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def test_epochs_and_config_arrive_and_a_resumed_run_goes_on_in_the_same_place(store: str, tmp_path: Path) -> None:
    notes: list[str] = []
    for epoch, auc in ((0, 0.75), (1, 0.875)):
        with logging_to(store, tmp_path / "first", notes) as log:
            log.epoch({"val_auc": auc, "epoch": epoch, "checkpoint": "x", "val_loss": float("nan")}, 10 * (epoch + 1))
    assert notes == []
    [run] = runs_in(store)
    assert run.info.run_name == "first"
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"val_auc": 0.875, "epoch": 1}
    assert run.data.params["optim.lr"] == "0.125"

    from mlflow.tracking import MlflowClient

    history = MlflowClient(tracking_uri=store).get_metric_history(run.info.run_id, "val_auc")
    assert [(point.step, point.value) for point in history] == [(10, 0.75), (20, 0.875)]


def test_a_server_that_is_away_costs_a_note_and_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # nobody listens
        notes: list[str] = []
        with logging_to(f"http://127.0.0.1:{held.getsockname()[1]}", tmp_path / "run", notes) as log:
            log.epoch({"val_auc": 0.5}, 1)
        assert len(notes) == 1
        assert notes[0].startswith("MLflow: the numbers are not logged there any more (")


def test_a_server_that_never_answers_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_log, "_CLOSE_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        with logging_to(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path / "run", []) as log:
            log.epoch({"val_auc": 0.5}, 1)
        assert time.monotonic() - began < 30  # its import, and not the client's time-out after time-out


def test_an_address_with_a_password_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as refused:
        config_for("https://user:canary@tracking.example")
    assert "canary" not in refused.value.message


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    with pytest.raises(UserError, match=r"pip install \"medtl_dist\[mlflow\]\""):
        MlflowLog(config_for("http://tracking.example"), Folder.local(tmp_path), print)


def test_a_training_logs_its_epochs(store: str, tmp_path: Path) -> None:
    from shard_sets import write_set

    from medtl_dist.run import LocalRun
    from medtl_dist.train.loop import fit

    shards = write_set(tmp_path / "set", {"train": [16], "val": [8]}, size=(32, 32)).folder
    given = [f"train.mlflow_uri={store}", f"data.shards={shards}", "train.threads=1", "data.loader_workers=0"]
    fit(load_config(preset="smoke", overrides=given), run := LocalRun(Folder.local(tmp_path / "run")))
    [logged] = runs_in(store)
    assert logged.info.run_name == "run"
    assert logged.data.metrics["val_auc"] == run.reports[-1]["val_auc"]
    assert logged.data.metrics["train_loss"] == run.reports[-1]["train_loss"]
