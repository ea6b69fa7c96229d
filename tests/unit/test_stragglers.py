"""Ranks that hold the others up: the rule on made-up figures, what is timed, and where it is told."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_sets import write_set

from medtl_dist import collectives
from medtl_dist.cli.main import run
from medtl_dist.config import load_config
from medtl_dist.run import Folder, LocalRun
from medtl_dist.train import clock as clock_module
from medtl_dist.train import losses, stragglers
from medtl_dist.train.clock import Clock, DeviceTime
from medtl_dist.train.loop import fit, train_step
from medtl_dist.train.session import Session
from medtl_dist.train.start import start, train_stream
from medtl_dist.train.stragglers import OwnTime, slow_ranks, slowness


def times(*forward_s: float, data_wait_s: dict[int, float] | None = None) -> list[OwnTime]:
    waits = data_wait_s or {}
    return [OwnTime(rank, f"node-{rank}", waits.get(rank, 0.0), s) for rank, s in enumerate(forward_s)]


@pytest.mark.parametrize(
    ("found", "step_s", "slow"),
    [
        (times(1.0), 3.0, []),  # alone
        (times(1.0, 1.6), 5.0, [1]),
        (times(1.0, 1.4), 5.0, []),
        (times(1.0, 1.1, 0.9, 2.0), 6.0, [3]),
        (times(2.0, 1.0, 1.0, 2.1, 1.0), 6.0, [0, 3]),
        (times(2.0, 2.0, 1.0, 1.0), 6.0, [0, 1]),  # a slow machine of two
        (times(2.0, 2.0, 2.0, 1.0), 6.0, []),  # most are slow: the pace of the run
        (times(1.0, 1.0, 1.0, data_wait_s={2: 0.8}), 3.5, [2]),  # slow data is as bad as a slow processor
        (times(1.0, 1.0, 1.0, data_wait_s={0: 0.8, 1: 0.8, 2: 0.8}), 3.5, []),  # but not where all wait for it
        (times(0.01, 0.01, 0.04), 2.0, []),  # four times the others', and nothing of a step
        (times(0.01, 0.01, 0.04), 0.5, [2]),
        (times(0.0, 0.0, 0.0), 0.0, []),  # no step was made
    ],
)
def test_slow_is_who_takes_half_as_long_again_as_the_others_do(
    found: list[OwnTime], step_s: float, slow: list[int]
) -> None:
    assert slow_ranks(found, step_s) == slow


SECONDS = st.floats(0.001, 100.0)


@settings(max_examples=50, deadline=None)
@given(st.lists(SECONDS, min_size=1, max_size=9), st.randoms())
def test_the_rule_knows_neither_order_nor_unit_and_names_half_at_most(seconds: list[float], random: Any) -> None:
    slow = set(slow_ranks(times(*seconds), 0.0))
    order = random.sample(range(len(seconds)), len(seconds))
    assert {order[i] for i in slow_ranks(times(*(seconds[i] for i in order)), 0.0)} == slow
    doubled = times(*(2 * s for s in seconds))  # exact in floating point
    assert set(slow_ranks(doubled, 0.0)) == slow
    assert len(slow) <= len(seconds) / 2
    assert min(range(len(seconds)), key=seconds.__getitem__) not in slow
    if slow:
        assert max(range(len(seconds)), key=seconds.__getitem__) in slow
    assert slowness(times(*([seconds[0]] * len(seconds)))) == [1.0] * len(seconds)


def test_a_straggler_is_slow_in_two_epochs_running(monkeypatch: pytest.MonkeyPatch) -> None:
    session = cast(Session, SimpleNamespace(run=SimpleNamespace(rank=1), slow_before=frozenset()))
    clock = Clock(num_steps=2, train_s=12.0)

    def epoch(*forward_s: float) -> tuple[list[int], dict[str, float]]:
        monkeypatch.setattr(collectives, "gather_to_all", lambda _own: times(*forward_s))
        rows, numbers = stragglers.watch(session, clock)
        return [row["rank"] for row in rows], numbers

    assert epoch(1.0, 2.0, 1.0) == ([], {"rank_slowness": 2.0, "rank_straggler": 0.0})
    assert epoch(1.0, 4.0, 1.0) == ([1], {"rank_slowness": 4.0, "rank_straggler": 1.0})
    assert epoch(9.0, 2.0, 1.0)[0] == []
    assert epoch(9.0, 2.0, 1.0) == ([0], {"rank_slowness": 2 / 9, "rank_straggler": 0.0})
    assert epoch(1.0, 1.0, 1.0)[0] == []
    assert epoch(9.0, 1.0, 1.0)[0] == []  # a pause in between starts anew


def test_a_ranks_own_time_is_its_data_and_its_forward_pass_per_step() -> None:
    clock = Clock(num_steps=4, forward=DeviceTime(seconds=2.0))
    clock.seconds |= {"data_wait": 1.0, "compute": 100.0, "communication": 100.0, "evaluation": 100.0}
    own = stragglers.own_time(3, clock)
    assert (own.rank, own.data_wait_s, own.forward_s, own.total_s) == (3, 0.25, 0.5, 0.75)
    assert own.host
    assert stragglers.own_time(0, Clock()).total_s == 0.0


@pytest.fixture
def config_of_set(tmp_path: Path) -> Any:
    dataset = write_set(tmp_path / "set", {"train": [11, 9, 6], "val": [9, 5]})
    return load_config(
        preset="smoke",
        overrides=[f"data.shards={dataset.folder}", "train.epochs=2", "train.threads=1", "data.loader_workers=0"],
    )


def test_what_is_timed_ends_before_gradients_are_exchanged(
    config_of_set: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that only the network moves: a second forward, a thousand backward, where DDP exchanges them."""
    now = [0.0]

    def advance(seconds: float) -> None:
        now[0] += seconds

    config = config_of_set.model_copy(
        update={"train": config_of_set.train.model_copy(update={"accumulation_steps": 2, "class_weights": "none"})}
    )
    session = start(config, LocalRun(Folder.local(tmp_path / "run"), torch.device("cpu")))
    try:
        session.network.model.train()
        batch = next(train_stream(session))
        parameter = next(p for p in session.network.model.parameters() if p.requires_grad)
        parameter.register_hook(lambda _gradient: advance(1000.0))
        session.network.model.register_forward_hook(lambda *_: advance(1.0))
        monkeypatch.setattr(clock_module.time, "monotonic", lambda: now[0])
        forward = DeviceTime(session.run.device)
        train_step(session, batch, losses.loss_weight(batch.labels, session.class_weights), forward)
        monkeypatch.undo()
    finally:
        session.loader.close()
        session.journal.close()
    assert now[0] >= 1002.0
    assert forward.total() == 2.0


