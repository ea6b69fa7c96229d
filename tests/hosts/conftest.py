"""The stage `make test-hosts`: four hosts as namespaces and an S3 server; at the end a table of how long each fault held up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hosts import Hosts, hosts
from probe import missing
from ranks import run_ranks
from recovery import Clock, Recovery
from s3_server import ACCESS_KEY, SECRET_KEY
from shard_sets import write_set
from submitted import Outside

from medtl_dist.config import Config, load_config
from medtl_dist.run import Folder, LocalRun
from medtl_dist.train.loop import fit

# Like the faults on one machine, with one worker a host. Silence on a cut cable lasts until Ray has given the node up.
_FIXED = (
    "model.backbone=timm/test_resnet", "train.threads=1", "train.epochs=9", "data.global_batch_size=8", "optim.lr=0.002",
    "train.checkpoint_every_steps=2", "schedule.name=cosine", "cluster.num_workers=2", "train.collective_timeout_s=60",
)  # fmt: skip


_TABLE = pytest.StashKey[list[Recovery]]()


@pytest.fixture
def clock(pytestconfig: pytest.Config) -> Clock:
    return Clock(pytestconfig.stash.setdefault(_TABLE, []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(_TABLE, [])
    if rows:
        terminalreporter.section(
            "seconds until the run was training again, beside plain Ray Train on other hosts of this kind"
        )
        for row in rows:
            terminalreporter.write_line(f"{row.fault:<60} {row.seconds:>4.0f} {row.plain:>5}")


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """A head that holds no workers, and hosts 1, 2 and 3 with room for one each; 3 is switched on where a test needs it."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with hosts(tmp_path_factory.mktemp("hosts"), 4) as some:
        for number in (0, 1, 2):
            some.power_on(some.hosts[number], cpus=min(number, 1))
        yield some


@pytest.fixture(scope="session")
def local_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps an epoch."""
    return Path(write_set(tmp_path_factory.mktemp("data") / "set", {"train": [40, 33, 25], "val": [30, 10]}).folder)


@pytest.fixture(scope="session")
def fixed() -> tuple[str, ...]:
    """What every run has in common."""
    return _FIXED


@pytest.fixture(scope="session")
def options(local_set: Path) -> tuple[str, ...]:
    """Of a run whose set lies on a disk that all hosts share."""
    return (f"data.shards={local_set}", *_FIXED)


@pytest.fixture(scope="session")
def outside(network: Hosts, local_set: Path) -> Iterator[Outside]:
    """Outside of the cluster, with the S3 server that is all the storage that its runs share."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with network.store() as server:
            there = Outside(network, server)
            there.put_set(local_set)
            yield there


@pytest.fixture(scope="session")
def undisturbed(options: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each run has to equal: two processes on one host that have never heard of Ray."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    run_ranks(2, _fit, load_config(preset="smoke", overrides=list(options)), str(folder))
    return folder


def _fit(rank: int, world_size: int, config: Config, folder: str) -> None:
    fit(config, LocalRun(Folder.local(folder), torch.device("cpu"), rank=rank, world_size=world_size, local_rank=rank))


@pytest.fixture(autouse=True)
def _two_hosts(network: Hosts) -> None:
    """Hosts 1 and 2 are up and plugged in, 3 is off, whatever the test before did."""
    for host in network.hosts:
        network.plug(host, plugged=True)
    if network.hosts[0].node is None:
        network.power_on(network.hosts[0], cpus=0)
    for host in network.hosts[1:]:
        wanted = host is not network.hosts[3]
        if host.node is not None and (not wanted or network.node_id(host.name) is None):
            network.power_off(host)
        if host.node is None and wanted:
            network.power_on(host, cpus=1)
