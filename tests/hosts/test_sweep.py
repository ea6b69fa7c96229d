"""A sweep whose trials have a rank on each of two hosts, one of which loses power in the middle of a trial."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dying_runs import assert_same_bits
from hosts import Hosts
from nodes import wait_for
from ranks import run_ranks
from recovery import AT_STEP, Clock
from stored_runs import copied
from submitted import Outside

from medtl_dist.config import load_config
from medtl_dist.run import Folder, LocalRun
from medtl_dist.train.loop import fit

pytestmark = pytest.mark.ray

_RATES = (0.002, 0.004)


@pytest.mark.long
def test_a_sweep_of_two_rank_trials_lives_through_a_lost_node(
    network: Hosts, options: tuple[str, ...], tmp_path: Path, clock: Clock
) -> None:
    space, sweep = tmp_path / "space.yaml", tmp_path / "sweep"
    space.write_text(f"about: Two rates.\nknobs:\n  - {{key: optim.lr, type: choice, values: {list(_RATES)}}}\n")
    given = (
        *options,
        "train.epochs=2",
        "tune.searcher=grid",
        "tune.scheduler=none",
        f"cluster.address={network.address}",
    )
    settings = [part for option in given for part in ("--set", option)]
    arguments = ["tune", "--preset", "smoke", "--space", str(space), "--sweep-dir", str(sweep), *settings]
    run = network.medtl_on(network.hosts[0], sweep / "trials" / "00000", *arguments)
    run.wait_for_step(AT_STEP)
    clock.lose_a_node(network, run, "a sweep's node without power, replaced")
    code, errors = run.finish()
    assert code == 0, errors
    found = json.loads((sweep / "sweep.json").read_text())
    assert sorted(row["trial"] for row in found["ranking"]) == [0, 1]
    assert found["unranked"] == []
    wait_for("the end of the trials' workers", lambda: not network.workers())

    alone = [tmp_path / "alone" / str(number) for number in range(len(_RATES))]
    run_ranks(2, _fit, [str(folder) for folder in alone], [str(sweep / f"trials/{n:05d}") for n in range(len(_RATES))])
    for number, folder in enumerate(alone):
        trial = sweep / f"trials/{number:05d}"
        assert load_config(file=trial / "config.yaml").optim.lr == _RATES[number]
        assert_same_bits(folder, trial)


def test_a_submitted_sweep_in_a_store_lives_through_a_lost_node(
    network: Hosts, outside: Outside, fixed: tuple[str, ...], local_set: Path, tmp_path: Path, clock: Clock
) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(f"about: Two rates.\nknobs:\n  - {{key: optim.lr, type: choice, values: {list(_RATES)}}}\n")
    given = (*fixed, "train.epochs=2", "tune.searcher=grid", "tune.scheduler=none")
    run = outside.tune("swept", tmp_path / "out", given, "--space", str(space))
    run.wait_for_step(AT_STEP, 200)
    clock.lose_a_node(network, run, "a sweep's node without power, replaced; all storage S3")
    code, errors = run.finish()
    assert code == 0, errors
    wait_for("the end of the trials' workers", lambda: not network.workers())

    there = copied(outside.folder("runs/swept"), tmp_path / "copy")
    found = json.loads((there / "sweep.json").read_text())
    assert sorted(row["trial"] for row in found["ranking"]) == [0, 1]
    assert found["unranked"] == []
    for name in ("sweep.json", "sweep.html"):  # fetched outside
        assert (tmp_path / "out" / name).read_bytes() == (there / name).read_bytes()
    trials = [copied(outside.folder(f"runs/swept/trials/{n:05d}"), tmp_path / str(n)) for n in range(len(_RATES))]
    alone = [tmp_path / "alone" / str(number) for number in range(len(_RATES))]
    run_ranks(2, _fit, [str(folder) for folder in alone], [str(trial) for trial in trials], str(local_set))
    for folder, trial in zip(alone, trials, strict=True):
        assert_same_bits(folder, trial)


def test_a_sweep_in_a_folder_of_one_host_is_refused_before_it_starts(network: Hosts, options: tuple[str, ...]) -> None:
    head = network.hosts[0]
    given = (*options, f"cluster.address={network.address}")
    settings = [part for option in given for part in ("--set", option)]
    own = Path("/dev/shm/sweep")  # a memory disk on each host
    code, errors = network.medtl_on(head, own, "tune", "--preset", "smoke", "--sweep-dir", str(own), *settings).finish()
    assert code == 2, errors
    assert f"the run folder {own} is not the same folder on all nodes of the cluster" in errors


def _fit(rank: int, world_size: int, folders: list[str], trials: list[str], shards: str | None = None) -> None:
    for folder, trial in zip(folders, trials, strict=True):
        here = [] if shards is None else [f"data.shards={shards}", "data.endpoint_url=null"]
        config = load_config(file=Path(trial) / "config.yaml", overrides=here)
        fit(
            config,
            LocalRun(Folder.local(folder), torch.device("cpu"), rank=rank, world_size=world_size, local_rank=rank),
        )
