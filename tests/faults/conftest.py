"""The stage `make test-faults`: faults injected for real under Ray Train; each prints how long it took to be training again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from nodes import Machine, machine
from ranks import run_ranks
from shard_sets import write_set

from medtl_dist.config import Config, load_config
from medtl_dist.run import Folder, LocalRun
from medtl_dist.train.loop import fit

# A network of half a megabyte: the faults are about training, not about networks.
FIXED = (
    "model.backbone=timm/test_resnet", "train.threads=1", "train.epochs=6", "optim.lr=0.002", "data.global_batch_size=8",
    "train.checkpoint_every_steps=2", "schedule.name=cosine", "cluster.num_workers=2", "train.collective_timeout_s=60",
)  # fmt: skip


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve steps an epoch."""
    return str(write_set(tmp_path_factory.mktemp("faults") / "set", {"train": [40, 33, 25], "val": [30, 10]}).folder)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A head that holds no workers, and one node that holds two. Gone before the next file starts one of its own."""
    with machine(tmp_path_factory.mktemp("ray")) as started:
        started.start_head(cpus=0)
        started.start_node(2, "first")
        yield started


@pytest.fixture(scope="session")
def options(shards: str) -> tuple[str, ...]:
    return (f"data.shards={shards}", *FIXED)


@pytest.fixture(scope="session")
def undisturbed(options: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run that each of the others has to equal: of two plain processes that have never heard of Ray."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    run_ranks(2, _fit, load_config(preset="smoke", overrides=list(options)), str(folder))
    return folder


def _fit(rank: int, world_size: int, config: Config, folder: str) -> None:
    fit(config, LocalRun(Folder.local(folder), torch.device("cpu"), rank=rank, world_size=world_size, local_rank=rank))
