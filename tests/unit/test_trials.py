"""A sweep's state without Ray: events in, decisions and files out; and what a new driver makes of what a killed one left."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.trial_desk import Desk
from cluster.trial_queue import next_of, prefix_of
from cluster.trial_state import Reserved, TrialSpec, epoch_of, read_specs, read_trial, trial_name, write_specs
from cluster.trials import reserved_for
from medtl_dist.config import load_config
from medtl_dist.errors import DataError, UserError
from medtl_dist.storage import Folder
from medtl_dist.sweep.outcome import Outcome


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Below:
    """Stops what is below a bar, and remembers what it was told."""

    def __init__(self, bar: float) -> None:
        self.bar = bar
        self.told: list[tuple[int, int, float | None]] = []
        self.recalled: list[tuple[int, int, float | None]] = []

    def hear(self, number: int, epochs: int, val_auc: float | None) -> str | None:
        self.told.append((number, epochs, val_auc))
        return f"below {self.bar}" if val_auc is not None and val_auc < self.bar else None

    def recall(self, number: int, epochs: int, val_auc: float | None) -> None:
        self.recalled.append((number, epochs, val_auc))


def spec_of(number: int, depth: int | str = 0, epochs: int = 3) -> TrialSpec:
    overrides: dict[str, Any] = {"model.frozen_depth": depth}
    config = load_config(preset="smoke", overrides=[f"model.frozen_depth={depth}", f"train.epochs={epochs}"])
    return TrialSpec(number, overrides, config)


def desk_of(folder: Path | Folder, num_trials: int = 3, **options: Any) -> Desk:
    settings_: dict[str, Any] = {
        "reserved": Reserved(cpus=2.0, gpus=0.5),
        "stages": lambda spec: (spec.config.model.frozen_depth, 5),
        "max_failures": 1,
    }
    specs = options.pop("specs", None) or [spec_of(number) for number in range(num_trials)]
    return Desk(folder, specs, **(settings_ | options))


def row(epoch: int, auc: float | None) -> dict[str, Any]:
    return {"epoch": epoch, "val_auc": auc, "val_loss": 0.5, "train_loss": 0.6, "epoch_s": 2.0}


def states(desk: Desk) -> list[str]:
    return [outcome.state for outcome in desk.outcomes()]


def on_disk(folder: Path, number: int) -> dict[str, Any]:
    return json.loads((folder / trial_name(number) / "trial.json").read_text())


def log_epochs(folder: Path, number: int, rows: Sequence[Mapping[str, Any]]) -> None:
    place = folder / trial_name(number)
    place.mkdir(parents=True, exist_ok=True)
    (place / "log.jsonl").write_text(
        "".join(json.dumps({"kind": "epoch"} | dict(r)) + "\n" for r in rows) + '{"kind": "ep'
    )


def test_a_trial_runs_and_its_record_says_what_it_took(tmp_path: Path) -> None:
    clock = Clock()
    desk = desk_of(tmp_path, 1, clock=clock)
    trial = desk.next_for(None)
    assert trial is not None
    desk.begun(0)
    assert on_disk(tmp_path, 0)["state"] == "running"
    assert desk.next_for(None) is None
    clock.now = 20.0
    desk.up(0)  # a new process took 20 s: not the trial's
    for epoch, auc in enumerate([0.7, 0.9, 0.8]):
        clock.now += 10
        assert desk.heard(0, row(epoch, auc) | {"prefix_cache_s": 0.75 if epoch < 2 else 1e-6}) is False
    clock.now += 1
    assert desk.ended(0, {"state": "finished"})
    (outcome,) = desk.outcomes()
    assert outcome.state == "finished"
    assert [e.seconds for e in outcome.curve] == [10, 20, 30]
    assert outcome.best is not None
    assert outcome.best.epoch == 1
    assert (outcome.seconds, outcome.cpu_hours, outcome.gpu_hours) == (31, 62 / 3600, 15.5 / 3600)
    assert (outcome.attempts, outcome.cached_s, outcome.folder) == (1, 1.5, "trials/00000")
    assert desk.all_ended()
    assert desk_of(tmp_path, 1).outcomes() == [outcome]  # from the files alone
    assert load_config(file=tmp_path / outcome.folder / "config.yaml") == trial.spec.config


def test_the_rule_stops_a_trial_but_not_after_its_last_epoch(tmp_path: Path) -> None:
    rule = Below(0.8)
    desk = desk_of(tmp_path, 2, rule=rule)
    desk.begun(0)
    desk.begun(1)
    assert desk.heard(0, row(0, 0.7)) is True
    desk.ended(0, {"state": "stopped"})
    for epoch, auc in enumerate([0.9, 0.9, 0.1]):
        assert desk.heard(1, row(epoch, auc)) is False
    desk.ended(1, {"state": "finished"})
    assert [(o.state, o.reason) for o in desk.outcomes()] == [("stopped", "below 0.8"), ("finished", None)]
    assert rule.told == [(0, 1, 0.7), (1, 1, 0.9), (1, 2, 0.9), (1, 3, 0.1)]


def test_a_crash_is_tried_again_at_once_and_then_has_failed(tmp_path: Path) -> None:
    clock = Clock()
    desk = desk_of(tmp_path, 2, clock=clock)
    desk.begun(0)
    clock.now = 5
    desk.lost(0, "its process died")
    assert on_disk(tmp_path, 0)["state"] == "waiting"
    trial = desk.next_for(None)
    assert trial is not None
    assert trial.number == 0
    desk.begun(0)
    clock.now = 8
    assert desk.ended(0, {"state": "crashed", "message": "OSError: gone"}) is False  # that process takes no other trial
    outcome = desk.outcomes()[0]
    assert (outcome.state, outcome.attempts, outcome.seconds) == ("failed", 2, 8)
    assert outcome.reason == "crashed in 2 tries: OSError: gone"


def test_what_is_hopeless_is_not_tried_again(tmp_path: Path) -> None:
    desk = desk_of(tmp_path, 1)
    desk.begun(0)
    assert desk.ended(0, {"state": "failed", "message": "the loss is not finite"}) is True
    assert [(o.state, o.reason, o.attempts) for o in desk.outcomes()] == [("failed", "the loss is not finite", 1)]
    assert desk.next_for(None) is None


def test_an_undefined_auc_is_never_a_value_and_is_said(tmp_path: Path) -> None:
    rule = Below(0.8)
    desk = desk_of(tmp_path, 1, rule=rule)
    desk.begun(0)
    for epoch, auc in enumerate([None, math.nan, None]):
        assert desk.heard(0, row(epoch, auc)) is False
    desk.ended(0, {"state": "finished"})
    (outcome,) = desk.outcomes()
    assert outcome.best is None
    assert outcome.reason == "its val AUC is undefined in every epoch"
    assert [auc for _, _, auc in rule.told] == [None, None, None]


def test_a_process_that_dies_after_it_was_told_to_stop_has_stopped(tmp_path: Path) -> None:
    desk = desk_of(tmp_path, 1, rule=Below(0.8))
    desk.begun(0)
    assert desk.heard(0, row(0, 0.1))
    desk.lost(0, "its process died")
    assert [(o.state, o.reason, o.attempts) for o in desk.outcomes()] == [("stopped", "below 0.8", 1)]


def test_a_driver_that_is_told_to_stop_leaves_its_trials_waiting(tmp_path: Path) -> None:
    desk = desk_of(tmp_path, 2)
    desk.begun(0)
    desk.begun(1)
    desk.heard(0, row(0, 0.6))
    assert desk.ended(0, {"state": "stopped", "message": "as asked"})
    desk.closed()  # and 1 never answered
    again = desk_of(tmp_path, 2)
    assert states(again) == ["waiting", "waiting"]
    assert [len(o.curve) for o in again.outcomes()] == [1, 0]
    assert [o.attempts for o in again.outcomes()] == [1, 1]


def test_a_killed_driver_s_sweep_is_taken_up(tmp_path: Path) -> None:
    """0 finished, 1 was stopped, 2 ran (two epochs heard, a third only logged), 3 waited."""
    clock = Clock()
    desk = desk_of(tmp_path, 4, rule=Below(0.5), clock=clock)
    for number in (0, 1, 2):
        desk.begun(number)
    for epoch in range(3):
        clock.now += 1
        desk.heard(0, row(epoch, 0.9))
    desk.ended(0, {"state": "finished"})
    desk.heard(1, row(0, 0.2))
    desk.ended(1, {"state": "stopped"})
    log = [row(epoch, 0.6 + epoch / 100) for epoch in range(3)]
    for epoch in range(2):
        desk.heard(2, log[epoch])
    log_epochs(tmp_path, 2, log)

    rule = Below(0.5)
    again = desk_of(tmp_path, 4, rule=rule)
    assert states(again) == ["finished", "stopped", "waiting", "waiting"]
    assert [len(o.curve) for o in again.outcomes()] == [3, 1, 3, 0]
    assert again.outcomes()[2].curve[2].seconds == 3 + 2.0  # its last known second and the epoch's own
    assert rule.recalled == [(0, 1, 0.9), (0, 2, 0.9), (0, 3, 0.9), (1, 1, 0.2), (2, 1, 0.6), (2, 2, 0.61)]
    assert rule.told == [(2, 3, 0.62)]  # the only one that nobody had decided about
    taken = [again.next_for(None)]
    again.begun(2)
    taken.append(again.next_for(None))
    assert [trial and trial.number for trial in taken] == [2, 3]


def test_an_epoch_that_the_killed_driver_never_heard_of_can_still_stop_its_trial(tmp_path: Path) -> None:
    desk_of(tmp_path, 1, rule=Below(0.5)).begun(0)
    log_epochs(tmp_path, 0, [row(0, 0.3)])
    assert [(o.state, o.reason) for o in desk_of(tmp_path, 1, rule=Below(0.5)).outcomes()] == [("stopped", "below 0.5")]


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    place = tmp_path / trial_name(0)
    place.mkdir(parents=True)
    for text in ("{", '{"number": 0}', '{"number": 1, "state": "waiting", "curve": []}', "[]"):
        (place / "trial.json").write_text(text)
        with pytest.raises(DataError, match=r"trial\.json: damaged"):
            read_trial(tmp_path, spec_of(0))


def test_proposals_are_asked_for_once_nothing_waits_and_know_how_the_others_stand(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def propose(outcomes: list[Outcome]) -> TrialSpec | None:
        seen.append([o.state for o in outcomes])
        return spec_of(len(outcomes)) if len(outcomes) < 3 else None

    desk = desk_of(tmp_path, specs=[spec_of(0)], propose=propose)
    for number in range(3):
        trial = desk.next_for(None)
        assert trial is not None
        assert trial.number == number
        desk.begun(number)
    desk.ended(0, {"state": "finished"})
    assert desk.next_for(None) is None
    assert seen == [["running"], ["running", "running"], ["finished", "running", "running"]]


def test_what_was_drawn_is_read_back_or_named(tmp_path: Path) -> None:
    assert read_specs(tmp_path) is None
    drawn = [(0, {"optim.lr": 0.1}), (1, {"model.frozen_depth": "all"})]
    write_specs(tmp_path, drawn)
    assert read_specs(tmp_path) == drawn
    (tmp_path / "trials.json").write_text('[{"number": 3, "overrides": {}}]')
    with pytest.raises(DataError, match=r"trials\.json: damaged"):
        read_specs(tmp_path)


# The order of trials.


@settings(max_examples=50, deadline=None)
@given(depths=st.lists(st.sampled_from([0, 2, 4]), min_size=1, max_size=12), num_workers=st.integers(1, 3))
def test_one_worker_after_another_stays_with_its_prefix(depths: list[int], num_workers: int) -> None:
    """Every trial is taken once; a worker changes its prefix only when none of it waits any more."""
    waiting = {number: _SPECS[depth](number) for number, depth in enumerate(depths)}
    has: list[str | None] = [None] * num_workers
    taken: list[int] = []
    while waiting:
        for worker in range(num_workers):
            busy = {prefix for other, prefix in enumerate(has) if other != worker and prefix is not None}
            spec = next_of(list(waiting.values()), has[worker], busy)
            if spec is None:
                break
            prefix = prefix_of(spec.config)
            mine = [other.number for other in waiting.values() if prefix_of(other.config) == has[worker]]
            if mine:
                assert prefix == has[worker]
                assert spec.number == min(mine)
            has[worker] = prefix
            taken.append(spec.number)
            del waiting[spec.number]
    assert sorted(taken) == list(range(len(depths)))


_CONFIGS = {depth: spec_of(0, depth).config for depth in (0, 2, 4)}
_SPECS = {depth: (lambda number, d=depth: TrialSpec(number, {}, _CONFIGS[d])) for depth in _CONFIGS}


def test_two_free_workers_begin_with_different_prefixes() -> None:
    specs = [spec_of(0, 4), spec_of(1, 4), spec_of(2, 2)]
    first = next_of(specs, None, set())
    assert first is not None
    assert first is specs[0]
    assert next_of(specs[1:], None, {prefix_of(first.config)}) is specs[2]


def test_how_many_still_share_a_prefix(tmp_path: Path) -> None:
    desk = desk_of(tmp_path, specs=[spec_of(0, 4), spec_of(1, 4), spec_of(2, 2), spec_of(3, 4)])
    desk.begun(0)
    assert [desk.num_sharing(desk.trials[number]) for number in range(4)] == [3, 3, 1, 3]
    desk.ended(0, {"state": "failed", "message": "why"})
    assert desk.num_sharing(desk.trials[1]) == 2


def test_a_prefix_is_what_decides_the_frozen_outputs() -> None:
    base = load_config(preset="smoke")
    same = load_config(
        preset="smoke", overrides=["optim.lr=0.5", "train.epochs=9", "data.global_batch_size=4", "schedule.name=cosine"]
    )
    assert prefix_of(same) == prefix_of(base)
    for other in ("model.frozen_depth=2", "train.precision=bf16", "data.image_size_px=48", "augment.rotation_deg=3"):
        assert prefix_of(load_config(preset="smoke", overrides=[other])) != prefix_of(base), other


# What a trial reserves.


@pytest.mark.parametrize(
    ("options", "gpus", "expected"),
    [
        ([], 0, (1.0, 0.0)),
        (["cluster.cpus_per_worker=2"], 1, (2.0, 1.0)),
        (["cluster.use_gpu=false"], 1, (1.0, 0.0)),
        (["cluster.use_gpu=0.5", "cluster.cpus_per_worker=0.5"], 1, (0.5, 0.5)),
        (["cluster.num_workers=2"], 4, (2.0, 2.0)),
        (["cluster.num_workers=2"], 1, (2.0, 0.0)),
    ],
)
def test_what_a_trial_reserves(options: list[str], gpus: int, expected: tuple[float, float]) -> None:
    reserved = reserved_for(load_config(preset="smoke", overrides=options), num_gpus=gpus)
    assert (reserved.cpus, reserved.gpus) == expected


def test_ranks_of_one_training_cannot_share_a_gpu() -> None:
    with pytest.raises(UserError, match="can't share a GPU"):
        reserved_for(
            load_config(preset="smoke", overrides=["cluster.use_gpu=0.5", "cluster.num_workers=2"]), num_gpus=4
        )


def test_an_epoch_without_a_loss_is_kept_as_not_a_number(tmp_path: Path) -> None:
    assert math.isnan(epoch_of({"epoch": 0, "val_auc": 0.5}, 1.0).val_loss)
    desk = desk_of(tmp_path, 1)
    desk.begun(0)
    desk.heard(0, row(0, 0.5) | {"val_loss": math.inf, "train_loss": math.nan})
    assert math.isnan(read_trial(tmp_path, spec_of(0)).curve[0].val_loss)
