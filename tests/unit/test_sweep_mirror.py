"""Sweeps in a store, without a server: what the driver and its workers leave there, who may write, and what an error says."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from dying_runs import small_config
from fake_store import Stores, stores_in
from hypothesis import given, settings
from hypothesis import strategies as st
from lease_shelves import MemoryShelf
from shard_sets import write_set
from test_trials import Clock, desk_of, log_epochs, row
from tiny_backbone import tiny_registered

from cluster import trial_place, tune
from cluster.node_cache import NodeFolder, cache_place
from cluster.sweep_folder import begun_sweep, opened_sweep
from cluster.sweep_mirror import Mirror, next_lease
from cluster.sweep_trials import sweep_of
from cluster.trial_place import pulse_of, trial_folder
from cluster.trial_run import Exchange, train_trial
from cluster.trial_state import TrialSpec, read_specs, trial_name, write_specs
from cluster.trials import Stopped
from medtl_dist.config import Config, load_config
from medtl_dist.errors import Interrupted, UserError
from medtl_dist.run import LocalRun
from medtl_dist.sweep.outcome import Outcome
from medtl_dist.train import checkpoint, journal, ledger, run_store
from medtl_dist.train.lease import Lease, hand_out
from medtl_dist.train.loop import fit
from medtl_dist.train.outbox import Outbox
from medtl_dist.train.warm import Warm

URL = "s3://bucket/sweeps/first"
SPACE = "knobs: [{key: optim.lr, type: choice, values: [0.1, 0.2]}]\n"


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Stores]:
    with stores_in(tmp_path / "stores") as found:
        yield found


@pytest.fixture
def here(stores: Stores) -> Path:
    """Where the sweep's objects lie."""
    return stores.path(URL)


def base(*overrides: str) -> Config:
    return load_config(preset="smoke", overrides=["data.shards=/nowhere", *overrides])


