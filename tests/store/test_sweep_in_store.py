"""A sweep's driver and its trials against a real store, without Ray: killed and taken up, it is the sweep of a disk."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import NamedTuple

import pytest
from dying_runs import assert_same_bits, small_config
from faulty_proxy import Fault, Proxy
from gs_server import running_emulator
from one_driver import drive_here
from s3_server import S3Server
from shard_sets import write_set
from stored_runs import copied
from test_trial_resume import told_by
from tiny_backbone import tiny_registered

from cluster.sweep_folder import opened_sweep
from cluster.sweep_mirror import Mirror
from cluster.trial_state import TrialSpec, trial_name, write_specs
from medtl_dist.cli.main import run
from medtl_dist.config import Config
from medtl_dist.errors import Interrupted
from medtl_dist.storage import EMULATOR, StorageOptions
from medtl_dist.store_folder import StoreFolder, store_folder
from medtl_dist.sweep.outcome import Outcome
from medtl_dist.sweep.summary import sweep_summary
from medtl_dist.train import run_store

pytestmark = pytest.mark.store
_RATES = (0.05, 0.0001, 0.01)
_TTL_S = 3.0
SPACE = "knobs: [{key: optim.lr, type: choice, values: [0.1, 0.2]}]\n"


@pytest.fixture
def place(address: str) -> str:
    return address.removesuffix("/set") + "/sweeps/first"


def base(shards: str, *overrides: str) -> Config:
    return small_config(shards, "train.epochs=3", *overrides)


class Sweep(NamedTuple):
    folder: Path
    outcomes: list[Outcome]
    ranking: object


def sweep(
    place: str | Path, shards: str, overrides: tuple[str, ...] = (), die_at: int | None = None, heard: bool = True
) -> tuple[list[Outcome], object]:
    """The outcomes, and the ranking of what is in the folder; ``die_at`` and ``heard`` as in ``drive_here``."""
    run_store.LEASE_TTL_S = _TTL_S
    config = base(shards, *overrides)
    with tiny_registered(), opened_sweep(place, config, SPACE, resume=True) as folder:
        specs = [
            TrialSpec(n, {"optim.lr": lr}, base(shards, f"optim.lr={lr}", *overrides)) for n, lr in enumerate(_RATES)
        ]
        write_specs(folder, [(spec.number, spec.overrides) for spec in specs])
        outcomes = drive_here(folder, specs, die_at=die_at, heard=heard)
        if isinstance(folder, Mirror):
            folder.fetch_scores()
        return outcomes, sweep_summary(folder.local_path, outcomes)["ranking"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_set(tmp_path_factory.mktemp("sweep") / "set", {"train": [11, 9, 6], "val": [9, 5]}).folder)


@pytest.fixture(scope="module")
def near(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """On a disk, undisturbed."""
    folder = tmp_path_factory.mktemp("near") / "sweep"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_store, "LEASE_TTL_S", _TTL_S)
        return Sweep(folder, *sweep(folder, shards))


def test_a_driver_killed_twice_leaves_the_sweep_of_a_disk(
    shards: str, place: str, s3: S3Server, near: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once after it heard of an epoch, once before; ended trials are not run again, and stopped ones stay stopped."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    monkeypatch.setattr(run_store, "LEASE_TTL_S", _TTL_S)
    assert [outcome.state for outcome in near.outcomes] == ["finished", "stopped", "finished"]
    store = store_folder(place, StorageOptions(endpoint_url=s3.url))
    context = multiprocessing.get_context("spawn")
    for die_at, heard in ((4, True), (1, False)):
        process = context.Process(target=sweep, args=(place, shards, (), die_at, heard))
        process.start()
        process.join(120)
        assert process.exitcode == 9
        process.close()
    states = [state_of(store, number) for number in range(2)]
    assert states == ["finished", "running"]
    stamp = store.info(f"{trial_name(0)}/results.json").mtime
    resumed, again = sweep(place, shards)
    assert told_by(resumed) == told_by(near.outcomes)
    assert again == near.ranking
    assert store.info(f"{trial_name(0)}/results.json").mtime == stamp
    far = copied(store, tmp_path / "far")
    for number in (0, 2):
        trial = copied(store.below(trial_name(number)), tmp_path / str(number))
        assert_same_bits(near.folder / trial_name(number), trial)
    for outcome in resumed:  # the scores of every epoch, to the last bit
        for epoch in outcome.curve:
            name = f"{outcome.folder}/predictions/epochs/{epoch.epoch:04d}.npy"
            assert (far / name).read_bytes() == (near.folder / name).read_bytes()


def test_a_store_that_goes_away_ends_the_sweep_in_bounded_time_and_it_goes_on_later(
    shards: str, place: str, s3: S3Server, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setattr(run_store, "LEASE_TTL_S", _TTL_S)
    impatient = ("data.storage_timeout_s=1", "data.storage_retries=1")
    proxy.choose = lambda _: Fault("reset") if proxy.count("results.json", "PUT") else None
    with pytest.raises(Interrupted, match=f"^{place}/.* can't be .*--resume goes on"):
        sweep(place, shards, impatient)
    proxy.choose = lambda _: None
    outcomes, _ = sweep(place, shards, impatient)
    assert [(outcome.state, outcome.attempts) for outcome in outcomes] == [
        ("finished", 1),  # its try was not counted: the driver, too, was without a store
        ("stopped", 1),
        ("finished", 1),
    ]


@pytest.mark.parametrize(("fault", "code", "said"), [("403", 2, "access refused"), ("reset", 75, "can't be listed")])
def test_a_store_that_refuses_or_is_gone_is_told_before_anything_starts(
    fault: str, code: int, said: str, shards: str, place: str, proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    settings = (f"data.shards={shards}", f"data.endpoint_url={proxy.url}", "data.storage_timeout_s=1")
    given = [part for text in (*settings, "data.storage_retries=1") for part in ("--set", text)]
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)  # the config's own endpoint is asked
    proxy.choose = lambda _: Fault(fault)
    assert run(["tune", "--preset", "smoke", "--space", "smoke", *given, "--sweep-dir", place]) == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert line.startswith(f"error: {place}")
    assert said in line


def test_it_is_the_same_sweep_in_google_s_storage(
    shards: str, near: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_emulator(tmp_path) as url:
        monkeypatch.setenv(EMULATOR, url)
        monkeypatch.setattr(run_store, "LEASE_TTL_S", _TTL_S)
        outcomes, ranking = sweep("gs://sets/sweeps/first", shards)
        assert told_by(outcomes) == told_by(near.outcomes)
        assert ranking == near.ranking
        again, _ = sweep("gs://sets/sweeps/first", shards)  # all that there is to take up
        assert told_by(again) == told_by(outcomes)


def state_of(store: StoreFolder, number: int) -> str:
    return json.loads(store.read(f"{trial_name(number)}/trial.json"))["state"]
