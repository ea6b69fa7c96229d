"""desk ↔ Ray actors: warm worker processes take one trial after another, and the loop that never waits for only one of them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import ray
from ray.exceptions import RayActorError, RayError

from cluster.node_cache import on_this_node
from cluster.sweep_mirror import next_lease
from cluster.trial_desk import Desk
from cluster.trial_queue import prefix_of
from cluster.trial_run import Exchange, train_trial
from cluster.trial_state import Reserved, Trial
from medtl_dist.errors import UserError
from medtl_dist.storage import Folder
from medtl_dist.train.warm import Warm

_ROUND_S = 0.5


class TrialWorker:
    """The actor: one process that keeps its imports, weights and data from trial to trial.

    ``begin`` starts a trial in a thread here; ``news`` and ``go_on`` return the next that it says; the others come from beside.
    """

    def __init__(self, warm_options: Mapping[str, Any]) -> None:
        self._warm_options = warm_options
        self._warm: Warm | None = None
        self._exchange = Exchange()

    def begin(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        exchange = self._exchange = Exchange()
        this = ray.get_runtime_context().current_actor

        def run() -> None:
            if payload["num_workers"] > 1:
                from cluster.trial_ddp import train_ddp_trial

                exchange.finish(train_ddp_trial(payload, this))
            else:
                exchange.finish(self._train(payload, exchange))

        threading.Thread(target=run, name="trial", daemon=True).start()
        return {"kind": "begun"}

    def _train(self, payload: Mapping[str, Any], exchange: Exchange) -> dict[str, Any]:
        if self._warm is None:
            try:
                self._warm = Warm(**on_this_node(self._warm_options))
            except UserError as error:  # of this node: no trial can be trained here
                return {"state": "failed", "message": error.message}
        self._warm.cache_trials = payload["num_sharing"]
        return train_trial(payload, exchange, self._warm)

    def news(self) -> dict[str, Any]:
        return self._exchange.next()

    def go_on(self, stop: bool) -> dict[str, Any]:
        self._exchange.decide(stop)
        return self._exchange.next()

    def ask_stop(self) -> None:
        self._exchange.stop_asked.set()

    def post(self, row: Mapping[str, Any]) -> bool:
        """From rank 0 of a trial with several workers: an epoch's numbers; whether to stop."""
        self._exchange.say(row)
        return self._exchange.stop_asked.is_set()

    def asked(self) -> bool:
        """From rank 0 of a trial with several workers: whether it has been asked to stop."""
        return self._exchange.stop_asked.is_set()


@dataclass
class _Slot:
    """A place for one worker; its actor is made when there is a trial for it."""

    actor: Any = None
    number: int | None = None
    prefix: str | None = None
    news: Any = None  # the one call under way


@dataclass(frozen=True)
class Crew:
    """What every worker of a sweep is alike in. ``num_workers``: Ray Train workers of one trial."""

    place: Folder
    num_slots: int
    reserved: Reserved
    num_workers: int
    warm_options: Mapping[str, Any]

    def hire(self) -> Any:
        """A new worker process."""
        # A trial with several workers reserves for those; the actor that starts them only waits.
        alone = self.num_workers <= 1
        cpus, gpus = (self.reserved.cpus, self.reserved.gpus) if alone else (0, 0)
        options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, "max_concurrency": 8}
        return ray.remote(**options)(TrialWorker).remote(dict(self.warm_options))

    def payload_of(self, trial: Trial, num_sharing: int) -> dict[str, Any]:
        return {
            "num_sharing": num_sharing,
            "warm_options": dict(self.warm_options),
            "config": trial.spec.config.model_dump(mode="json"),
            "folder": f"{self.place.url}/{trial.spec.name}",
            "fence": next_lease(self.place, trial.spec.name),
            "num_workers": self.num_workers,
            "gpus_per_worker": self.reserved.gpus / self.num_workers,
        }


