"""The stage `make test-hosts`: three hosts as network namespaces; each fault prints how long it took to be training again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hosts import Hosts, hosts, missing
from ranks import run_ranks
from shard_sets import write_set

from medtl_dist.config import Config, load_config
from medtl_dist.run import Folder, LocalRun
from medtl_dist.train.loop import fit

# Like the faults on one machine, with one worker a host. Silence on a cut cable lasts until Ray has given the node up.
_FIXED = (
    "model.backbone=timm/test_resnet", "train.threads=1", "train.epochs=6", "data.global_batch_size=8", "optim.lr=0.002",
    "train.checkpoint_every_steps=2", "schedule.name=cosine", "cluster.num_workers=2", "train.collective_timeout_s=60",
)  # fmt: skip


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """A head that holds no workers, and hosts 1, 2 and 3 with room for one each; 3 is switched on where a test needs it."""
    if missing():
        pytest.skip(str(missing()))
    with hosts(tmp_path_factory.mktemp("hosts"), 4) as some:
        for number in (0, 1, 2):
            some.power_on(some.hosts[number], cpus=min(number, 1))
        yield some


@pytest.fixture(scope="session")
def options(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Twelve steps an epoch."""
    dataset = write_set(tmp_path_factory.mktemp("data") / "set", {"train": [40, 33, 25], "val": [30, 10]})
    return (f"data.shards={dataset.folder}", *_FIXED)


@pytest.fixture(scope="session")
def undisturbed(options: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each run has to equal: two processes on one host that have never heard of Ray."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    run_ranks(2, _fit, load_config(preset="smoke", overrides=list(options)), str(folder))
    return folder


def _fit(rank: int, world_size: int, config: Config, folder: str) -> None:
    fit(config, LocalRun(Folder.local(folder), torch.device("cpu"), rank=rank, world_size=world_size, local_rank=rank))
