"""Reading a set from a real S3 server, through a proxy that breaks things: same batches, bounded time, named errors."""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import put
from epochs import LANES, epoch_of, same, scores_of
from faulty_proxy import Fault, Proxy, Request, running_proxy
from s3_server import SECRET_KEY, S3Server

from medtl_dist.data.loader import Loader
from medtl_dist.data.shards import Dataset, open_dataset, read_split
from medtl_dist.data.stream import run_length_of
from medtl_dist.errors import DataError, Interrupted, MedtlError, UserError
from medtl_dist.storage import Folder, StorageOptions

pytestmark = pytest.mark.store
QUICK = {"timeout_s": 1.0, "retries": 3}


def options_for(proxy: Proxy | S3Server, **values: object) -> StorageOptions:
    return StorageOptions(**{"endpoint_url": proxy.url, **QUICK, **values})  # pyright: ignore[reportArgumentType]


@pytest.fixture
def remote(local: Dataset, address: str, s3: S3Server, proxy: Proxy) -> Dataset:
    """The set in the store, opened through the proxy."""
    put(local, address, s3)
    return open_dataset(address, options_for(proxy))


def test_a_set_in_a_store_is_the_set_on_disk(local: Dataset, remote: Dataset) -> None:
    assert (remote.sha256, remote.name, remote.info) == (local.sha256, "set", local.info)
    assert remote.remote
    assert not local.remote
    for split in local.splits:
        assert read_split(remote, split).equals(read_split(local, split))
    assert same(epoch_of(remote), epoch_of(local))
    assert same(scores_of(remote), scores_of(local))
    assert pickle.loads(pickle.dumps(remote)).storage == remote.storage  # noqa: S301 - our own bytes


def test_an_epoch_takes_at_most_two_requests_per_run(local: Dataset, remote: Dataset, proxy: Proxy) -> None:
    length = run_length_of(local, "train", 12, LANES)
    num_runs = sum(math.ceil(shard.samples / length) for shard in local.shards("train"))
    proxy.requests.clear()
    epoch_of(remote)
    first = len(proxy.requests)
    assert proxy.count(".tar", "HEAD") <= 4  # a shard's length is asked for once
    assert proxy.count("index.parquet", "GET") <= 1 + 4  # its footer, and a row group per shard
    assert first <= 2 * num_runs
    proxy.requests.clear()
    epoch_of(remote, epoch=1)
    assert proxy.count(".tar", "HEAD") == proxy.count("index.parquet", "HEAD") == 0
    assert num_runs <= proxy.count(".tar", "GET") <= num_runs + LANES
    assert len(proxy.requests) <= first


def test_loader_processes_make_their_own_connections(local: Dataset, remote: Dataset) -> None:
    with Loader(2) as loader:
        assert same(epoch_of(remote, loader=loader), epoch_of(local))


@pytest.mark.parametrize(
    "fault", [Fault("reset", 3000), Fault("truncate", 5000), Fault("503"), Fault("delay", 0.1), Fault("stall", 3000)],
    ids=lambda fault: fault.kind,
)  # fmt: skip
def test_faults_change_nothing_but_the_time(local: Dataset, remote: Dataset, proxy: Proxy, fault: Fault) -> None:
    # Readers share the count of requests, so by chance one of them may meet several faults in a row: more tries.
    remote = open_dataset(remote.folder, options_for(proxy, retries=15))
    every = 25 if fault.kind == "stall" else 3  # each costs the whole time-out
    numbers = itertools.count(1)

    def choose(request: Request) -> Fault | None:
        return None if next(numbers) % every else fault

    proxy.choose = choose
    begun = time.monotonic()
    batches = epoch_of(remote)
    assert time.monotonic() - begun < 60
    assert len(proxy.requests) > every  # so something did break
    assert same(batches, epoch_of(local))


def test_a_server_gone_for_good_is_named_in_bounded_time(local: Dataset, address: str, s3: S3Server) -> None:
    put(local, address, s3)
    with running_proxy(s3.port) as proxy:
        remote = open_dataset(address, options_for(proxy))
        proxy.choose = lambda request: Fault("503")
        begun = time.monotonic()
        with pytest.raises(
            Interrupted, match=rf"{address}/.* at {proxy.url} can't be read \(.*tries in .*run the same command"
        ):
            epoch_of(remote)
        assert time.monotonic() - begun < 8
    begun = time.monotonic()
    with pytest.raises(Interrupted, match=rf"{address}/dataset.json at {proxy.url} can't be read \(could not connect"):
        open_dataset(address, remote.storage)
    with pytest.raises(Interrupted, match=rf"{address}/.* at {proxy.url} can't be read"):
        epoch_of(remote)
    assert time.monotonic() - begun < 16


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_credentials_are_one_message_without_them(
    name: str, address: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "canary-wrong")
    with pytest.raises(UserError, match=r"access refused .*check the credentials") as caught:
        open_dataset(address, options_for(proxy))
    assert "canary" not in caught.value.message
    assert SECRET_KEY not in caught.value.message
    assert len(proxy.requests) == 1  # no second try: it would be refused as well


