"""What a Ray Train worker answers to "go on?", without a cluster: the store, the barrier and the other ranks are stood in for."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from cluster import notices, ray_run, trial_ddp
from cluster.ray_run import RayRun, Why
from cluster.trial_ddp import DdpTrialRun
from medtl_dist.config import load_config
from medtl_dist.errors import ConfigError
from medtl_dist.run import Folder, Signal


@dataclass
class _Cluster:
    """Of the worker under test, and what the other ranks say."""

    rank: int = 0
    asked: bool = False
    preempted: bool = False
    others: Why = Why.NO_REASON
    looks: list[str] = field(default_factory=list)


@pytest.fixture
def around(monkeypatch: pytest.MonkeyPatch) -> _Cluster:
    it = _Cluster()

    def look(attempt: str) -> bool:
        it.looks.append(attempt)
        return it.asked

    monkeypatch.setattr(RayRun, "rank", property(lambda self: it.rank))
    monkeypatch.setattr(notices, "asked_to_stop", look)
    monkeypatch.setattr(notices, "own_signals", notices.Signals())
    monkeypatch.setattr(ray_run.collectives, "largest", lambda mine: max(mine, int(it.others)))
    monkeypatch.setattr(ray_run.ray.train, "get_preemption_info", lambda: object() if it.preempted else None)
    return it


@pytest.fixture
def run(tmp_path: Path) -> RayRun:
    return RayRun(Folder.local(tmp_path), "attempt-1")


def test_rank_0_looks_once_a_second_and_goes_on(around: _Cluster, run: RayRun) -> None:
    assert [run.poll() for _ in range(3)] == [Signal.GO_ON] * 3
    assert around.looks == ["attempt-1"]
    assert run.why is Why.NO_REASON


def test_a_driver_that_asks_is_heard(around: _Cluster, run: RayRun) -> None:
    around.asked = True
    assert run.poll() is Signal.CHECKPOINT_AND_STOP
    assert run.why is Why.ASKED


def test_other_ranks_never_look_and_follow(around: _Cluster, run: RayRun) -> None:
    around.rank, around.asked = 1, True
    assert run.poll() is Signal.GO_ON
    around.others = Why.ASKED
    assert run.poll() is Signal.CHECKPOINT_AND_STOP
    assert (around.looks, run.why) == ([], Why.ASKED)


def test_a_preemption_is_looked_for_only_when_all_ranks_do(around: _Cluster, run: RayRun) -> None:
    around.rank, around.preempted = 1, True
    assert run.poll() is Signal.GO_ON
    around.others = Why.LOOK
    assert run.poll() is Signal.CHECKPOINT_AND_STOP
    assert run.why is Why.PREEMPTED


def test_a_wish_of_the_driver_is_stronger_than_a_reason_to_go_on_elsewhere(around: _Cluster, run: RayRun) -> None:
    around.asked, around.preempted, around.others = True, True, Why.TERMINATED
    assert run.poll() is Signal.CHECKPOINT_AND_STOP
    assert run.why is Why.ASKED


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_of_a_trial_says_that_it_is_alive(
    around: _Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    around.rank = rank
    monkeypatch.setattr(trial_ddp.ray, "get", lambda asked: False)
    run, seen = DdpTrialRun(Folder.local(tmp_path), "attempt-1", trial=MagicMock()), []
    for every_s in (0.0, 1e9, 0.0):
        monkeypatch.setattr(trial_ddp, "BEAT_EVERY_S", every_s)
        assert run.poll() is Signal.GO_ON
        seen.append((tmp_path / ".alive").exists())
        (tmp_path / ".alive").unlink(missing_ok=True)
    assert seen == [rank == 0, False, rank == 0]


def test_a_worker_notes_its_own_sigterm(around: _Cluster, run: RayRun) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        notices.NoteSigterm().after_init_train_context()
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert run.poll() is Signal.CHECKPOINT_AND_STOP
    assert run.why is Why.TERMINATED


def test_the_first_ctrl_c_is_noted_and_the_second_acts() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with notices.noting_signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    seen: list[object] = []

    def elsewhere() -> None:
        with notices.noting_signals() as signals:
            seen.extend([signals.received, signal.getsignal(signal.SIGTERM)])

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [None, signal.getsignal(signal.SIGTERM)]


def test_elastic_bounds_need_a_restart() -> None:
    load_config(preset="smoke", overrides=["cluster.num_workers=4", "cluster.min_workers=2"])
    with pytest.raises(ConfigError, match="min_workers needs max_failures above 0"):
        load_config(
            preset="smoke", overrides=["cluster.num_workers=4", "cluster.min_workers=2", "cluster.max_failures=0"]
        )
