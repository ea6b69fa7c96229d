"""One trial in this process, driven from another thread as an actor would be: turns, stops, resume, ends."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dying_runs import assert_same_bits, run_in, small_config
from shard_sets import write_set
from tiny_backbone import tiny_registered

from cluster.trial_run import Exchange, TrialRun, train_trial
from cluster.trial_state import signs_of
from medtl_dist.config import Config
from medtl_dist.run import Folder, Run
from medtl_dist.train.loop import fit
from medtl_dist.train.run_folder import opened_run_folder
from medtl_dist.train.warm import Warm

_TURN_S = 60.0


@pytest.fixture(autouse=True)
def _tiny() -> Iterator[None]:
    with tiny_registered():
        yield


@pytest.fixture
def shards(tmp_path: Path) -> str:
    return str(write_set(tmp_path / "set", {"train": [11, 9, 6], "val": [9, 5]}).folder)


@contextlib.contextmanager
def training(config: Config, folder: Path, warm: Warm | None = None) -> Iterator[Exchange]:
    """The trial in a thread; it has ended with the block."""
    exchange = Exchange()
    payload = {"config": config.model_dump(mode="json"), "folder": str(folder)}
    thread = threading.Thread(
        target=lambda: exchange.finish(train_trial(payload, exchange, warm or Warm())), daemon=True
    )
    thread.start()
    yield exchange
    thread.join(_TURN_S)
    assert not thread.is_alive()


def drive(exchange: Exchange, stop_after: int | None = None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The epochs told, and the end; asked to stop after so many epochs."""
    rows: list[dict[str, Any]] = []
    while True:
        news = exchange.next()
        if news["kind"] == "end":
            return rows, news
        rows.append(news["row"])
        exchange.decide(len(rows) == stop_after)


def test_a_trial_run_answers_the_core_s_question(tmp_path: Path) -> None:
    run = TrialRun(Folder.local(tmp_path), Exchange())
    assert isinstance(run, Run)
    assert (run.rank, run.world_size, run.local_rank) == (0, 1, 0)
    assert isinstance(run.device, torch.device)


def test_a_trial_that_is_polled_says_that_it_is_alive_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen = TrialRun(Folder.local(tmp_path), Exchange()), []
    for every_s in (0.0, 1e9, 0.0):
        monkeypatch.setattr("cluster.trial_run.BEAT_EVERY_S", every_s)
        run.poll()
        seen.append(signs_of(tmp_path))
        os.utime(tmp_path / ".alive", (0, 0))
    assert [signs[0][0] > 0 for signs in seen] == [True, False, True]


def test_a_trial_is_an_ordinary_run_to_the_last_bit(shards: str, tmp_path: Path) -> None:
    config = small_config(shards)
    fit(config, run_in(tmp_path / "plain"))
    with training(config, tmp_path / "trial", Warm(keep_epoch_scores=True)) as exchange:
        rows, end = drive(exchange)
    assert [row["epoch"] for row in rows] == [0, 1]
    assert end["state"] == "finished"
    assert_same_bits(tmp_path / "plain", tmp_path / "trial")
    assert len(list((tmp_path / "trial" / "predictions" / "epochs").iterdir())) == 2


def test_it_waits_for_the_driver_after_each_epoch_and_stops_when_told(shards: str, tmp_path: Path) -> None:
    """Stopped after one epoch and then gone on with: the same bits as without the stop."""
    config = small_config(shards)
    fit(config, run_in(tmp_path / "plain"))
    with training(config, tmp_path / "trial") as exchange:
        rows, end = drive(exchange, stop_after=1)
    assert len(rows) == 1
    assert end["state"] == "stopped"
    assert not (tmp_path / "trial" / "results.json").exists()
    with training(config, tmp_path / "trial") as exchange:
        rows, end = drive(exchange)
    assert [row["epoch"] for row in rows] == [1]
    assert end["state"] == "finished"
    assert_same_bits(tmp_path / "plain", tmp_path / "trial")
    with training(config, tmp_path / "trial") as exchange:
        assert drive(exchange) == ([], {"kind": "end", "state": "finished"})  # not trained again


def test_a_stop_from_beside_is_heard_within_the_epoch(shards: str, tmp_path: Path) -> None:
    config = small_config(shards, "data.global_batch_size=2")  # 13 steps: polls at 5 and 10
    exchange = Exchange()
    exchange.stop_asked.set()
    payload = {"config": config.model_dump(mode="json"), "folder": str(tmp_path / "trial")}
    end = train_trial(payload, exchange, Warm())
    assert end["state"] == "stopped"
    assert "epoch 0, after step 5" in end["message"]


def test_what_the_same_run_would_do_again_is_told_as_hopeless(shards: str, tmp_path: Path) -> None:
    with training(small_config(shards, "optim.lr=1e30"), tmp_path / "nan") as exchange:
        _, end = drive(exchange)
    assert end["state"] == "failed"
    assert "the loss was not finite in 3 steps in a row" in end["message"]
    with training(small_config(str(tmp_path / "no_set")), tmp_path / "none") as exchange:
        _, end = drive(exchange)
    assert end["state"] == "failed"


def test_what_may_go_well_another_time_is_told_as_a_crash(shards: str, tmp_path: Path) -> None:
    (tmp_path / "trial").mkdir()
    config = small_config(shards)
    (tmp_path / "trial" / "config.yaml").write_text(config.to_yaml())
    (tmp_path / "trial" / "events").write_text("a file where a folder should be")
    with training(config, tmp_path / "trial") as exchange:
        rows, end = drive(exchange)
    assert (rows, end["state"]) == ([], "crashed")
    assert "Error" in end["message"]
    assert ", line " in end["message"]


def test_two_never_write_in_one_folder(shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.trial_place.PREDECESSOR_S", 0.3)
    config = small_config(shards)
    with opened_run_folder(tmp_path / "trial", config, resume=True), training(config, tmp_path / "trial") as exchange:
        _, end = drive(exchange)
    assert end["state"] == "failed"
    assert "another process" in end["message"]