def test_no_set_and_no_bucket(address: str, proxy: Proxy) -> None:
    for place in (address, "s3://nobody/has/this"):
        with pytest.raises(UserError, match=rf"no shard set at {place}: there is no dataset.json"):
            open_dataset(place, options_for(proxy))


def test_a_page_instead_of_data_is_named(local: Dataset, remote: Dataset, proxy: Proxy) -> None:
    epoch_of(remote)  # lengths and index are known: the page comes in place of a range
    proxy.choose = lambda request: Fault("html") if request.path.endswith(".tar") else None
    with pytest.raises(DataError, match=r"train-00000\d.tar: an HTML page came instead"):
        epoch_of(remote)
    proxy.choose = lambda request: Fault("html")
    with pytest.raises(DataError, match=r"dataset.json.*: an HTML page came instead"):
        open_dataset(remote.folder, StorageOptions(endpoint_url=proxy.url, timeout_s=1.5))


def test_damage_in_the_store_is_named_after_a_second_look(
    local: Dataset, remote: Dataset, address: str, s3: S3Server, proxy: Proxy
) -> None:
    store = Folder.at_url(address, StorageOptions(endpoint_url=s3.url))
    shard = local.shards("train")[2]
    raw = bytearray((Path(local.folder) / shard.name).read_bytes())
    rows = [r for r in read_split(local, "train", ["key", "shard", "offset"]).to_pylist() if r["shard"] == shard.name]
    raw[rows[7]["offset"] + 40] ^= 1
    store.write(shard.name, bytes(raw))
    message = rf"{shard.name}: image {rows[7]['key'].hex()} is damaged: its bytes differ"
    with pytest.raises(DataError, match=message):
        epoch_of(remote, verify=False)  # what comes over a network is compared in any case
    raw[rows[7]["offset"] + 40] ^= 1
    store.write(shard.name, bytes(raw[:-1024]))
    with pytest.raises(DataError, match=rf"{shard.name}.* is damaged: {len(raw) - 1024} bytes, {len(raw)} expected"):
        epoch_of(open_dataset(address, options_for(proxy, timeout_s=1.2)))
    store.delete(shard.name)
    with pytest.raises(DataError, match=rf"{shard.name}.* is missing"):
        epoch_of(open_dataset(address, options_for(proxy, timeout_s=1.3)))


def test_bytes_damaged_on_the_way_once_are_read_again(local: Dataset, remote: Dataset, proxy: Proxy) -> None:
    epoch_of(remote)
    pages = itertools.count()
    proxy.choose = lambda request: Fault("html") if request.path.endswith(".tar") and next(pages) == 5 else None
    assert same(epoch_of(remote), epoch_of(local))
    assert next(pages) > 6


def test_the_cache_spares_the_store_and_mends_itself(
    local: Dataset, remote: Dataset, proxy: Proxy, tmp_path: Path
) -> None:
    cached = open_dataset(remote.folder, options_for(proxy, cache_dir=str(tmp_path), cache_mib=64))
    assert same(epoch_of(cached), epoch_of(local))
    proxy.requests.clear()
    assert same(epoch_of(cached, epoch=1), epoch_of(local, epoch=1))
    assert proxy.count(".tar", "GET") == 0
    blocks = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"]
    for path in blocks:
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    assert same(epoch_of(cached, epoch=1), epoch_of(local, epoch=1))
    assert proxy.count(".tar", "GET") > 0


def test_the_command_line_reads_the_environment_and_ends_quietly(remote: Dataset, proxy: Proxy) -> None:
    def info(**environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "medtl_dist.cli.main", "data", "info", remote.folder, "--json"]
        environ = {**os.environ, "AWS_ENDPOINT_URL": proxy.url, **environment}
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)

    done = info()
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["sha256"] == remote.sha256
    refused = info(AWS_SECRET_ACCESS_KEY="canary-wrong")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1
    assert "canary" not in refused.stderr


def test_errors_survive_the_way_out_of_a_loader_process(remote: Dataset, proxy: Proxy) -> None:
    proxy.choose = lambda request: Fault("403")
    with Loader(1) as loader, pytest.raises(MedtlError, match="access refused"):
        epoch_of(remote, loader=loader)