def drive(
    desk: Desk,
    crew: Crew,
    *,
    told_to_stop: Callable[[], bool],
    tick: Callable[[], None],
    grace_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run what waits at the desk until nothing does, or until told to stop and all that ran have stopped.

    ``grace_s``: how long the latter is waited for; a trial that has not stopped by then goes on from its last checkpoint.
    """
    slots = [_Slot() for _ in range(crew.num_slots)]
    stopping, asked_at = False, 0.0
    try:
        _fill(desk, crew, slots)
        tick()
        while busy := [slot for slot in slots if slot.number is not None]:
            ready, _ = ray.wait([slot.news for slot in busy], num_returns=1, timeout=_ROUND_S)
            if told_to_stop() and not stopping:
                stopping, asked_at = True, clock()
                for slot in busy:
                    slot.actor.ask_stop.remote()
            for slot in busy:
                if slot.news in ready:
                    _take_news(desk, slot)
            _end_silent(desk, slots)
            tick()  # a crash is told before its next try begins
            if not stopping:
                _fill(desk, crew, slots)
            elif clock() - asked_at > grace_s:
                break
    finally:
        for slot in slots:
            _end(slot)
        desk.closed()


def _fill(desk: Desk, crew: Crew, slots: list[_Slot]) -> None:
    """Give every free place a trial, as long as one waits."""
    for slot in slots:
        if slot.number is not None:
            continue
        trial = desk.next_for(slot.prefix)
        if trial is None:
            return
        if slot.actor is None:
            slot.actor = crew.hire()
        slot.number, slot.prefix = trial.number, prefix_of(trial.spec.config)
        desk.begun(trial.number)
        slot.news = slot.actor.begin.remote(crew.payload_of(trial, desk.num_sharing(trial)))


def _take_news(desk: Desk, slot: _Slot) -> None:
    assert slot.number is not None
    try:
        news: dict[str, Any] = cast("Any", ray.get(slot.news))
    except RayError as error:
        desk.lost(slot.number, _cause(error))
        _end(slot)
        return
    if news["kind"] == "begun":
        desk.up(slot.number)
        slot.news = slot.actor.news.remote()
        return
    if news["kind"] == "epoch":
        slot.news = slot.actor.go_on.remote(desk.heard(slot.number, news["row"]))
        return
    if desk.ended(slot.number, news):
        slot.number = slot.news = None
    else:  # after a crash nobody knows what the process still holds
        _end(slot)


def _end_silent(desk: Desk, slots: list[_Slot]) -> None:
    """A process that hangs does not die by itself, and its trial would never end."""
    for number in desk.silent():
        slot = next(slot for slot in slots if slot.number == number)
        _end(slot)
        desk.lost(number, "no sign of life for longer than tune.silence_timeout_s allows, so its process was ended")


def _end(slot: _Slot) -> None:
    if slot.actor is not None:
        with contextlib.suppress(RayError):
            ray.kill(slot.actor)
    slot.actor = slot.number = slot.prefix = slot.news = None


def _cause(error: RayError) -> str:
    if isinstance(error, RayActorError):
        return "its process died (killed, or out of memory)"
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]


def slots_on_cluster(reserved: Reserved, num_workers: int) -> int:
    """How many trials fit at once on the connected cluster."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return num_slots(nodes, reserved, num_workers)


def num_slots(nodes: list[dict[str, float]], reserved: Reserved, num_workers: int) -> int:
    """How many trials of ``num_workers`` workers fit at once: whole workers on each node, whole trials over all of them."""
    cpus, gpus = reserved.cpus / max(num_workers, 1), reserved.gpus / max(num_workers, 1)
    workers = 0
    for node in nodes:
        room = node.get("CPU", 0.0) / cpus
        if gpus > 0:
            whole = node.get("GPU", 0.0)
            # A worker's fraction never spans two devices.
            room = min(room, whole / gpus if gpus >= 1 else whole * int(1 / gpus + 1e-9))
        workers += int(room + 1e-9)
    return workers // max(num_workers, 1)