def files(folder: Path) -> dict[str, bytes]:
    """All files but leases, locks and other driver's business, by name."""
    found = [path for path in folder.rglob("*") if path.is_file() and not {".lease", ".lock"} & set(path.parts)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def tell(desk: Any) -> None:
    """One that finishes, one that is lost for good, one that is still at work."""
    for number in range(3):
        desk.begun(number)
        desk.up(number)
    desk.heard(0, row(0, 0.7))
    desk.ended(0, {"state": "finished"})
    for _ in range(2):
        desk.lost(1, "gone")
        if desk.trials[1].state == "waiting":
            desk.begun(1)
    desk.heard(2, row(0, None))


# The driver's side.


def test_what_a_driver_writes_is_in_the_store_as_it_is_on_a_disk(stores: Stores, here: Path, tmp_path: Path) -> None:
    write_specs(tmp_path / "disk", [(0, {}), (1, {})])
    tell(desk_of(tmp_path / "disk", clock=Clock()))
    with opened_sweep(URL, base(), SPACE, resume=False) as folder:
        assert isinstance(folder, Mirror)
        write_specs(folder, [(0, {}), (1, {})])
        tell(desk_of(folder, clock=Clock()))
        assert files(folder.local_path) == files(here)
        scratch = folder.local_path
    assert not scratch.exists()
    left = files(here)
    assert left.pop("config.yaml") == base().to_yaml().encode()
    assert left.pop("space.yaml") == SPACE.encode()
    assert left == files(tmp_path / "disk")


def test_a_second_driver_is_refused_while_the_first_lives_and_takes_over_when_it_has_gone(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_store, "LEASE_TTL_S", 0.4)
    said: list[str] = []
    with (
        opened_sweep(URL, base(), SPACE, resume=False),
        pytest.raises(UserError, match=rf"^{URL}: another driver is at work on this sweep, process \d+ on "),
        opened_sweep(URL, base(), SPACE, resume=True, say=said.append),
    ):
        pass
    assert "to renew its lease" in said[0]
    with opened_sweep(URL, base(), SPACE, resume=True) as folder:
        assert isinstance(folder, Mirror)
        assert folder.store.fence == 2


@pytest.mark.parametrize(
    ("there", "config", "space", "resume", "message"),
    [
        ({}, base(), SPACE, False, "already holds a sweep; add --resume"),
        ({}, base("tune.seed=7"), SPACE, True, r"holds another sweep \(tune\.seed: 0 -> 7\)"),
        ({}, base(), SPACE + "# other", True, "the search space is not that of its space.yaml"),
        ({}, base("optim.lr=0.5"), SPACE, True, r"optim\.lr: 0\.01 -> 0\.5"),
        ({"space.yaml": None, "checkpoints/1/manifest.json": b""}, base(), SPACE, True, "holds a training run, not a"),
        ({"space.yaml": None, "config.yaml": None, "a.txt": b""}, base(), SPACE, True, "name another with --sweep-dir"),
        ({"trials.json": b"{"}, base(), SPACE, True, r"trials\.json: damaged"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_the_address(
    there: dict[str, bytes | None], config: Config, space: str, resume: bool, message: str, stores: Stores, here: Path
) -> None:
    with opened_sweep(URL, base(), SPACE, resume=False):
        pass
    for name, data in there.items():
        if data is None:
            (here / name).unlink()
        else:
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            (here / name).write_bytes(data)
    before = files(here)
    with pytest.raises(Exception, match=message) as told, opened_sweep(URL, config, space, resume=resume):
        pass
    assert URL in str(told.value)
    assert "medtl-sweep-" not in str(told.value)
    assert "--run-dir" not in str(told.value)
    assert files(here) == before


def test_places_that_can_not_be_a_sweep_s(stores: Stores) -> None:
    for place, message in (
        ("s3://bucket", "a whole bucket; .*--sweep-dir"),
        ("https://host/x", "web server .*--sweep-dir"),
    ):
        with pytest.raises(UserError, match=message), opened_sweep(place, base(), SPACE, resume=False):
            pass


def test_a_driver_that_is_replaced_can_write_no_more(stores: Stores, here: Path) -> None:
    with opened_sweep(URL, base(), SPACE, resume=False) as first:
        assert isinstance(first, Mirror)
        (here / ".lease" / "00000002").write_bytes(b"{}")  # somebody has waited until its lease had run out
        assert first.store.guard is not None
        first.store.guard.asked = -1e9  # it asks every two seconds
        with pytest.raises(Interrupted, match="another process has taken over"):
            first.write("trials.json", b"[]")
        with pytest.raises(Interrupted, match="another process has taken over"):
            next_lease(first, trial_name(0))
    assert not (here / "trials.json").exists()


def test_a_sweep_is_found_again_by_its_address_alone(stores: Stores) -> None:
    with begun_sweep(URL) as folder:
        assert folder is None
    with opened_sweep(URL, base("tune.num_trials=7"), SPACE, resume=False):
        pass
    with begun_sweep(URL) as folder:
        assert folder is not None
        assert load_config(file=folder / "config.yaml").tune.num_trials == 7
        assert (folder / "space.yaml").read_text() == SPACE
    assert not folder.exists()


def test_scores_are_read_back_and_nothing_else_is(stores: Stores, here: Path) -> None:
    wanted = [f"trials/0000{n}/{name}" for n in (0, 1) for name in ("results.json", "predictions/epochs/0001.npy")]
    others = ["trials/00000/checkpoints/00000001-010001/model.safetensors", "trials/00002/results.json", "winner/a"]
    with opened_sweep(URL, base(), SPACE, resume=False) as folder:
        assert isinstance(folder, Mirror)
        write_specs(folder, [(0, {}), (1, {})])
        for name in wanted + others:
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            (here / name).write_bytes(name.encode())
        folder.fetch_scores()
        fetched = files(folder.local_path)
        assert {name: fetched[name] for name in wanted} == {name: name.encode() for name in wanted}
        assert not fetched.keys() & set(others)


# A driver that is gone.


def a_run_that_was_lost(here: Path, stores: Stores, *, logged: int, committed: int) -> None:
    """Trial 0 has run ``committed`` epochs, of which its log tells ``logged``, and its driver heard of none."""
    with opened_sweep(URL, base(), SPACE, resume=False) as folder:
        assert isinstance(folder, Mirror)
        write_specs(folder, [(number, {}) for number in range(3)])
        desk = desk_of(folder)
        desk.begun(0)
        fence = folder.hand_out(trial_name(0))
        store = stores.folder(f"{URL}/{trial_name(0)}")
        for step in range(committed):
            history = [row(epoch, 0.5 + epoch / 10) for epoch in range(step + 1)]
            named = trial_folder({"config": base().model_dump(mode="json"), "folder": store.url, "fence": fence})
            checkpoint.save(named, step, weights={}, state={}, meta={"history": history})
        if logged:
            log_epochs(here, 0, [row(epoch, 0.5 + epoch / 10) for epoch in range(logged)])


@pytest.mark.parametrize(("logged", "committed"), [(0, 0), (1, 1), (0, 2), (1, 2), (2, 1)])
def test_epochs_that_a_killed_driver_never_heard_of_come_from_the_log_and_the_checkpoint(
    logged: int, committed: int, stores: Stores, here: Path
) -> None:
    """A log follows its checkpoint by some seconds; a worker that is killed in between leaves the one without the other."""
    a_run_that_was_lost(here, stores, logged=logged, committed=committed)
    with opened_sweep(URL, base(), SPACE, resume=True) as folder:
        assert len(read_specs(folder.local_path) or []) == 3
        desk = desk_of(folder)
        curve = {epoch: known.val_auc for epoch, known in desk.trials[0].curve.items()}
        assert curve == {epoch: 0.5 + epoch / 10 for epoch in range(max(logged, committed))}
        assert desk.trials[0].state == "waiting"
    there = json.loads((here / trial_name(0) / "trial.json").read_text())
    assert (there["state"], len(there["curve"])) == ("waiting", max(logged, committed))


def test_the_newest_checkpoint_that_is_whole_says_how_far_a_trial_is(stores: Stores, here: Path) -> None:
    a_run_that_was_lost(here, stores, logged=0, committed=2)
    (here / trial_name(0) / "checkpoints" / "00000001-010001" / "meta.json").write_bytes(b"{}")
    (here / trial_name(0) / "checkpoints" / "00000007-010001").mkdir()  # begun, never completed
    found = checkpoint.newest_meta(stores.folder(f"{URL}/{trial_name(0)}"))
    assert found is not None
    assert [entry["epoch"] for entry in found["history"]] == [0]


def test_a_worker_of_a_driver_that_is_gone_can_write_no_more(stores: Stores, here: Path) -> None:
    config = base().model_dump(mode="json")
    with opened_sweep(URL, base(), SPACE, resume=False) as folder:
        write_specs(folder, [(0, {}), (1, {})])
        desk = desk_of(folder)
        old = {}
        for number in (0, 1):
            desk.begun(number)
            url, fence = f"{URL}/{trial_name(number)}", next_lease(folder, trial_name(number))
            old[number] = {"config": config, "folder": url, "fence": fence}
            trial_folder(old[number]).write("note", b"old")
        desk.ended(1, {"state": "finished"})
    with opened_sweep(URL, base(), SPACE, resume=True) as folder:
        with pytest.raises(Interrupted, match="another process has taken over"):
            trial_folder(old[0]).write("note", b"late")
        trial_folder(old[1]).write("note", b"of one that had ended, and is nobody's since")
        # Within one driver, too: a worker that was given up, and the one after it.
        attempts = [next_lease(folder, trial_name(0)) for _ in range(2)]
        fenced = [trial_folder(old[0] | {"fence": fence}) for fence in attempts]
        with pytest.raises(Interrupted, match="another process has taken over"):
            fenced[0].write("note", b"given up")
        fenced[1].write("note", b"new")
    assert (here / trial_name(0) / "note").read_bytes() == b"new"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["new driver", "attempt", "late attempt", "a run of its own"]), max_size=30))
def test_leases_handed_out_grow_whatever_an_old_driver_still_does(acts: list[str]) -> None:
    """``late``: of a driver before the newest one. ``a run of its own``: somebody trains in the trial's folder by hand."""
    shelf, generation = MemoryShelf(), 1
    newest = 0
    for act in acts:
        if act == "new driver":
            generation += 1
        elif act == "a run of its own":
            newest = max(int(name) for name in shelf.files or {"0": None}) + 1
            shelf.create(f"{newest:08d}", b"{}")
        elif act == "attempt":
            number = hand_out(shelf, generation, owner="", ttl_s=60)
            assert number > newest
            newest = number
        elif generation > 1 and newest > generation * 10_000:
            assert hand_out(shelf, generation - 1, owner="", ttl_s=60) < newest


# The store is gone.


def test_a_driver_leaves_a_store_that_is_gone_with_one_try(stores: Stores, here: Path) -> None:
    with opened_sweep(URL, base(), SPACE, resume=False) as folder:
        clock = Clock()
        desk = desk_of(folder, clock=clock, silence_s=100.0)
        for number in range(3):
            desk.begun(number)
            desk.up(number)
        clock.now += 200
        stores.gone = True
        assert desk.silent() == []  # nobody is blamed for what can't be seen
        before = stores.calls
        desk.closed()
        assert stores.calls - before <= 2  # the guard's question, or the write
        stores.gone = False
        clock.now += 200
    assert json.loads((here / trial_name(0) / "trial.json").read_text())["state"] == "running"


def test_signs_of_life_are_the_lease_the_log_and_the_progress(stores: Stores, here: Path) -> None:
    with opened_sweep(URL, base(), SPACE, resume=False) as folder:
        clock = Clock()
        desk = desk_of(folder, 4, clock=clock, silence_s=100.0)
        leases = []
        for number in range(4):
            desk.begun(number)
            desk.up(number)
            leases.append(next_lease(folder, trial_name(number)))
        clock.now = 40.0
        assert desk.silent() == []
        (here / trial_name(0) / ".lease" / f"{leases[0]:08d}").write_bytes(b"renewed")
        (here / trial_name(1) / "log.jsonl").write_bytes(b"{}")
        (here / trial_name(2) / "progress.json").write_bytes(b"{}")
        (here / trial_name(3) / "trial.json").write_bytes(b"{}")  # that is the driver's own
        clock.now = 120.0
        assert desk.silent() == []
        clock.now = 160.0
        assert desk.silent() == [3]


def test_a_training_says_that_it_is_alive_by_its_lease_and_nothing_while_it_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shelf, alive, ended = MemoryShelf(), threading.Event(), threading.Event()
    lease = Lease(hand_out(shelf, 1, owner="driver", ttl_s=60), "worker", shelf, 60, "token")
    rounds: list[Any] = []

    def wait(_: float) -> bool:
        rounds.append(json.loads(shelf.files["00010001"][0]))
        if len(rounds) in (2, 3):
            alive.set()
        return len(rounds) == 5

    monkeypatch.setattr(ended, "wait", wait)
    trial_place._renew(lease, alive, ended)
    assert [entry["beat"] for entry in rounds] == [0, 0, 1, 2, 2]
    assert [entry["owner"] for entry in rounds] == ["driver", "driver", "worker", "worker", "worker"]
    assert json.loads(shelf.files["00010001"][0])["released"] is True


# The worker's side.


def trained(
    payload: dict[str, Any], exchange: Exchange | None = None, tell: Callable[[Any], object] = lambda _: None
) -> dict[str, Any]:
    """A trial in a thread, its epochs answered; how it ended."""
    exchange = exchange or Exchange()
    thread = threading.Thread(
        target=lambda: exchange.finish(train_trial(payload, exchange, Warm(keep_epoch_scores=True))), daemon=True
    )
    with tiny_registered():
        thread.start()
        while (news := exchange.next())["kind"] == "epoch":
            tell(news["row"])
            exchange.decide(False)
        thread.join(60)
    return news


def test_a_trial_says_finished_after_all_that_it_leaves_is_in_the_store(
    stores: Stores, here: Path, tmp_path: Path
) -> None:
    shards = str(write_set(tmp_path / "set", {"train": [11, 9, 6], "val": [9, 5]}).folder)
    config = small_config(shards)
    with opened_sweep(URL, base(), SPACE, resume=False) as folder:
        write_specs(folder, [(0, {})])
        desk = desk_of(folder, 1)
        desk.begun(0)
        (here / trial_name(0) / "config.yaml").write_text(config.to_yaml())
        payload = {
            "config": config.model_dump(mode="json"),
            "folder": f"{folder.url}/{trial_name(0)}",
            "fence": next_lease(folder, trial_name(0)),
        }
        end = trained(payload)
        assert (end["kind"], end["state"]) == ("end", "finished")
        worker_s = list(stores.puts)
        desk.ended(0, end)
        later = stores.puts[len(worker_s) :]
    left = {name.partition(f"{trial_name(0)}/")[2] for name in worker_s}
    assert {"results.json", "predictions/val.parquet", "predictions/epochs/0001.npy", "log.jsonl"} <= left
    assert [name.rpartition("/")[2] for name in later if "/.lease/" not in name] == ["trial.json"]
    assert trained(payload)["state"] == "finished"  # not again
    assert not any(name.endswith("manifest.json") for name in stores.puts[len(worker_s) :])


def test_a_store_out_of_a_worker_s_reach_costs_a_try_unless_it_was_to_stop(stores: Stores, tmp_path: Path) -> None:
    shards = str(write_set(tmp_path / "set", {"train": [11, 9, 6], "val": [9, 5]}).folder)
    config = small_config(shards)
    with opened_sweep(URL, base(), SPACE, resume=False) as folder:
        payload = {
            "config": config.model_dump(mode="json"),
            "folder": f"{folder.url}/{trial_name(0)}",
            "fence": next_lease(folder, trial_name(0)),
        }
        next_lease(folder, trial_name(0))  # it is another worker's by now
        asked = Exchange()
        asked.stop_asked.set()
        ends = [trained(payload), trained(payload, asked)]
    assert [end["state"] for end in ends] == ["crashed", "stopped"]
    assert "another process has taken over" in ends[0]["message"]


def test_a_pulse_never_waits_for_the_store(stores: Stores) -> None:
    with opened_sweep(URL, base(), SPACE, resume=False) as folder:
        payload = {"config": base().model_dump(mode="json"), "folder": f"{URL}/{trial_name(0)}"}
        place = trial_folder(payload | {"fence": next_lease(folder, trial_name(0))})
        stores.gone = True
        before = stores.calls
        with pulse_of(place) as alive:
            alive()
            assert stores.calls == before
        stores.gone = False


def test_a_sweep_that_is_stopped_leaves_its_result_in_the_store(
    stores: Stores, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after the first of two trials: table, ranking and page of what there is, and a lease that is free again."""

    def one_trial(folder: Mirror, specs: list[TrialSpec], _: Config, *, stopped: Stopped, **__: Any) -> list[Outcome]:
        desk = desk_of(folder, specs=specs)
        trial = desk.next_for(None)
        assert trial is not None
        desk.begun(trial.number)
        place, fence = f"{URL}/{trial_name(trial.number)}", next_lease(folder, trial_name(trial.number))
        payload = {"config": trial.spec.config.model_dump(mode="json"), "folder": place, "fence": fence}
        desk.ended(trial.number, trained(payload, tell=lambda news: desk.heard(trial.number, news)))
        stopped.received = signal.SIGINT
        return desk.outcomes()

    monkeypatch.setattr(tune, "run_trials", one_trial)
    monkeypatch.setattr(tune, "set_environment", lambda **_: None)
    (tmp_path / "space.yaml").write_text(SPACE)
    shards = str(write_set(tmp_path / "set", {"train": [11, 9, 6], "val": [9, 5]}).folder)
    config = small_config(shards, f"tune.space={tmp_path}/space.yaml", "tune.searcher=grid", "model.frozen_depth=0")
    with tiny_registered(), pytest.raises(KeyboardInterrupt):
        tune.run_sweep(sweep_of(config), URL, resume=False)
    found = json.loads((here / "sweep.json").read_text())
    assert [entry["trial"] for entry in found["ranking"]] == [0]
    assert found["ranking"][0]["auc_ci"] is not None  # from val scores that lie in the store only
    assert (found["sweep"], [entry["trial"] for entry in found["unranked"]]) == ("first", [1])
    assert (here / "sweep.html").read_text().startswith("<!DOCTYPE html>")
    assert pq.read_table(here / "sweep.parquet").column("state").to_pylist() == ["finished", "waiting"]
    assert json.loads((here / ".lease" / "00000001").read_text())["released"] is True


# Beside the trials.


def test_the_cache_of_a_sweep_in_a_store_lies_on_its_nodes_even_on_a_cluster_of_its_own() -> None:
    places = [cache_place(URL, None, own_cluster=own) for own in (True, False)]
    assert isinstance(places[0], NodeFolder)
    assert places[0] == places[1]
    assert places[0].base is None
    assert places[0] != cache_place(f"{URL}-2", None, own_cluster=True)


def test_a_winner_s_openings_of_the_test_split_are_counted_beside_the_sweep(stores: Stores) -> None:
    options: dict[str, Any] = {"dataset_sha256": "d", "config_sha256": "c"}
    with opened_sweep(URL, base(), SPACE, resume=False):
        winner, other = (stores.folder(f"{place}/winner/seed-0") for place in (URL, "s3://bucket/no/sweep"))
        assert ledger.record_opening_in_store(winner, **options) == {"count": 1, "configurations": 1}
        assert ledger.record_opening_in_store(other, **options) == {"count": 1, "configurations": 1}
    assert len(list(stores.path("s3://bucket/sweeps/test_openings/d").iterdir())) == 1
    assert len(list(stores.path("s3://bucket/no/sweep/winner/test_openings/d").iterdir())) == 1


def test_a_store_hears_of_a_trial_less_often_than_of_a_run_of_its_own(
    stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many trials at once nobody follows the progress of each, and every round is a request."""
    intervals: list[float] = []

    class Noted(Outbox):
        def __init__(self, *arguments: Any, every_s: float, **options: Any) -> None:
            intervals.append(every_s)
            super().__init__(*arguments, every_s=every_s, **options)

    monkeypatch.setattr(journal, "Outbox", Noted)
    config = small_config(str(write_set(tmp_path / "set", {"train": [11, 9], "val": [9, 5]}).folder), "train.epochs=1")
    with tiny_registered():
        fit(config, LocalRun(stores.folder("s3://bucket/runs/alone"), torch.device("cpu")))
    with opened_sweep(URL, base(), SPACE, resume=False) as folder:
        place, fence = f"{URL}/{trial_name(0)}", next_lease(folder, trial_name(0))
        assert (
            trained({"config": config.model_dump(mode="json"), "folder": place, "fence": fence})["state"] == "finished"
        )
    assert intervals[0] < intervals[1] < trial_place.BEAT_IN_STORE_S + 1
