"""A chain submitted from outside of the cluster, whose hosts share an S3 server and no disk; one loses power in stage 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dying_runs import assert_same_bits
from hosts import Hosts
from ranks import run_ranks
from recovery import AT_STEP, Clock
from stored_runs import copied
from submitted import Outside

from medtl_dist.config import Config, load_config
from medtl_dist.run import Folder, LocalRun
from medtl_dist.train import results
from medtl_dist.train.chain import train_chain
from medtl_dist.train.loop import fit

pytestmark = [pytest.mark.ray, pytest.mark.long]
_STAGES = "transfer.stages=[{name: source, train: {epochs: 1}}, {name: target, train: {epochs: 3}}]"


def _fit(rank: int, world_size: int, config: Config, folder: str) -> None:
    fit(config, LocalRun(Folder.local(folder), torch.device("cpu"), rank=rank, world_size=world_size, local_rank=rank))


def _two_processes(stage: Config, place: Folder, _open_test: bool) -> dict[str, Any]:
    run_ranks(2, _fit, stage, place.url)
    return results.read_results(place)


def test_a_chain_whose_node_loses_power_in_stage_2_trains_the_weights_of_one_host(
    network: Hosts, outside: Outside, fixed: tuple[str, ...], options: tuple[str, ...], tmp_path: Path, clock: Clock
) -> None:
    run = outside.train("chain", tmp_path / "out", (*fixed, _STAGES))
    whole = run.folder
    run.folder = whole.part("stages/2-target")
    run.wait_for_step(AT_STEP, 200)
    clock.lose_a_node(network, run, "node power loss in stage 2 of a chain; all storage S3")
    code, errors = run.finish()
    assert code == 0, errors
    assert json.loads((tmp_path / "out" / "chain.json").read_text()) == json.loads(whole.read("chain.json"))

    near = Folder.local(tmp_path / "near")
    train_chain(load_config(preset="smoke", overrides=[*options, _STAGES]), near, _two_processes, say=lambda text: None)
    for name in ("stages/1-source", "stages/2-target"):
        assert_same_bits(near.part(name).local_path, copied(whole.part(name), tmp_path / "far" / name))
    assert json.loads(run.folder.read("results.json"))["model"]["weights"] == "checkpoint 12 of run 1-source"
