"""A sweep whose driver dies where a test says, in a process of its own, and is taken up: the same sweep. Without Ray."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

from dying_runs import small_config
from shard_sets import write_set
from tiny_backbone import tiny_registered

from cluster.trial_desk import Desk
from cluster.trial_run import Exchange, train_trial
from cluster.trial_state import Reserved, TrialSpec, trial_name
from medtl_dist.sweep.outcome import Outcome
from medtl_dist.train.warm import Warm

_RATES = (0.05, 0.0001, 0.01)


class Second:
    """Stops trial 1 after its second epoch."""

    def recall(self, number: int, epochs: int, val_auc: float | None) -> None: ...

    def hear(self, number: int, epochs: int, val_auc: float | None) -> str | None:
        return "enough" if (number, epochs) == (1, 2) else None


def sweep(folder: str, shards: str, die_at: int | None = None, heard: bool = True) -> list[Outcome]:
    """The loop of ``trial_workers.drive`` with one worker, here. ``die_at``: the epoch told, of all, at which the process
    is gone, as by SIGKILL: after the driver has written it down, or before."""
    told = 0
    with tiny_registered():
        specs = [
            TrialSpec(number, {"optim.lr": lr}, small_config(shards, f"optim.lr={lr}", "train.epochs=3"))
            for number, lr in enumerate(_RATES)
        ]
        desk = Desk(Path(folder), specs, reserved=Reserved(1.0), stages=lambda _: (0, 5), max_failures=1, rule=Second())
        while (trial := desk.next_for(None)) is not None:
            exchange = Exchange()
            payload = {
                "config": trial.spec.config.model_dump(mode="json"),
                "folder": str(Path(folder) / trial_name(trial.number)),
            }
            desk.begun(trial.number)
            thread = threading.Thread(
                target=lambda e=exchange, p=payload: e.finish(train_trial(p, e, Warm(keep_epoch_scores=True))),
                daemon=True,
            )
            thread.start()
            while (news := exchange.next())["kind"] == "epoch":
                told += 1
                if told == die_at and not heard:
                    os._exit(9)
                stop = desk.heard(trial.number, news["row"])
                if told == die_at:
                    os._exit(9)
                exchange.decide(stop)
            thread.join()
            desk.ended(trial.number, news)
        return desk.outcomes()


def told_by(outcomes: list[Outcome]) -> list[Any]:
    return [
        (o.number, o.state, o.reason, o.attempts, [(e.val_auc, e.val_loss, e.train_loss) for e in o.curve])
        for o in outcomes
    ]


def test_a_driver_killed_twice_leaves_the_same_sweep(tmp_path: Path) -> None:
    """Once after it heard of an epoch, once before; ended trials are not run again, and stopped ones stay stopped."""
    shards = str(write_set(tmp_path / "set", {"train": [11, 9, 6], "val": [9, 5]}).folder)
    undisturbed = sweep(str(tmp_path / "undisturbed"), shards)
    assert [o.state for o in undisturbed] == ["finished", "stopped", "finished"]
    folder = str(tmp_path / "killed")
    context = multiprocessing.get_context("spawn")
    for die_at, heard in ((2, True), (3, False)):
        process = context.Process(target=sweep, args=(folder, shards, die_at, heard))
        process.start()
        process.join(120)
        assert process.exitcode == 9
        process.close()
    ended = [o.number for o in undisturbed if o.number == 0]
    stamps = [(Path(folder) / trial_name(number) / "results.json").stat().st_mtime_ns for number in ended]
    states = [json.loads(path.read_text())["state"] for path in sorted(Path(folder).glob("trials/*/trial.json"))]
    assert states[0] == "finished"
    assert "running" in states
    resumed = sweep(folder, shards)
    assert told_by(resumed) == told_by(undisturbed)
    assert stamps == [(Path(folder) / trial_name(number) / "results.json").stat().st_mtime_ns for number in ended]
    for outcome in resumed:  # the scores of every epoch, to the last bit
        for epoch in outcome.curve:
            name = f"{outcome.folder}/predictions/epochs/{epoch.epoch:04d}.npy"
            assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
