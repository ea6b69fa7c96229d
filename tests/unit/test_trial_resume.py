"""A sweep whose driver dies where a test says, in a process of its own, and is taken up: the same sweep. Without Ray."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

from dying_runs import small_config
from one_driver import drive_here
from shard_sets import write_set
from tiny_backbone import tiny_registered

from cluster.trial_state import TrialSpec, trial_name
from medtl_dist.sweep.outcome import Outcome

_RATES = (0.05, 0.0001, 0.01)


def sweep(folder: str, shards: str, die_at: int | None = None, heard: bool = True) -> list[Outcome]:
    with tiny_registered():
        specs = [
            TrialSpec(number, {"optim.lr": lr}, small_config(shards, f"optim.lr={lr}", "train.epochs=3"))
            for number, lr in enumerate(_RATES)
        ]
        return drive_here(Path(folder), specs, die_at=die_at, heard=heard)


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