class Passed:
    """A GPU's event, which has passed once it was waited for."""

    def __init__(self, *, enable_timing: bool) -> None:
        self.at: float | None = None
        self.passed = not enable_timing

    def record(self) -> None:
        EVENTS.append(self)
        self.at = 250.0 * len(EVENTS)

    def synchronize(self) -> None:
        self.passed = True

    def elapsed_time(self, end: Passed) -> float:
        assert end.passed
        assert end.at is not None
        assert self.at is not None
        return end.at - self.at


EVENTS: list[Passed] = []


def test_a_gpus_seconds_are_read_from_its_events_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    EVENTS.clear()
    monkeypatch.setattr(torch.cuda, "Event", Passed)
    forward = DeviceTime(torch.device("cuda"))
    for _ in range(3):
        with forward.during():
            pass
    assert not any(event.passed for event in EVENTS)  # the host waited for nothing
    assert forward.total() == forward.total() == 3 * 0.25
    for _ in range(1000):
        with forward.during():
            pass
    assert sum(not event.passed for event in EVENTS[1::2]) < 100  # and keeps no more than a few
    assert forward.total() == 1003 * 0.25


def test_a_straggler_is_named_in_the_log_and_by_status(
    config_of_set: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = collectives.gather_to_all

    def with_a_slow_one(value: Any) -> list[Any]:
        if not isinstance(value, OwnTime):
            return real(value)
        assert value.forward_s > 0
        return [value, OwnTime(1, "node-7", 0.5 * value.total_s + 1.0, 30.0 * value.total_s + 2.0)]

    monkeypatch.setattr(collectives, "gather_to_all", with_a_slow_one)
    local = LocalRun(Folder.local(tmp_path / "run"), torch.device("cpu"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(config_of_set.to_yaml())
    fit(config_of_set, local)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    rows = [line for line in lines if line["kind"] == "epoch"]
    assert [[(s["rank"], s["host"]) for s in row.get("stragglers", [])] for row in rows] == [
        [],
        [(1, "node-7")],
    ]
    assert all(0 < (report["rank_slowness"] or 0) < 1 and report["rank_straggler"] == 0 for report in local.reports)
    assert not any("stragglers" in report for report in local.reports)
    assert run(["status", str(tmp_path / "run")]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  slow: ")]
    assert len(told) == 1
    assert told[0].startswith("  slow: rank 1 on node-7, ")
    assert "times the others' own time a step (data " in told[0]
