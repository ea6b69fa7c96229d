"""The loop over a sweep's workers, with Ray stood in for: who hangs is ended, and a driver that is to stop does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from test_trials import Clock, desk_of, row, states

from cluster import trial_workers
from cluster.trial_desk import Desk
from cluster.trial_state import Trial
from cluster.trial_workers import drive


class Ray:
    """Actors whose calls are answered when ``answer`` says what: the call's name and the trial's number to a reply, or None."""

    def __init__(self, clock: Clock, answer: Callable[[str, int], dict[str, Any] | None]) -> None:
        self._clock, self._answer = clock, answer
        self.hired: list[MagicMock] = []
        self.killed: list[MagicMock] = []

    def hire(self) -> MagicMock:
        actor = MagicMock()
        actor.begin.remote = lambda number: setattr(actor, "number", number) or ("begin", number)
        for name in ("news", "go_on"):
            getattr(actor, name).remote = lambda *_, name=name: (name, actor.number)
        self.hired.append(actor)
        return actor

    def wait(self, calls: list[tuple[str, Any]], **_: Any) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
        self._clock.now += 10
        assert self._clock.now < 1e5, "the loop never ends"
        return [call for call in calls if self.reply(call) is not None], []

    def get(self, call: tuple[str, Any]) -> dict[str, Any]:
        found = self.reply(call)
        assert found is not None
        return found

    def reply(self, call: tuple[str, Any]) -> dict[str, Any] | None:
        return {"kind": "begun"} if call[0] == "begin" else self._answer(*call)

    def kill(self, actor: MagicMock) -> None:
        self.killed.append(actor)


class Crew:
    """Two places; all that a worker is told is the number of its trial."""

    num_slots = 2

    def __init__(self, ray: Ray) -> None:
        self._ray = ray

    def hire(self) -> MagicMock:
        return self._ray.hire()

    def payload_of(self, trial: Trial, num_sharing: int) -> int:
        return trial.number


def driven(
    monkeypatch: pytest.MonkeyPatch, desk: Desk, clock: Clock, answer: Callable[[str, int], dict[str, Any] | None],
    *, stop_at_s: float = 1e9,
) -> tuple[Ray, list[list[str]]]:  # fmt: skip
    """The loop to its end, and the states that a user was shown."""
    ray, shown = Ray(clock, answer), []
    monkeypatch.setattr(trial_workers, "ray", ray)
    crew: Any = Crew(ray)
    drive(
        desk, crew, told_to_stop=lambda: clock.now >= stop_at_s, tick=lambda: shown.append(states(desk)), grace_s=120,
        clock=clock,
    )  # fmt: skip
    return ray, shown


def test_a_process_that_hangs_is_ended_and_its_trial_tried_again_in_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    desk = desk_of(tmp_path, 2, clock=clock, silence_s=1000.0)

    def answer(call: str, number: int) -> dict[str, Any] | None:
        if number == 0 and clock.now < 1500:  # its first process never says anything
            return None
        return {"kind": "end", "state": "finished"}

    ray, shown = driven(monkeypatch, desk, clock, answer)
    assert [(o.state, o.attempts) for o in desk.outcomes()] == [("finished", 2), ("finished", 1)]
    assert ray.killed[0] is ray.hired[0]
    assert ["waiting", "finished"] in shown  # told before the next try
    assert 1000 < clock.now < 1600


def test_a_process_that_hangs_at_every_try_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    desk = desk_of(tmp_path, 1, clock=clock, silence_s=1000.0)
    ray, _ = driven(monkeypatch, desk, clock, lambda call, number: None)
    (outcome,) = desk.outcomes()
    assert (outcome.state, outcome.attempts, len(ray.killed)) == ("failed", 2, 2)
    assert (outcome.reason or "").startswith("crashed in 2 tries: no sign of life")


def test_told_to_stop_it_waits_for_checkpoints_but_not_for_who_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    desk = desk_of(tmp_path, 3, clock=clock)

    def answer(call: str, number: int) -> dict[str, Any] | None:
        if number == 1 and clock.now >= 100:
            return {"kind": "end", "state": "stopped"}
        return {"kind": "epoch", "row": row(0, 0.5)} if number == 1 and call == "news" and clock.now < 30 else None

    ray, _ = driven(monkeypatch, desk, clock, answer, stop_at_s=50)
    assert states(desk) == ["waiting", "waiting", "waiting"]
    assert [len(o.curve) for o in desk.outcomes()] == [0, 1, 0]
    assert len(ray.hired) == 2  # nothing new was begun
    assert [actor.ask_stop.remote.call_count for actor in ray.hired] == [1, 1]
    assert set(map(id, ray.killed)) == set(map(id, ray.hired))
    assert 50 + 120 < clock.now < 50 + 120 + 30
