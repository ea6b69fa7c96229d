"""Trials that hang: which sign of life counts, how often it is looked for, and who is told to have shown none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from test_trials import Clock, desk_of, log_epochs, on_disk, row

from cluster.trial_state import beat, trial_name


def test_a_trial_without_a_sign_of_life_is_told_and_no_other(tmp_path: Path) -> None:
    """0 tells its epochs, 1 only writes its log, 2 only says that it is alive, 3 says nothing; 4's worker is not there yet."""
    clock = Clock()
    desk = desk_of(tmp_path, 6, clock=clock, silence_s=100.0)
    for number in range(5):
        desk.begun(number)
    clock.now = 500.0
    assert desk.silent() == []
    for number in range(4):
        desk.up(number)
    for epoch in range(2):
        clock.now += 60
        desk.heard(0, row(epoch, 0.5))
        log_epochs(tmp_path, 1, [row(n, 0.5) for n in range(epoch + 1)])
        beat(tmp_path / trial_name(2))
        os.utime(tmp_path / trial_name(2) / ".alive", (epoch, epoch))  # whatever that host's clock says
        assert desk.silent() == [[], [3]][epoch]
    desk.lost(3, "no sign of life")
    assert on_disk(tmp_path, 3)["reason"] == "crashed, to be tried again: no sign of life"
    assert [o.attempts for o in desk.outcomes()] == [1, 1, 1, 2, 1, 1]
    desk.begun(3)
    clock.now += 90
    desk.up(3)  # again, in a new process
    clock.now += 20
    assert desk.silent() == [0, 1, 2]
    clock.now += 90
    assert desk.silent() == [0, 1, 2, 3]
    for number in range(4):
        desk.ended(number, {"state": "finished"})
    clock.now += 1000
    assert desk.silent() == []


def test_without_a_limit_a_trial_is_waited_for(tmp_path: Path) -> None:
    clock = Clock()
    desk = desk_of(tmp_path, 1, clock=clock)
    desk.begun(0)
    desk.up(0)
    clock.now = 1e9
    assert desk.silent() == []


def test_signs_of_life_are_looked_for_now_and_then_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look is a question to a shared file system; the loop asks twice a second."""
    clock, looks = Clock(), []
    monkeypatch.setattr("cluster.trial_desk.signs_of", lambda place: looks.append(clock.now) or ())
    desk = desk_of(tmp_path, 1, clock=clock, silence_s=7200.0)
    desk.begun(0)
    desk.up(0)
    looks.clear()
    for _ in range(240):
        clock.now += 0.5
        assert desk.silent() == []
    assert looks == [30.0, 60.0, 90.0, 120.0]
